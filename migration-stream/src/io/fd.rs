//! A channel over a file descriptor: socket, pipe or file, never blocking beyond its deadline.
//!
//! The descriptor is non-blocking; a call that cannot go on waits in `poll` until its deadline.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::net::{Shutdown, ipproto, shutdown, sockopt};
use vm_memory::VolatileSlice;

use super::descriptor::{Descriptor, Ready};
use super::sys;
use super::tuning::SocketTuning;
use super::{ByteSink, ByteSource, CancelToken, Chunk, Readiness, SendMode};

/// What Linux takes for the times of keep-alive, seconds.
const MOST_SECONDS: u64 = 32_767;

/// One direction, or both, of a connection. Handles made by [`FdChannel::share`] share the connection, not the
/// deadlines; one of them may send without copying. A [`CancelToken`] that a handle has goes on to those made
/// from it.
///
/// Over TCP what was received is acknowledged within 0.2 ms when nothing follows it; see
/// [`ByteSource::set_quick_ack`]. [`ByteSink::set_send_mode`] knows all of [`SendMode`].
#[derive(Debug)]
pub struct FdChannel {
    fd: Arc<OwnedFd>,
    is_socket: bool,
    limit: Duration,
    read_deadline: Option<Instant>,
    write_deadline: Option<Instant>,
    tuning: SocketTuning,
    /// Ends what this handle waits for.
    cancel: Option<CancelToken>,
    /// Bytes that the kernel has taken from this handle by copying.
    taken: u64,
    /// This side has ended the receiving direction; the connection's, so shared.
    was_shut: Arc<AtomicBool>,
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
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        keep_alive(fd.as_fd(), limit);
        Ok(Self {
            tuning: SocketTuning::new(fd.as_fd()),
            fd: Arc::new(fd),
            is_socket: kind == Ok(FileType::Socket),
            limit,
            read_deadline: None,
            write_deadline: None,
            cancel: None,
            taken: 0,
            was_shut: Arc::default(),
        })
    }

    /// Another handle on the same connection, for the other direction or for another thread. It sends copies.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            fd: Arc::clone(&self.fd),
            is_socket: self.is_socket,
            limit: self.limit,
            read_deadline: None,
            write_deadline: None,
            tuning: self.tuning.shared(),
            cancel: self.cancel.clone(),
            taken: 0,
            was_shut: Arc::clone(&self.was_shut),
        }
    }

    /// Ends both directions of a socket for every handle; blocked calls return at once. Calling it
    /// on anything but a connected socket does nothing.
    pub fn shutdown(&self) {
        self.was_shut.store(true, Ordering::Release);
        let _ = shutdown(&self.fd, Shutdown::Both);
    }

    /// Shuts the receiving direction: whoever reads gets the end of the stream, and the peer can still be
    /// told why nothing is taken any more.
    pub fn shutdown_reading(&self) {
        self.was_shut.store(true, Ordering::Release);
        let _ = shutdown(&self.fd, Shutdown::Read);
    }

    fn descriptor<'a>(
        fd: &'a OwnedFd,
        is_socket: bool,
        limit: Duration,
        deadline: Option<Instant>,
        cancel: Option<&'a CancelToken>,
    ) -> Descriptor<'a> {
        Descriptor {
            fd: fd.as_fd(),
            is_socket,
            limit,
            deadline,
            cancel,
        }
    }

    fn for_reading(&self) -> Descriptor<'_> {
        let (deadline, cancel) = (self.read_deadline, self.cancel.as_ref());
        Self::descriptor(&self.fd, self.is_socket, self.limit, deadline, cancel)
    }

    /// What writes need: the descriptor, its tuning, and the count of bytes taken.
    fn for_writing(&mut self) -> (Descriptor<'_>, &mut SocketTuning, &mut u64) {
        let (deadline, cancel) = (self.write_deadline, self.cancel.as_ref());
        (
            Self::descriptor(&self.fd, self.is_socket, self.limit, deadline, cancel),
            &mut self.tuning,
            &mut self.taken,
        )
    }
}

impl AsFd for FdChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl ByteSink for FdChannel {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        let (socket, tuning, taken) = self.for_writing();
        socket.check_cancelled()?;
        tuning.write_all(&socket, chunks, taken)
    }

    fn taken(&self) -> Option<u64> {
        self.tuning.counts_taken().then_some(self.taken)
    }

    fn set_send_mode(&mut self, mode: SendMode) -> io::Result<()> {
        let (socket, tuning, _) = self.for_writing();
        tuning.set_send_mode(&socket, mode)
    }

    fn wait_until_released(&mut self) -> io::Result<u64> {
        let (socket, tuning, _) = self.for_writing();
        tuning.wait_until_released(&socket)
    }

    fn set_write_deadline(&mut self, deadline: Option<Instant>) {
        self.write_deadline = deadline;
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }
}

impl ByteSource for FdChannel {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() && guest.iter().all(|g| g.is_empty()) {
            return Ok(0);
        }
        let socket = self.for_reading();
        socket.check_cancelled()?;
        loop {
            match sys::read_scatter(socket.fd, guest, buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let until = Some(socket.until());
                    if self.tuning.poll_input(&socket, None, until)? == Ready::TimedOut {
                        return Err(io::Error::new(
                            io::ErrorKind::TimedOut,
                            "the peer sent nothing before the deadline",
                        ));
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
        match sys::read_scatter(self.as_fd(), &[], buf) {
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
        let ready = self
            .tuning
            .poll_input(&self.for_reading(), other, deadline)?;
        Ok(match ready {
            Ready::This(_) => Readiness::Channel,
            Ready::Other => Readiness::Other,
            Ready::TimedOut => Readiness::TimedOut,
        })
    }

    fn set_quick_ack(&mut self, on: bool) {
        self.tuning.set_quick_ack(self.fd.as_fd(), on);
    }

    fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        self.read_deadline = deadline;
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }
}

/// Has TCP ask an idle peer's host whether the connection still is, so that a host which is gone is noticed within some
/// `limit`, also where a peer may be silent for longer. A connection that asks already, or is not TCP, is left as it is.
fn keep_alive(socket: BorrowedFd<'_>, limit: Duration) {
    if sockopt::socket_protocol(socket) != Ok(Some(ipproto::TCP))
        || sockopt::socket_keepalive(socket) != Ok(false)
    {
        return;
    }
    let part = |part: u64| Duration::from_secs((limit.as_secs() / part).clamp(1, MOST_SECONDS));
    // A system without an option asks at its own pace.
    let _ = sockopt::set_tcp_keepidle(socket, part(2));
    let _ = sockopt::set_tcp_keepintvl(socket, part(4));
    let _ = sockopt::set_tcp_keepcnt(socket, 2);
    let _ = sockopt::set_socket_keepalive(socket, true);
}

#[cfg(test)]
mod tests;
