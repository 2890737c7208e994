//! What the kernel says of sends with `MSG_ZEROCOPY`: it reads the pages when it transmits them,
//! and reports on the socket's error queue when it needs them no longer (Linux,
//! `Documentation/networking/msg_zerocopy.rst`).
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use super::CancelToken;
use super::fd::{cancel_pollfd, poll, pollfd};
use super::socket::{option, set_option};

/// `SO_EE_ORIGIN_ZEROCOPY`: the report is about zero-copy sends.
const ORIGIN_ZEROCOPY: u8 = 5;
/// `SO_EE_CODE_ZEROCOPY_COPIED`: the kernel copied after all.
const CODE_COPIED: u8 = 1;
/// Room for the one control message of a report, which brings an address of at most
/// `sockaddr_in6`.
const CONTROL_LEN: usize = 128;

/// The zero-copy sends of one socket.
#[derive(Debug, Default)]
pub(super) struct ZeroCopy {
    /// Sends whose memory the kernel may still read.
    outstanding: u32,
    /// Sends since [`ZeroCopy::take_copied`] that the kernel copied.
    copied: u64,
}

/// What one report says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Report {
    sends: u32,
    is_copied: bool,
}

impl ZeroCopy {
    /// Asks the socket for zero-copy sends.
    pub(super) fn enable(fd: BorrowedFd<'_>) -> io::Result<Self> {
        set_option(fd, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1).map_err(|error| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!("zero-copy send needs a TCP connection: {error}"),
            )
        })?;
        Ok(Self::default())
    }

    /// One more send succeeded.
    pub(super) const fn sent(&mut self) {
        self.outstanding = self.outstanding.wrapping_add(1);
    }

    /// Takes the reports that are there, without waiting.
    pub(super) fn reap(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(report) = next_report(fd)? {
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

    /// The socket had no buffer for a send: waits for an earlier one to end. There is none: the
    /// process may not lock the memory.
    pub(super) fn make_room(
        &mut self,
        fd: BorrowedFd<'_>,
        until: Instant,
        cancel: Option<&CancelToken>,
    ) -> io::Result<()> {
        if self.outstanding == 0 {
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!(
                    "too little locked memory for zero-copy send: the limit (RLIMIT_MEMLOCK) is {}",
                    memlock_limit()
                ),
            ));
        }
        self.wait(fd, self.outstanding - 1, until, cancel)
    }

    /// Waits until the kernel reads no memory any more, and returns how many sends it copied since
    /// this was called last.
    pub(super) fn finish(
        &mut self,
        fd: BorrowedFd<'_>,
        until: Instant,
        cancel: Option<&CancelToken>,
    ) -> io::Result<u64> {
        self.wait(fd, 0, until, cancel)?;
        Ok(mem::take(&mut self.copied))
    }

    /// Waits until no more than `max` sends are outstanding.
    fn wait(
        &mut self,
        fd: BorrowedFd<'_>,
        max: u32,
        until: Instant,
        cancel: Option<&CancelToken>,
    ) -> io::Result<()> {
        loop {
            self.reap(fd)?;
            if self.outstanding <= max {
                return Ok(());
            }
            // An error queue with something in it is POLLERR, which needs no asking for.
            let mut fds = [pollfd(fd.as_raw_fd(), 0), cancel_pollfd(cancel)];
            let is_ready = poll(&mut fds, Some(until))?;
            cancel.map_or(Ok(()), CancelToken::check)?;
            if !is_ready {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer did not acknowledge what was sent without copying before the deadline",
                ));
            }
            if fds[0].revents & (libc::POLLHUP | libc::POLLNVAL) != 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }
}

/// The next report on the socket's error queue; `None` when there is none. An error of the socket
/// is an error.
fn next_report(fd: BorrowedFd<'_>) -> io::Result<Option<Report>> {
    #[repr(align(8))]
    struct Control([u8; CONTROL_LEN]);
    let mut control = Control([0; CONTROL_LEN]);
    // SAFETY: an all-zero msghdr is valid: no address, no data, no control buffer.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = CONTROL_LEN;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: `msg` and the control buffer live for the call, and lengths are theirs.
    if unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) } < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock => socket_error(fd).map(|()| None),
            io::ErrorKind::Interrupted => next_report(fd),
            _ => Err(error),
        };
    }
    // SAFETY: `msg` was filled by recvmsg, its control buffer is aligned for cmsghdr and alive.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
    if header.is_null() {
        return Err(unexpected("has a report without content"));
    }
    // SAFETY: not null, so it points to a whole cmsghdr in the control buffer.
    let cmsg = unsafe { header.read_unaligned() };
    let is_error = matches!(
        (cmsg.cmsg_level, cmsg.cmsg_type),
        (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
    );
    // SAFETY: CMSG_LEN only computes a length.
    let least = unsafe { libc::CMSG_LEN(size_of_u32::<libc::sock_extended_err>()) };
    if !is_error || cmsg.cmsg_len < least as usize {
        return Err(unexpected("has a report of another kind"));
    }
    // SAFETY: the message is long enough for a sock_extended_err, of which every bit pattern is
    // valid.
    let error = unsafe {
        libc::CMSG_DATA(header)
            .cast::<libc::sock_extended_err>()
            .read_unaligned()
    };
    if error.ee_origin != ORIGIN_ZEROCOPY {
        let code = i32::try_from(error.ee_errno).unwrap_or(libc::EIO);
        return Err(io::Error::from_raw_os_error(code));
    }
    Ok(Some(Report {
        // Both ends of the range are part of it; the numbers wrap around.
        sends: error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1),
        is_copied: error.ee_code & CODE_COPIED != 0,
    }))
}

/// The socket's pending error.
fn socket_error(fd: BorrowedFd<'_>) -> io::Result<()> {
    match option(fd, libc::SOL_SOCKET, libc::SO_ERROR)? {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

fn memlock_limit() -> String {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit lives for the call.
    let ret = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    if ret == 0 {
        format!("{} bytes", limit.rlim_cur)
    } else {
        "not known".to_owned()
    }
}

fn unexpected(what: &str) -> io::Error {
    io::Error::other(format!("the socket's error queue {what}"))
}

#[allow(clippy::cast_possible_truncation)] // a few bytes
const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}
