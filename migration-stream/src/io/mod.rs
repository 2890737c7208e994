//! Channels: how bytes and pages get in and out, as two small traits, and their implementation
//! over a file descriptor.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use vm_memory::VolatileSlice;

mod cancel;
mod deadline;
#[cfg(feature = "fd")]
mod fd;
mod file;
#[cfg(feature = "fd")]
mod lent;
#[cfg(feature = "fd")]
mod local_peer;
#[cfg(feature = "fd")]
mod positioned;
#[cfg(feature = "fd")]
mod signal;
#[cfg(feature = "fd")]
mod socket;
#[cfg(feature = "fd")]
mod zero_copy;
pub use cancel::{CancelToken, is_cancelled};
pub use deadline::{deadline_after, deadline_from};
#[cfg(feature = "fd")]
pub use fd::FdChannel;
pub use file::{FileChannel, PositionedFile};
#[cfg(feature = "fd")]
pub use positioned::open_direct;
#[cfg(feature = "fd")]
pub use signal::without_write_signals;

/// What became ready in [`ByteSource::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The channel has bytes, or has ended.
    Channel,
    /// The other descriptor has.
    Other,
    /// The deadline passed.
    TimedOut,
}

/// A piece of an outgoing gather write.
#[derive(Clone, Copy, Debug)]
pub enum Chunk<'a> {
    /// Our own bytes (headers, device state).
    Bytes(&'a [u8]),
    /// Guest memory, which may change while it is being sent.
    Guest(VolatileSlice<'a>),
}

impl Chunk<'_> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(b) => b.len(),
            Self::Guest(g) => g.len(),
        }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Over which connections to a peer on the same host guest memory is lent to it (splice sending): the connection
/// refers to the pages, and the peer copies them once. By default pages are copied, into the connection and out
/// of it.
///
/// Lending is safe only where the process at the other end of the connection reads the bytes. The sender knows
/// when they have been taken out of the connection, and takes them to be copied then. A proxy that moves them by
/// `splice(2)` (systemd-socket-proxyd, haproxy) still refers to the pages afterwards: the receiver gets whatever
/// the guest has written to them since, and a checkpoint is torn. So switch it on only where the connection goes
/// straight to a receiver that is known to read, such as this workspace's programs or QEMU.
///
/// A filter of system calls has to allow `pipe2`, `vmsplice` and `splice` for it, and over TCP a socket of
/// `AF_NETLINK`; where the system refuses one, pages are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lending {
    /// Over none: pages are copied, and the peer need not read for a synchronisation to end.
    #[default]
    Never,
    /// Over unix sockets.
    UnixSockets,
    /// Over TCP within one network namespace too. It takes work off the sender and gives it to
    /// the peer: good for one channel or where the sender is waited for, as in a COLO checkpoint, and not
    /// for several channels that have all processors busy between them, where TCP's own work is most.
    UnixSocketsAndTcp,
}

/// The outgoing direction of a channel.
pub trait ByteSink: Send {
    /// Writes all chunks in order, as one gather write where the transport can.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when the deadline passes; whatever the transport reports.
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()>;

    /// No write may take longer than until `deadline`; `None`: the transport's own limit.
    fn set_write_deadline(&mut self, deadline: Option<Instant>);

    /// Lets `token` end every write that waits, of this handle. A sink whose writes never wait need not listen.
    fn set_cancel(&mut self, token: &CancelToken) {
        let _ = token;
    }

    /// What is written next goes to byte `offset` of the file that this is.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: it is no file.
    fn seek(&mut self, offset: u64) -> io::Result<()> {
        let _ = offset;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Returns whether this is a file, which no peer reads while it is written.
    fn is_file(&self) -> bool {
        false
    }

    /// Returns how many bytes have been handed on towards the peer so far, `None` where that is not known. After a
    /// write that failed it says whether any of it may have left.
    fn taken(&self) -> Option<u64> {
        None
    }

    /// Lets the kernel read guest memory when it transmits it, instead of copying it before
    /// [`ByteSink::write_all`] returns. What is sent is what the memory holds then.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: the transport cannot.
    fn enable_zero_copy(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Lends guest memory to a peer on the same host instead of copying it, where `lending` has it, the
    /// transport can, and the peer is seen to be there; whether it does. What is sent is what the memory
    /// holds when the peer takes it, at the latest before [`ByteSink::finish_zero_copy`] returns.
    fn lend_to_local_peer(&mut self, lending: Lending) -> bool {
        let _ = lending;
        false
    }

    /// Waits until neither the kernel nor a local peer reads guest memory any more, and returns how
    /// many of the sends since the last call the kernel copied after all.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when the deadline passes; whatever the transport reports.
    fn finish_zero_copy(&mut self) -> io::Result<u64> {
        Ok(0)
    }
}

/// The incoming direction of a channel.
pub trait ByteSource: Send {
    /// Reads at least one byte into `guest` first and then into `buf` (a scatter read), and returns
    /// how many bytes in all; 0 only at the end of the stream or when both are empty.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when the deadline passes; whatever the transport reports.
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize>;

    /// Returns whether this side has ended the receiving direction. An end of the stream then says nothing
    /// of the peer.
    fn was_shut(&self) -> bool {
        false
    }

    /// What is there now, without waiting: `None` when nothing is.
    ///
    /// # Errors
    /// Whatever the transport reports.
    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>>;

    /// Waits until the channel can be read or has ended, `other` can be read, or `deadline` passes
    /// (never, when there is none). It reads nothing.
    ///
    /// # Errors
    /// Whatever the transport reports.
    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness>;

    /// No read may wait longer than until `deadline`; `None`: the transport's own limit.
    fn set_read_deadline(&mut self, deadline: Option<Instant>);

    /// Lets `token` end every read that waits, of this handle. A source whose reads never wait need not listen.
    fn set_cancel(&mut self, token: &CancelToken) {
        let _ = token;
    }

    /// The peer never waits for confirmations before it sends on (it has `TCP_NODELAY`): none need be
    /// hastened, which costs a timer for every wait.
    fn confirm_when_it_suits(&mut self) {}

    /// What is read next comes from byte `offset` of the file that this is.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: it is no file.
    fn seek(&mut self, offset: u64) -> io::Result<()> {
        let _ = offset;
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the stream goes on elsewhere in a file (mapped-ram), but it comes from a connection or a \
             pipe; the file itself has to be read",
        ))
    }

    /// As [`ByteSource::read_scatter`] into plain bytes only.
    ///
    /// # Errors
    /// As there.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read_scatter(&[], buf)
    }
}

impl<T: ByteSink + ?Sized> ByteSink for Box<T> {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        (**self).write_all(chunks)
    }
    fn set_write_deadline(&mut self, deadline: Option<Instant>) {
        (**self).set_write_deadline(deadline);
    }
    fn set_cancel(&mut self, token: &CancelToken) {
        (**self).set_cancel(token);
    }
    fn seek(&mut self, offset: u64) -> io::Result<()> {
        (**self).seek(offset)
    }
    fn is_file(&self) -> bool {
        (**self).is_file()
    }
    fn taken(&self) -> Option<u64> {
        (**self).taken()
    }
    fn enable_zero_copy(&mut self) -> io::Result<()> {
        (**self).enable_zero_copy()
    }
    fn lend_to_local_peer(&mut self, lending: Lending) -> bool {
        (**self).lend_to_local_peer(lending)
    }
    fn finish_zero_copy(&mut self) -> io::Result<u64> {
        (**self).finish_zero_copy()
    }
}

impl<T: ByteSource + ?Sized> ByteSource for Box<T> {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        (**self).read_scatter(guest, buf)
    }
    fn was_shut(&self) -> bool {
        (**self).was_shut()
    }
    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        (**self).try_read(buf)
    }
    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        (**self).wait(other, deadline)
    }
    fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        (**self).set_read_deadline(deadline);
    }
    fn set_cancel(&mut self, token: &CancelToken) {
        (**self).set_cancel(token);
    }
    fn confirm_when_it_suits(&mut self) {
        (**self).confirm_when_it_suits();
    }
    fn seek(&mut self, offset: u64) -> io::Result<()> {
        (**self).seek(offset)
    }
}
