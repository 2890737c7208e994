//! Pages that are lent to a peer on the same host, over a unix stream socket: the socket holds
//! references to them, and they are copied once, by the peer, into its own memory. By copying into
//! the socket and out of it again they would be copied twice.
//!
//! A page gets there by way of a pipe (`vmsplice(2)`, `splice(2)`). The socket's count of bytes that
//! the peer has not taken (`SIOCOUTQ`) says when none is lent any more.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use super::socket::{option, set_option};

/// What the pipe and the socket are asked to hold, bytes: as much as a process without privileges may
/// have of a pipe.
const AT_A_TIME: libc::c_int = 1 << 20;
/// Between two looks at what the peer has taken. It has at most a few hundred KB to copy.
const LOOK: Duration = Duration::from_micros(20);

/// The way of pages into one socket.
#[derive(Debug)]
pub(super) struct Lender {
    reading: OwnedFd,
    writing: OwnedFd,
    /// What is in the pipe, bytes.
    inside: usize,
    /// Something was lent since [`Lender::finish`].
    has_lent: bool,
}

impl Lender {
    /// A way, if `socket` is one that takes pages.
    pub(super) fn new(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        if option(socket, libc::SOL_SOCKET, libc::SO_DOMAIN)? != libc::AF_UNIX
            || option(socket, libc::SOL_SOCKET, libc::SO_TYPE)? != libc::SOCK_STREAM
        {
            return Ok(None);
        }
        let mut ends = [-1; 2];
        // SAFETY: `ends` has room for two descriptors and lives for the call.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: pipe2 succeeded: both are open and nobody else's.
        let [reading, writing] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        // More at a time is fewer calls, and fewer waits for the peer. Whatever the system grants
        // does, as does what it has granted without being asked.
        // SAFETY: fcntl with F_SETPIPE_SZ takes no pointers.
        unsafe { libc::fcntl(writing.as_raw_fd(), libc::F_SETPIPE_SZ, AT_A_TIME) };
        let _ = set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, AT_A_TIME);
        Ok(Some(Self {
            reading,
            writing,
            inside: 0,
            has_lent: false,
        }))
    }

    /// Lends some of the memory that `iovecs` describe and returns how many bytes; the socket may
    /// not have them before [`Lender::pass`] says so.
    pub(super) fn take(&mut self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: every iovec describes mapped memory that the caller borrows for the call. The
        // kernel keeps references to its pages, so they outlive their mapping.
        let n = unsafe {
            libc::vmsplice(
                self.writing.as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len(),
                libc::SPLICE_F_NONBLOCK,
            )
        };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        self.inside += n;
        self.has_lent = true;
        Ok(n)
    }

    /// Whether the socket has all that was lent.
    pub(super) const fn is_empty(&self) -> bool {
        self.inside == 0
    }

    /// Gives the socket what it takes now; [`io::ErrorKind::WouldBlock`] if that is nothing.
    pub(super) fn pass(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: splice without offsets takes no pointers; both descriptors are open.
        let n = unsafe {
            libc::splice(
                self.reading.as_raw_fd(),
                std::ptr::null_mut(),
                socket.as_raw_fd(),
                std::ptr::null_mut(),
                self.inside,
                libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MORE,
            )
        };
        match usize::try_from(n) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                self.inside = self.inside.saturating_sub(n);
                Ok(())
            }
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Waits until the peer has taken everything that was lent, and what was sent behind it.
    pub(super) fn finish(&mut self, socket: BorrowedFd<'_>, until: Instant) -> io::Result<()> {
        while self.has_lent && not_taken(socket)? > 0 {
            if Instant::now() >= until {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer did not take what was lent to it before the deadline",
                ));
            }
            thread::sleep(LOOK);
        }
        self.has_lent = false;
        Ok(())
    }
}

/// What the socket holds for its peer, bytes, with what the kernel adds to them.
fn not_taken(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes an int, which lives for it.
    let ret = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}
