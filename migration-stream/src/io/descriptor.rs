//! One call on a descriptor: what it waits for, how long, and what ends it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::sys::{self, Gather, gather_all};
use super::{CancelToken, Chunk, deadline_after};

/// A descriptor, and what ends a wait for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor<'a> {
    pub(super) fd: BorrowedFd<'a>,
    pub(super) is_socket: bool,
    /// How long the peer may do nothing where there is no deadline.
    pub(super) limit: Duration,
    pub(super) deadline: Option<Instant>,
    pub(super) cancel: Option<&'a CancelToken>,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    /// The descriptor, for these.
    This(PollFlags),
    /// The other one.
    Other,
    /// The time.
    TimedOut,
}

impl Descriptor<'_> {
    /// When a call that begins to wait now has to give up.
    pub(super) fn until(&self) -> Instant {
        self.deadline.unwrap_or_else(|| deadline_after(self.limit))
    }

    pub(super) fn check_cancelled(&self) -> io::Result<()> {
        self.cancel.map_or(Ok(()), CancelToken::check)
    }

    /// Waits for `events`, for `other` to become readable, or until `until`. Being cancelled is an error.
    pub(super) fn poll(
        &self,
        events: PollFlags,
        other: Option<BorrowedFd<'_>>,
        until: Option<Instant>,
    ) -> io::Result<Ready> {
        let this = PollFd::from_borrowed_fd(self.fd, events);
        let mut fds = [this.clone(), this.clone(), this];
        let others = other.into_iter().chain(self.cancel.map(AsFd::as_fd));
        let mut count = 1;
        for (place, fd) in fds[1..].iter_mut().zip(others) {
            *place = PollFd::from_borrowed_fd(fd, PollFlags::IN);
            count += 1;
        }
        let is_ready = poll(&mut fds[..count], until)?;
        self.check_cancelled()?;
        Ok(if !is_ready {
            Ready::TimedOut
        } else if other.is_some() && !fds[1].revents().is_empty() {
            // It is how somebody asks for attention: it goes first.
            Ready::Other
        } else {
            Ready::This(fds[0].revents())
        })
    }

    /// Waits until the descriptor takes bytes.
    pub(super) fn wait_writable(&self) -> io::Result<()> {
        match self.poll(PollFlags::OUT, None, Some(self.until()))? {
            Ready::TimedOut => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the peer took nothing before the deadline",
            )),
            _ => Ok(()),
        }
    }

    /// Makes one call that copies; `flags` are a socket's.
    pub(super) fn write(&self, memory: &Gather<'_>, flags: libc::c_int) -> io::Result<usize> {
        if self.is_socket {
            sys::send(self.fd, memory, flags)
        } else {
            sys::write(self.fd, memory)
        }
    }

    /// Copies all of `chunks` and adds what was taken to `taken`. Without a deadline the limit counts from the last
    /// progress.
    pub(super) fn write_copies(
        &self,
        chunks: &[Chunk<'_>],
        flags: libc::c_int,
        taken: &mut u64,
    ) -> io::Result<()> {
        gather_all(chunks, |memory| match self.write(memory, flags) {
            Ok(n) => {
                *taken = taken.saturating_add(n as u64);
                Ok(Some(n))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait_writable().map(|()| None),
            Err(e) => Err(e),
        })
    }
}

/// Waits for one of `fds`; false when the deadline passed first.
fn poll(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|d| timespec(d.saturating_duration_since(Instant::now())));
        match rustix::event::poll(fds, left.as_ref()) {
            Ok(0) if deadline.is_some_and(|d| Instant::now() < d) => {}
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}
