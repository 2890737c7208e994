//! A way out of this process that may be stuck: a pipe or a terminal that nobody reads.
//!
//! Whoever writes there holds something that others need: the guest's processor, which a checkpoint has
//! to stop, or the log, which the heartbeat writes too. So nobody waits there for long. What finds no
//! way out in time is lost, as on a serial line that nobody listens to.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How much goes into a pipe that has room at all (`_POSIX_PIPE_BUF`), bytes.
const PIECE: usize = 512;

/// How long a reader may be slow before what is written is lost. After that nothing is waited for until
/// it reads again.
pub const PATIENCE: Duration = Duration::from_millis(250);

/// A writer that waits for its reader for [`PATIENCE`] at most, and gives an error of the kind
/// [`ErrorKind::TimedOut`] then.
#[derive(Debug)]
pub struct Outlet<W> {
    out: W,
    is_stuck: bool,
}

impl<W: Write + AsFd> Outlet<W> {
    /// A way out through `out`, which has no buffer of its own or is [flushed](Write::flush) by
    /// whoever writes.
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

impl<W: Write + AsFd> Write for Outlet<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..PIECE).unwrap_or(bytes);
        self.is_stuck = !self.has_room()?;
        if self.is_stuck {
            return Err(ErrorKind::TimedOut.into());
        }
        let written = self.out.write(piece)?;
        // Of a buffered one, such as standard output, which has room for it.
        self.out.flush()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says a line on standard output, if that takes it.
pub fn say(line: impl fmt::Display) {
    // Nobody is there to be told that nobody is there.
    let _ = Outlet::new(io::stdout()).write_all(format!("{line}\n").as_bytes());
}

/// Prints a line on standard output and waits for as long as its reader takes; whether there is a reader.
#[must_use]
pub fn print(line: impl fmt::Display) -> bool {
    io::stdout()
        .write_all(format!("{line}\n").as_bytes())
        .is_ok()
}

/// Says a line on standard error, if that takes it.
pub fn complain(line: impl fmt::Display) {
    // As above.
    let _ = Outlet::new(io::stderr()).write_all(format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_is_waited_for_once() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut outlet = Outlet::new(writer);
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
        let error = Outlet::new(writer).write(b"x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }
}
