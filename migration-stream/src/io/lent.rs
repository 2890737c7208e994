//! Pages that are lent to a peer on the same host, over a unix stream socket or TCP: the socket holds
//! references to them, and they are copied once, by the peer, into its own memory. By copying into
//! the socket and out of it again they would be copied twice.
//!
//! A page gets there by way of a pipe (`vmsplice(2)`, `splice(2)`). The socket's count of bytes that
//! the peer has not taken (`SIOCOUTQ`) says when none is lent any more; TCP's is of those that have not
//! arrived, so there the peer's own socket is looked at too ([`LocalPeer`]).
//!
//! Short pieces between pages, such as the header of each on a main stream, go the same way: a system call
//! for each would cost more than the copies that are saved.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use vm_memory::{MmapRegion, VolatileMemory};

use super::fd::{iovec, iovecs, poll, pollfd};
use super::local_peer::LocalPeer;
use super::signal::without_write_signals;
use super::socket::{option, set_option};
use super::{CancelToken, Chunk, Lending, deadline_after};

/// What the pipe and the socket are asked to hold, bytes: as much as a process without privileges may
/// have of a pipe.
const AT_A_TIME: libc::c_int = 1 << 20;
/// Our own bytes that are lent with the pages around them are at most so many in a piece.
const SHORT: usize = 256;
/// Room for such pieces: for as many as one call takes.
const NOTES_LEN: usize = super::fd::MAX_IOVECS * SHORT;
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
    /// Of TCP, whose sender does not hear what was read.
    peer: Option<LocalPeer>,
    notes: Option<Notes>,
}

/// Copies of our own short pieces. No byte of them is written again while the peer may read it.
#[derive(Debug)]
struct Notes {
    region: MmapRegion,
    used: usize,
}

impl Notes {
    fn new() -> io::Result<Self> {
        Ok(Self {
            region: MmapRegion::new(NOTES_LEN).map_err(io::Error::other)?,
            used: 0,
        })
    }

    const fn room(&self) -> usize {
        NOTES_LEN - self.used
    }

    fn keep(&mut self, bytes: &[u8]) -> io::Result<libc::iovec> {
        let copy = self
            .region
            .get_slice(self.used, bytes.len())
            .map_err(io::Error::other)?;
        copy.copy_from(bytes);
        self.used += bytes.len();
        Ok(iovec(copy.ptr_guard().as_ptr(), copy.len()))
    }
}

/// Whether a piece can be lent: guest memory, or short.
pub(super) fn is_lendable(chunk: &Chunk<'_>) -> bool {
    matches!(chunk, Chunk::Guest(_)) || chunk.len() <= SHORT
}

impl Lender {
    /// A way, if `lending` has it for such a `socket` and the peer is on this host.
    pub(super) fn new(socket: BorrowedFd<'_>, lending: Lending) -> io::Result<Option<Self>> {
        let is = |name, value| Ok::<_, io::Error>(option(socket, libc::SOL_SOCKET, name)? == value);
        if lending == Lending::Never || !is(libc::SO_TYPE, libc::SOCK_STREAM)? {
            return Ok(None);
        }
        let peer = if is(libc::SO_DOMAIN, libc::AF_UNIX)? {
            None
        } else if lending == Lending::UnixSocketsAndTcp
            && is(libc::SO_PROTOCOL, libc::IPPROTO_TCP)?
            && let Some(peer) = LocalPeer::find(socket)?
        {
            Some(peer)
        } else {
            return Ok(None);
        };
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
        if peer.is_none() {
            let _ = set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, AT_A_TIME);
        }
        Ok(Some(Self {
            reading,
            writing,
            inside: 0,
            has_lent: false,
            peer,
            notes: None,
        }))
    }

    /// Where the bytes of lendable pieces are, at most [`MAX_IOVECS`](super::fd::MAX_IOVECS): guest memory
    /// itself, and copies of our own, whose buffers are used again at once.
    pub(super) fn places(&mut self, chunks: &[Chunk<'_>]) -> io::Result<Vec<libc::iovec>> {
        let own = |chunk: &Chunk<'_>| match chunk {
            Chunk::Bytes(bytes) => bytes.len(),
            Chunk::Guest(_) => 0,
        };
        let wanted: usize = chunks.iter().map(own).sum();
        if wanted == 0 {
            return Ok(iovecs(chunks));
        }
        let notes = match &mut self.notes {
            Some(notes) if wanted <= notes.room() => notes,
            // The peer reads what is in the old ones yet: the socket keeps their pages, and nobody can
            // write to them any more.
            notes => notes.insert(Notes::new()?),
        };
        chunks
            .iter()
            .map(|chunk| match chunk {
                Chunk::Bytes(bytes) => notes.keep(bytes),
                Chunk::Guest(guest) => Ok(iovec(guest.ptr_guard().as_ptr(), guest.len())),
            })
            .collect()
    }

    /// Lends some of the memory that `iovecs` describe and returns how many bytes; the socket may
    /// not have them before [`Lender::pass`] says so.
    pub(super) fn take(&mut self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // No SIGPIPE: the pipe's other end is ours too, and open.
        // SAFETY: every iovec describes mapped memory that the caller borrows for the call, or that of
        // `notes`. The kernel keeps references to its pages, so they outlive their mapping.
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

    /// Gives the socket what it takes now; [`io::ErrorKind::WouldBlock`] if that is nothing. `more`: it
    /// need not send the last of it before there is more.
    pub(super) fn pass(&mut self, socket: BorrowedFd<'_>, more: bool) -> io::Result<()> {
        let more = if more { libc::SPLICE_F_MORE } else { 0 };
        // There is no flag for a splice without SIGPIPE.
        let n = without_write_signals(|| {
            // SAFETY: splice without offsets takes no pointers; both descriptors are open.
            let n = unsafe {
                libc::splice(
                    self.reading.as_raw_fd(),
                    std::ptr::null_mut(),
                    socket.as_raw_fd(),
                    std::ptr::null_mut(),
                    self.inside,
                    libc::SPLICE_F_NONBLOCK | more,
                )
            };
            usize::try_from(n).map_err(|_| io::Error::last_os_error())
        })?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.inside = self.inside.saturating_sub(n);
        Ok(())
    }

    /// Waits until the peer has taken everything that was lent, and what was sent behind it.
    pub(super) fn finish(
        &mut self,
        socket: BorrowedFd<'_>,
        until: Instant,
        cancel: Option<&CancelToken>,
    ) -> io::Result<()> {
        while self.has_lent && !self.is_taken(socket)? {
            cancel.map_or(Ok(()), CancelToken::check)?;
            // A connection that has ended, at either side, is POLLHUP, which needs no asking for.
            let mut fds = [pollfd(socket.as_raw_fd(), 0), pollfd(-1, 0)];
            let has_ended = poll(&mut fds, Some(until.min(deadline_after(LOOK))))?;
            if has_ended && !self.is_taken(socket)? {
                return Err(io::Error::new(
                    io::ErrorKind::BrokenPipe,
                    "the connection ended before the peer had taken what was lent to it",
                ));
            }
            if Instant::now() >= until {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer did not take what was lent to it before the deadline",
                ));
            }
        }
        self.has_lent = false;
        if let Some(notes) = &mut self.notes {
            notes.used = 0;
        }
        Ok(())
    }

    /// Whether the peer has all that was sent.
    fn is_taken(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        // What has not arrived is in no queue of the peer's yet, so that is the second look.
        Ok(not_taken(socket)? == 0
            && match &self.peer {
                Some(peer) => peer.unread()? == 0,
                None => true,
            })
    }
}

/// What the socket holds for its peer, bytes, with what the kernel adds to them; of TCP what has not been
/// acknowledged.
fn not_taken(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes an int, which lives for it.
    let ret = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}
