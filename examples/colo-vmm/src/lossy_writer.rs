//! Writes to a pipe, a terminal or a file that may be slow or full.
//!
//! A thread that others depend on must not block on a slow reader: the vCPU's thread, which a checkpoint has to
//! pause, or the heartbeat's, which writes the log. [`LossyWriter`] waits for a limited time, and then drops data.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How much goes into a pipe that has room at all (`_POSIX_PIPE_BUF`), bytes.
const PIECE: usize = 512;

/// How long a reader may be slow before data is dropped. After that no write waits, until the reader reads
/// again.
pub const PATIENCE: Duration = Duration::from_millis(250);

/// A writer that waits for its reader for at most [`PATIENCE`], and then returns an error of the kind
/// [`ErrorKind::TimedOut`].
#[derive(Debug)]
pub struct LossyWriter<W> {
    out: W,
    is_stuck: bool,
}

impl<W: Write + AsFd> LossyWriter<W> {
    /// Returns a writer to `out`, which has no buffer, or which the caller [flushes](Write::flush).
    pub const fn new(out: W) -> Self {
        Self {
            out,
            is_stuck: false,
        }
    }

    fn has_room(&self) -> io::Result<bool> {
        let patience = if self.is_stuck {
            Duration::ZERO
        } else {
            PATIENCE
        };
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&self.out, PollFlags::OUT)];
        match poll(&mut fds, Some(&timeout)) {
            // An error is there to be fetched by writing.
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Err(ErrorKind::Interrupted.into()),
            Err(error) => Err(error.into()),
        }
    }
}

impl<W: Write + AsFd> Write for LossyWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..PIECE).unwrap_or(bytes);
        self.is_stuck = !self.has_room()?;
        if self.is_stuck {
            return Err(ErrorKind::TimedOut.into());
        }
        let written = self.out.write(piece)?;
        // A buffered writer, such as standard output, has room for it.
        self.out.flush()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Prints a line on standard output. A line that the reader does not take in time is lost.
pub fn say(line: impl fmt::Display) {
    // There is no other place for the error.
    let _ = LossyWriter::new(io::stdout()).write_all(format!("{line}\n").as_bytes());
}

/// Prints a line on standard output, and waits for its reader without a limit. Returns whether there is a reader.
#[must_use]
pub fn print(line: impl fmt::Display) -> bool {
    io::stdout()
        .write_all(format!("{line}\n").as_bytes())
        .is_ok()
}

/// Prints a line on standard error. A line that the reader does not take in time is lost.
pub fn print_error(line: impl fmt::Display) {
    // As above.
    let _ = LossyWriter::new(io::stderr()).write_all(format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_is_waited_for_once() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut outlet = LossyWriter::new(writer);
        let mut taken = 0;
        let error = loop {
            match outlet.write(&[b'x'; 3000]) {
                Ok(n) => taken += n,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(taken > PIECE);
        let begun = Instant::now();
        for _ in 0..1000 {
            assert!(outlet.write(b"lost").is_err());
        }
        // A thousand times its patience would be minutes.
        assert!(begun.elapsed() < Duration::from_secs(60));
        // When it is read again, what is written arrives.
        let mut all = vec![0; taken];
        reader.read_exact(&mut all).unwrap();
        outlet.write_all(b"again").unwrap();
        let mut again = [0; 5];
        reader.read_exact(&mut again).unwrap();
        assert_eq!(&again, b"again");
    }

    #[test]
    fn a_reader_that_is_gone_is_an_error_at_once() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let error = LossyWriter::new(writer).write(b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }
}
