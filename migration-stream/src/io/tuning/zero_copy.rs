//! Zero-copy send (`MSG_ZEROCOPY`): the kernel reads the pages when it transmits them, and reports on the socket's
//! error queue when it needs them no longer (Linux, `Documentation/networking/msg_zerocopy.rst`).

use std::{io, mem};

use rustix::event::PollFlags;
use rustix::process::{Resource, getrlimit};

use super::super::Chunk;
use super::super::descriptor::{Descriptor, Ready};
use super::super::sys::error_queue::{next_report, unexpected};
use super::super::sys::{allow_zero_copy, gather_all};

/// The zero-copy sends of one socket.
#[derive(Debug, Default)]
pub(super) struct ZeroCopy {
    /// Sends whose memory the kernel may still read.
    outstanding: u32,
    /// Sends since [`ZeroCopy::wait_until_released`] that the kernel copied.
    copied: u64,
}

impl ZeroCopy {
    /// Asks the socket for zero-copy sends.
    pub(super) fn enable(socket: &Descriptor<'_>) -> io::Result<Self> {
        allow_zero_copy(socket.fd).map_err(|error| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!("zero-copy send needs a TCP connection: {error}"),
            )
        })?;
        Ok(Self::default())
    }

    /// Writes all of `chunks`, copies where `flags` have no `MSG_ZEROCOPY`.
    pub(super) fn write_all(
        &mut self,
        socket: &Descriptor<'_>,
        chunks: &[Chunk<'_>],
        flags: libc::c_int,
        taken: &mut u64,
    ) -> io::Result<()> {
        gather_all(chunks, |memory| match socket.write(memory, flags) {
            Ok(n) => {
                *taken = taken.saturating_add(n as u64);
                if flags & libc::MSG_ZEROCOPY != 0 {
                    self.outstanding = self.outstanding.wrapping_add(1);
                }
                Ok(Some(n))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // Reports that nobody takes would end every wait at once.
                self.reap(socket)?;
                socket.wait_writable().map(|()| None)
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                self.make_room(socket).map(|()| None)
            }
            Err(e) => Err(e),
        })
    }

    /// Waits until the kernel reads no memory any more, and returns how many sends it copied since
    /// this was called last.
    pub(super) fn wait_until_released(&mut self, socket: &Descriptor<'_>) -> io::Result<u64> {
        self.wait(socket, 0)?;
        Ok(mem::take(&mut self.copied))
    }

    /// Takes the reports that are there, without waiting.
    fn reap(&mut self, socket: &Descriptor<'_>) -> io::Result<()> {
        while let Some(report) = next_report(socket.fd)? {
            self.outstanding = self
                .outstanding
                .checked_sub(report.sends)
                .ok_or_else(|| unexpected("reports more zero-copy sends than there were"))?;
            if report.is_copied {
                self.copied += u64::from(report.sends);
            }
        }
        Ok(())
    }

    /// The socket had no buffer for a send: waits for an earlier one to end. If there is none, the
    /// process may not lock the memory.
    fn make_room(&mut self, socket: &Descriptor<'_>) -> io::Result<()> {
        if self.outstanding == 0 {
            let limit = match getrlimit(Resource::Memlock).current {
                Some(bytes) => format!("{bytes} bytes"),
                None => "none".to_owned(),
            };
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!(
                    "too little locked memory for zero-copy send: the limit (RLIMIT_MEMLOCK) is {limit}"
                ),
            ));
        }
        self.wait(socket, self.outstanding - 1)
    }

    /// Waits until no more than `max` sends are outstanding.
    fn wait(&mut self, socket: &Descriptor<'_>, max: u32) -> io::Result<()> {
        let until = socket.until();
        loop {
            self.reap(socket)?;
            if self.outstanding <= max {
                return Ok(());
            }
            // An error queue with something in it is POLLERR, which needs no asking for.
            match socket.poll(PollFlags::empty(), None, Some(until))? {
                Ready::This(events) if events.intersects(PollFlags::HUP | PollFlags::NVAL) => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ready::TimedOut => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the peer did not acknowledge what was sent without copying before the deadline",
                    ));
                }
                _ => {}
            }
        }
    }
}
