//! System calls on guest memory, for which there is no Rust reference that a safe function could take, and the few
//! others that `rustix` lacks.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::Chunk;

pub(super) mod error_queue;
pub(super) mod signal;

/// The kernel takes at most this many pieces in one call (`UIO_MAXIOV`).
pub(super) const MAX_IOVECS: usize = 1024;

/// Memory that a call reads, in pieces, borrowed for `'a`.
#[derive(Debug)]
pub(super) struct Gather<'a> {
    iovecs: Vec<libc::iovec>,
    /// The first piece that is not written.
    first: usize,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Gather<'a> {
    /// The memory of `chunks`, of which one call takes [`MAX_IOVECS`].
    ///
    /// Our mappings are plain memory: a guard only hands out the pointer, and the slice borrowed by the chunk is
    /// what keeps the memory mapped.
    pub(super) fn new(chunks: &[Chunk<'a>]) -> Self {
        let of_chunk = |chunk: &Chunk<'a>| match chunk {
            Chunk::Bytes(bytes) => iovec(bytes.as_ptr(), bytes.len()),
            Chunk::Guest(guest) => iovec(guest.ptr_guard().as_ptr(), guest.len()),
        };
        let mut gather = Self {
            iovecs: chunks.iter().map(of_chunk).collect(),
            first: 0,
            memory: PhantomData,
        };
        gather.skip(0);
        gather
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest().is_empty()
    }

    /// Drops `n` written bytes, and pieces that are or became empty, from the front.
    pub(super) fn skip(&mut self, mut n: usize) {
        while let Some(piece) = self.iovecs.get_mut(self.first) {
            if piece.iov_len > n {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(n).cast();
                piece.iov_len -= n;
                return;
            }
            n -= piece.iov_len;
            self.first += 1;
        }
    }

    fn rest(&self) -> &[libc::iovec] {
        self.iovecs.get(self.first..).unwrap_or_default()
    }
}

/// Writes `chunks`: `write` makes one call and returns how many bytes it took, or `None` if it is to be made again.
pub(super) fn gather_all(
    chunks: &[Chunk<'_>],
    mut write: impl FnMut(&Gather<'_>) -> io::Result<Option<usize>>,
) -> io::Result<()> {
    for batch in chunks.chunks(MAX_IOVECS) {
        let mut gather = Gather::new(batch);
        while !gather.is_empty() {
            match write(&gather) {
                Ok(Some(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => gather.skip(n.unwrap_or(0)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// Reads into `guest` first and then into `buf`, once, and returns how many bytes.
pub(super) fn read_scatter(
    fd: BorrowedFd<'_>,
    guest: &[VolatileSlice<'_>],
    buf: &mut [u8],
) -> io::Result<usize> {
    let guest = guest.get(..MAX_IOVECS - 1).unwrap_or(guest);
    let of_guest = |g: &VolatileSlice<'_>| iovec(g.ptr_guard_mut().as_ptr(), g.len());
    let own = iovec(buf.as_mut_ptr(), buf.len());
    let read = |iovecs: &[libc::iovec]| {
        // SAFETY: every iovec describes memory that is borrowed for the call: `buf`, or a VolatileSlice, which keeps
        // it mapped.
        let n = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), c_int_len(iovecs.len())) };
        length(n)
    };
    if guest.is_empty() {
        return read(&[own]);
    }
    let iovecs: Vec<_> = guest.iter().map(of_guest).chain([own]).collect();
    read(&iovecs)
}

/// Writes to a socket once and returns how many bytes. No signal is raised: a library must not let SIGPIPE end its
/// process.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    memory: &Gather<'_>,
    flags: libc::c_int,
) -> io::Result<usize> {
    let iovecs = memory.rest();
    // SAFETY: an all-zero msghdr is valid: no address, no control data.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iovecs.as_ptr().cast_mut();
    msg.msg_iovlen = iovecs.len();
    // SAFETY: `msg` and what the iovecs describe live for the call; sendmsg writes to none of it.
    let n = unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const msg,
            libc::MSG_NOSIGNAL | flags,
        )
    };
    length(n)
}

/// Writes to a file or a pipe once and returns how many bytes.
pub(super) fn write(fd: BorrowedFd<'_>, memory: &Gather<'_>) -> io::Result<usize> {
    let iovecs = memory.rest();
    signal::without_write_signals(|| {
        // SAFETY: what the iovecs describe lives for the call; writev only reads it.
        let n = unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), c_int_len(iovecs.len())) };
        length(n)
    })
}

/// Puts references to `memory` into a pipe, without waiting, and returns how many bytes. The pages outlive their
/// mapping as long as the pipe, or what it is spliced to, has them.
pub(super) fn vmsplice(pipe: BorrowedFd<'_>, memory: &Gather<'_>) -> io::Result<usize> {
    let iovecs = memory.rest();
    // SAFETY: what the iovecs describe is mapped for the call; the kernel keeps references to its pages.
    let n = unsafe {
        libc::vmsplice(
            pipe.as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len(),
            libc::SPLICE_F_NONBLOCK,
        )
    };
    length(n)
}

/// Reads from byte `at` of a file into `guest`, once.
pub(super) fn read_at(file: &File, guest: &VolatileSlice<'_>, at: i64) -> io::Result<usize> {
    let memory = guest.ptr_guard_mut();
    // SAFETY: the guard's pointer is valid for writes of `guest.len()` bytes as long as the slice is borrowed, which is
    // for the call; the kernel writes no further.
    let n = unsafe { libc::pread(file.as_raw_fd(), memory.as_ptr().cast(), guest.len(), at) };
    length(n)
}

/// Writes `guest` to byte `at` of a file, once.
pub(super) fn write_at(file: &File, guest: &VolatileSlice<'_>, at: i64) -> io::Result<usize> {
    let memory = guest.ptr_guard();
    // SAFETY: the guard's pointer is valid for reads of `guest.len()` bytes as long as the slice is borrowed, which is
    // for the call.
    let n = unsafe { libc::pwrite(file.as_raw_fd(), memory.as_ptr().cast(), guest.len(), at) };
    length(n)
}

/// Bytes that the peer of a unix socket has not read, with what the kernel adds to them (`SIOCOUTQ`).
pub(super) fn unread(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes an int, which lives for it.
    let ret = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

/// Allows `MSG_ZEROCOPY` (`SO_ZEROCOPY`).
pub(super) fn allow_zero_copy(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    #[allow(clippy::cast_possible_truncation)] // four bytes
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is an int that lives for the call, the length is its own.
    let ret = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            len,
        )
    };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn iovec(ptr: *const u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: ptr.cast_mut().cast(),
        iov_len: len,
    }
}

/// What a call returns for bytes: their number, or -1 and an error.
fn length(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// The length of an iovec array, at most [`MAX_IOVECS`].
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
const fn c_int_len(len: usize) -> libc::c_int {
    len as libc::c_int
}
