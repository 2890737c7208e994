//! A channel over a file descriptor: socket, pipe or file, never blocking beyond its deadline.
//!
//! The descriptor is non-blocking; a call that cannot go on waits in `poll` until its deadline.
//! `unsafe` is for gather and scatter calls on guest memory, which has no Rust reference to pass to
//! the standard library.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::lent::{Lender, is_lendable};
use super::signal::without_write_signals;
use super::socket::{keep_alive, option, set_option};
use super::zero_copy::ZeroCopy;
use super::{ByteSink, ByteSource, CancelToken, Chunk, Lending, Readiness, deadline_after};

/// The kernel takes at most this many pieces in one call (`UIO_MAXIOV`).
pub(super) const MAX_IOVECS: usize = 1024;
/// What is worth waking a reader of TCP for where at least as much has to come, bytes: with two
/// channels a guest of 2 GiB arrives a twentieth sooner than when every segment wakes one.
const LOW_WATER: usize = 64 << 10;
/// How long TCP's next bytes may be on their way before those that came are confirmed: as long as they
/// keep coming, confirmations are the system's business, and cost throughput where they are many.
const CONFIRM_AFTER: Duration = Duration::from_micros(200);

/// One direction, or both, of a connection. Handles made by [`FdChannel::share`] share the connection, not the
/// deadlines; one of them may send without copying. A [`CancelToken`] that a handle has goes on to those made
/// from it.
#[derive(Debug)]
pub struct FdChannel {
    fd: Arc<OwnedFd>,
    is_socket: bool,
    /// What has come over TCP is confirmed early if nothing follows it soon.
    confirms_early: bool,
    limit: Duration,
    read_deadline: Option<Instant>,
    write_deadline: Option<Instant>,
    uncopied: Option<Uncopied>,
    /// Ends what this handle waits for.
    cancel: Option<CancelToken>,
    /// Bytes that the kernel has taken from this handle by copying.
    taken: u64,
    /// What the socket wakes its reader for, bytes (`SO_RCVLOWAT`); the connection's, so shared.
    low_water: Arc<AtomicUsize>,
    /// This side has ended the receiving direction; the connection's, so shared.
    was_shut: Arc<AtomicBool>,
}

/// How guest memory is sent that is not copied.
#[derive(Debug)]
enum Uncopied {
    /// The kernel reads it when it transmits it (TCP).
    Pinned(ZeroCopy),
    /// The peer, on this host, reads it (unix sockets and TCP).
    Lent(Lender),
}

impl FdChannel {
    /// Takes a connected descriptor over and makes it non-blocking. `limit` is how long one call
    /// may wait for the peer where no deadline was set.
    ///
    /// It has to exceed every silence of a healthy peer: 10 to 30 s suit a migration. A source that pauses before
    /// the switch-over is silent for as long as its operator likes; see
    /// [`Target::allowing_pauses_of`](crate::precopy::Target::allowing_pauses_of).
    ///
    /// # Errors
    /// Those of `fcntl`.
    pub fn new(fd: impl Into<OwnedFd>, limit: Duration) -> io::Result<Self> {
        let fd = fd.into();
        // SAFETY: fcntl with F_GETFL/F_SETFL takes no pointers; the descriptor is ours.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let is_socket = {
            // SAFETY: an all-zero stat is a valid value for fstat to overwrite.
            let mut stat: libc::stat = unsafe { std::mem::zeroed() };
            // SAFETY: `stat` lives for the call and has the type fstat writes.
            let ret = unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) };
            ret == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
        };
        let protocol = option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL);
        let is_tcp = protocol.is_ok_and(|protocol| protocol == libc::IPPROTO_TCP);
        if is_tcp {
            keep_alive(fd.as_fd(), limit);
        }
        Ok(Self {
            confirms_early: is_tcp,
            fd: Arc::new(fd),
            is_socket,
            limit,
            read_deadline: None,
            write_deadline: None,
            uncopied: None,
            cancel: None,
            taken: 0,
            low_water: Arc::new(AtomicUsize::new(1)),
            was_shut: Arc::default(),
        })
    }

    /// Another handle on the same connection, for the other direction or for another thread.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            fd: Arc::clone(&self.fd),
            is_socket: self.is_socket,
            confirms_early: self.confirms_early,
            limit: self.limit,
            read_deadline: None,
            write_deadline: None,
            uncopied: None,
            cancel: self.cancel.clone(),
            taken: 0,
            low_water: Arc::clone(&self.low_water),
            was_shut: Arc::clone(&self.was_shut),
        }
    }

    /// Ends both directions of a socket for every handle; blocked calls return at once. Calling it
    /// on anything but a connected socket does nothing.
    pub fn shutdown(&self) {
        self.was_shut.store(true, Ordering::Release);
        // SAFETY: shutdown takes no pointers; the descriptor is open as long as `self.fd`.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// Shuts the receiving direction: whoever reads gets the end of the stream, and the peer can still be
    /// told why nothing is taken any more.
    pub fn shutdown_reading(&self) {
        self.was_shut.store(true, Ordering::Release);
        // SAFETY: shutdown takes no pointers; the descriptor is open as long as `self.fd`.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RD) };
    }

    fn until(&self, deadline: Option<Instant>) -> Instant {
        deadline.unwrap_or_else(|| deadline_after(self.limit))
    }

    fn wait_for(&self, events: libc::c_short, deadline: Option<Instant>) -> io::Result<()> {
        let until = Some(self.until(deadline));
        let mut fds = [
            pollfd(self.fd.as_raw_fd(), events),
            cancel_pollfd(self.cancel.as_ref()),
        ];
        let is_ready = if events == libc::POLLIN {
            self.poll_input(&mut fds, until)?
        } else {
            poll(&mut fds, until)?
        };
        self.check_cancelled()?;
        if is_ready {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                if events == libc::POLLIN {
                    "the peer sent nothing before the deadline"
                } else {
                    "the peer took nothing before the deadline"
                },
            ))
        }
    }

    fn check_cancelled(&self) -> io::Result<()> {
        self.cancel.as_ref().map_or(Ok(()), CancelToken::check)
    }

    /// Lets a wait for TCP's data last until many bytes are there if `wanted` says that many have to
    /// come: without it the kernel wakes a reader for every segment.
    fn wake_for(&self, wanted: usize) {
        let mark = if wanted < LOW_WATER { 1 } else { LOW_WATER };
        // Relaxed: a handle's reads are its own, and whoever hands it on orders them.
        if !self.is_socket || self.low_water.load(Ordering::Relaxed) == mark {
            return;
        }
        let set = set_option(
            self.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            c_int_len(mark),
        );
        // A socket that knows no mark wakes its reader for everything: nothing is lost.
        if set.is_ok() {
            self.low_water.store(mark, Ordering::Relaxed);
        }
    }

    /// Waits for one of `fds`, of which this is the first. If nothing comes soon, the system is to
    /// confirm what TCP has received: it may put that off for 40 ms, during which a peer without
    /// `TCP_NODELAY` (QEMU's main channel) holds a small piece back.
    fn poll_input(&self, fds: &mut [libc::pollfd], deadline: Option<Instant>) -> io::Result<bool> {
        if self.confirms_early {
            let soon = deadline_after(CONFIRM_AFTER);
            if poll(
                fds,
                Some(deadline.map_or(soon, |deadline| deadline.min(soon))),
            )? {
                return Ok(true);
            }
            // Without it the peer waits, and that is all.
            let _ = set_option(self.as_fd(), libc::IPPROTO_TCP, libc::TCP_QUICKACK, 1);
        }
        poll(fds, deadline)
    }

    /// One non-blocking scatter read.
    fn readv(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: every iovec describes memory that the callers borrow for the call: a `&mut [u8]`
        // or a VolatileSlice, whose guards they hold.
        let n = unsafe {
            libc::readv(
                self.fd.as_raw_fd(),
                iovecs.as_ptr(),
                c_int_len(iovecs.len()),
            )
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// One non-blocking gather write; `flags` are a socket's.
    fn writev(&self, iovecs: &mut [libc::iovec], flags: libc::c_int) -> io::Result<usize> {
        if self.is_socket {
            // SAFETY: an all-zero msghdr is valid: no address, no control data.
            let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
            msg.msg_iov = iovecs.as_mut_ptr();
            msg.msg_iovlen = iovecs.len();
            // MSG_NOSIGNAL: a library must not let SIGPIPE end its process.
            // SAFETY: `msg` and the iovecs live for the call; sendmsg only reads the memory.
            let n = unsafe {
                libc::sendmsg(
                    self.fd.as_raw_fd(),
                    &raw const msg,
                    libc::MSG_NOSIGNAL | flags,
                )
            };
            return usize::try_from(n).map_err(|_| io::Error::last_os_error());
        }
        without_write_signals(|| {
            // SAFETY: the iovecs live for the call; writev only reads the memory.
            let n = unsafe {
                libc::writev(
                    self.fd.as_raw_fd(),
                    iovecs.as_ptr(),
                    c_int_len(iovecs.len()),
                )
            };
            usize::try_from(n).map_err(|_| io::Error::last_os_error())
        })
    }
}

impl AsFd for FdChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl ByteSink for FdChannel {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        self.check_cancelled()?;
        let is_guest = |chunk: &Chunk<'_>| matches!(chunk, Chunk::Guest(_));
        if self.uncopied.is_none() || !chunks.iter().any(is_guest) {
            return self.write_gathered(chunks, 0);
        }
        // Our own bytes are copied: their buffer is used again at once.
        let lends = matches!(self.uncopied, Some(Uncopied::Lent(_)));
        let stays = |chunk: &Chunk<'_>| is_guest(chunk) || (lends && is_lendable(chunk));
        let mut parts = chunks.chunk_by(|a, b| stays(a) == stays(b)).peekable();
        while let Some(part) = parts.next() {
            let more = if parts.peek().is_some() {
                libc::MSG_MORE
            } else {
                0
            };
            match (&self.uncopied, part.iter().any(is_guest)) {
                (Some(Uncopied::Lent(_)), true) => self.lend(part, more != 0)?,
                (Some(Uncopied::Pinned(_)), true) => {
                    self.write_gathered(part, more | libc::MSG_ZEROCOPY)?;
                }
                _ => self.write_gathered(part, more)?,
            }
        }
        Ok(())
    }

    fn taken(&self) -> Option<u64> {
        // What is lent leaves by another way.
        (!matches!(self.uncopied, Some(Uncopied::Lent(_)))).then_some(self.taken)
    }

    fn enable_zero_copy(&mut self) -> io::Result<()> {
        self.uncopied = Some(Uncopied::Pinned(ZeroCopy::enable(self.fd.as_fd())?));
        Ok(())
    }

    fn lend_to_local_peer(&mut self, lending: Lending) -> bool {
        // Whatever stands against it, copying is left.
        match Lender::new(self.fd.as_fd(), lending) {
            Ok(Some(lender)) => self.uncopied = Some(Uncopied::Lent(lender)),
            Ok(None) | Err(_) => return false,
        }
        true
    }

    fn finish_zero_copy(&mut self) -> io::Result<u64> {
        let until = self.until(self.write_deadline);
        let cancel = self.cancel.as_ref();
        match &mut self.uncopied {
            Some(Uncopied::Pinned(zero_copy)) => zero_copy.finish(self.fd.as_fd(), until, cancel),
            Some(Uncopied::Lent(lender)) => {
                lender.finish(self.fd.as_fd(), until, cancel).map(|()| 0)
            }
            None => Ok(0),
        }
    }

    fn set_write_deadline(&mut self, deadline: Option<Instant>) {
        self.write_deadline = deadline;
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }
}

impl FdChannel {
    /// Writes all of it, with `flags` to a socket.
    fn write_gathered(&mut self, chunks: &[Chunk<'_>], flags: libc::c_int) -> io::Result<()> {
        // Without a deadline the limit counts from the last progress, with one it is absolute.
        for batch in chunks.chunks(MAX_IOVECS) {
            let mut iovecs = iovecs(batch);
            let mut rest = iovecs.as_mut_slice();
            skip(&mut rest, 0);
            while !rest.is_empty() {
                match self.writev(rest, flags) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        skip(&mut rest, n);
                        self.taken = self.taken.saturating_add(n as u64);
                        if let (Some(Uncopied::Pinned(zero_copy)), true) =
                            (&mut self.uncopied, flags & libc::MSG_ZEROCOPY != 0)
                        {
                            zero_copy.sent();
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        // Reports that nobody takes would end every wait at once.
                        if let Some(Uncopied::Pinned(zero_copy)) = &mut self.uncopied {
                            zero_copy.reap(self.fd.as_fd())?;
                        }
                        self.wait_for(libc::POLLOUT, self.write_deadline)?;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {
                        let until = self.until(self.write_deadline);
                        match &mut self.uncopied {
                            Some(Uncopied::Pinned(zero_copy)) => {
                                zero_copy.make_room(
                                    self.fd.as_fd(),
                                    until,
                                    self.cancel.as_ref(),
                                )?;
                            }
                            _ => return Err(e),
                        }
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    /// Lends the peer all of it, of lendable pieces; `more` will be written behind it.
    fn lend(&mut self, chunks: &[Chunk<'_>], more: bool) -> io::Result<()> {
        let mut batches = chunks.chunks(MAX_IOVECS).peekable();
        while let Some(batch) = batches.next() {
            let more = more || batches.peek().is_some();
            let Some(Uncopied::Lent(lender)) = &mut self.uncopied else {
                return Ok(());
            };
            let mut iovecs = lender.places(batch)?;
            let mut rest = iovecs.as_mut_slice();
            skip(&mut rest, 0);
            while let Some(Uncopied::Lent(lender)) = &mut self.uncopied
                && !(rest.is_empty() && lender.is_empty())
            {
                if lender.is_empty() {
                    let n = lender.take(rest)?;
                    skip(&mut rest, n);
                }
                match lender.pass(self.fd.as_fd(), more || !rest.is_empty()) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        self.wait_for(libc::POLLOUT, self.write_deadline)?;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    fn read_once(&self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        if guest.is_empty() {
            return self.readv(&[iovec(buf.as_mut_ptr(), buf.len())]);
        }
        let guest = &guest[..guest.len().min(MAX_IOVECS - 1)];
        let mut iovecs: Vec<libc::iovec> = guest
            .iter()
            .map(|g| iovec(g.ptr_guard_mut().as_ptr(), g.len()))
            .collect();
        iovecs.push(iovec(buf.as_mut_ptr(), buf.len()));
        self.readv(&iovecs)
    }
}

impl ByteSource for FdChannel {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() && guest.iter().all(|g| g.is_empty()) {
            return Ok(0);
        }
        self.check_cancelled()?;
        loop {
            match self.read_once(guest, buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // All that goes to guest memory was announced and has to come; what may come
                    // behind it may not.
                    self.wake_for(guest.iter().map(VolatileSlice::len).sum());
                    if let Err(late) = self.wait_for(libc::POLLIN, self.read_deadline) {
                        self.check_cancelled()?;
                        // A slow peer's bytes below the mark are progress all the same.
                        return match self.read_once(guest, buf) {
                            Ok(n) if n > 0 => Ok(n),
                            _ => Err(late),
                        };
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn was_shut(&self) -> bool {
        self.was_shut.load(Ordering::Acquire)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.read_once(&[], buf) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        self.wake_for(1);
        let mut fds = [
            pollfd(self.fd.as_raw_fd(), libc::POLLIN),
            pollfd(other.map_or(-1, |o| o.as_raw_fd()), libc::POLLIN),
            cancel_pollfd(self.cancel.as_ref()),
        ];
        let is_ready = self.poll_input(&mut fds, deadline)?;
        self.check_cancelled()?;
        if !is_ready {
            return Ok(Readiness::TimedOut);
        }
        // The other descriptor is how somebody asks for attention: it goes first.
        Ok(if fds[1].revents != 0 {
            Readiness::Other
        } else {
            Readiness::Channel
        })
    }

    fn confirm_when_it_suits(&mut self) {
        self.confirms_early = false;
    }

    fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        self.read_deadline = deadline;
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }
}

/// Our mappings are plain memory: a guard only hands out the pointer, and the slice borrowed by the
/// chunk is what keeps the memory mapped.
pub(super) fn iovecs(chunks: &[Chunk<'_>]) -> Vec<libc::iovec> {
    let of_chunk = |chunk: &Chunk<'_>| match chunk {
        Chunk::Bytes(b) => iovec(b.as_ptr(), b.len()),
        Chunk::Guest(g) => iovec(g.ptr_guard().as_ptr(), g.len()),
    };
    chunks.iter().map(of_chunk).collect()
}

pub(super) fn iovec(ptr: *const u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: ptr.cast_mut().cast(),
        iov_len: len,
    }
}

/// Drops `n` written bytes, and pieces that are or became empty, from the front.
fn skip(rest: &mut &mut [libc::iovec], mut n: usize) {
    while let [first, ..] = &mut **rest {
        if first.iov_len > n {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(n).cast();
            first.iov_len -= n;
            return;
        }
        n -= first.iov_len;
        *rest = &mut std::mem::take(rest)[1..];
    }
}

/// The length of an iovec array, at most [`MAX_IOVECS`], or a mark, at most [`LOW_WATER`].
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
const fn c_int_len(len: usize) -> libc::c_int {
    len as libc::c_int
}

pub(super) const fn pollfd(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Wakes a wait when the token is cancelled.
pub(super) fn cancel_pollfd(token: Option<&CancelToken>) -> libc::pollfd {
    pollfd(
        token.map_or(-1, |token| token.as_fd().as_raw_fd()),
        libc::POLLIN,
    )
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// Waits for one of `fds`; false when the deadline passed first.
pub(super) fn poll(fds: &mut [libc::pollfd], deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|d| timespec(d.saturating_duration_since(Instant::now())));
        let timeout = left.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: `fds` is an array of `fds.len()` pollfd that lives for the call, as does the time,
        // if there is one; no signal mask is given.
        let n = unsafe {
            libc::ppoll(
                fds.as_mut_ptr(),
                fds.len() as libc::nfds_t,
                timeout,
                std::ptr::null(),
            )
        };
        match n {
            0 if deadline.is_some_and(|d| Instant::now() < d) => {}
            0 => return Ok(false),
            n if n > 0 => return Ok(true),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
