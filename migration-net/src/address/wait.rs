//! A wait for a descriptor that ends in time, or when it is cancelled.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use migration_stream::io::CancelToken;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until `fd` is ready, by `deadline`.
///
/// # Errors
/// `TimedOut`; that of [`CancelToken::check`] when `cancel` ended the wait.
pub(super) fn wait_for(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<()> {
    loop {
        let left = remaining(deadline)?;
        let mut fds = vec![PollFd::from_borrowed_fd(fd, events)];
        fds.extend(cancel.map(|token| PollFd::from_borrowed_fd(token.as_fd(), PollFlags::IN)));
        let ready = poll_for(&mut fds, left)?;
        check(cancel)?;
        if ready && fds.first().is_some_and(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
    }
}

/// Waits for `pause`, shorter if `deadline` comes first.
///
/// # Errors
/// As for [`wait_for`].
pub(super) fn pause(
    pause: Duration,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<()> {
    let left = remaining(deadline)?.min(pause);
    match cancel {
        None => std::thread::sleep(left),
        Some(token) => {
            let mut fds = [PollFd::from_borrowed_fd(token.as_fd(), PollFlags::IN)];
            poll_for(&mut fds, left)?;
        }
    }
    check(cancel)
}

/// Whether one of `fds` is ready within `left`, or at least a signal came.
fn poll_for(fds: &mut [PollFd<'_>], left: Duration) -> io::Result<bool> {
    let left = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(fds, Some(&left)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

pub(super) fn check(cancel: Option<&CancelToken>) -> io::Result<()> {
    cancel.map_or(Ok(()), CancelToken::check)
}

/// The time until `deadline`.
///
/// # Errors
/// `TimedOut` if there is none.
pub(super) fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}
