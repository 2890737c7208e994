//! Channels: how bytes and pages get in and out, as two small traits, and their implementation
//! over a file descriptor.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use vm_memory::VolatileSlice;

mod cancel;
mod deadline;
#[cfg(feature = "fd")]
mod descriptor;
#[cfg(feature = "fd")]
mod fd;
mod file;
#[cfg(feature = "fd")]
mod positioned;
mod send_mode;
#[cfg(feature = "fd")]
mod sys;
#[cfg(feature = "fd")]
mod tuning;
pub use cancel::{CancelToken, is_cancelled};
pub use deadline::{deadline_after, deadline_from};
#[cfg(feature = "fd")]
pub use fd::FdChannel;
pub use file::{FileChannel, PositionedFile};
#[cfg(feature = "fd")]
pub use positioned::open_direct;
pub use send_mode::SendMode;
#[cfg(feature = "fd")]
pub use sys::signal::without_write_signals;

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

    /// Chooses how guest memory is sent, before the first write. Copies are sent until then.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: the transport cannot, and sends copies as before.
    fn set_send_mode(&mut self, mode: SendMode) -> io::Result<()> {
        match mode {
            SendMode::Copy => Ok(()),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Waits until neither the kernel nor the peer reads guest memory for what was written, and returns how many sends
    /// of [`SendMode::ZeroCopy`] since the last call the kernel copied after all.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when the deadline passes; whatever the transport reports.
    fn wait_until_released(&mut self) -> io::Result<u64> {
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

    /// Says whether received bytes are to be acknowledged soon when no more follow. A transport that can does so
    /// until told otherwise. It costs a timer for every wait, and saves nothing where the peer has `TCP_NODELAY`.
    fn set_quick_ack(&mut self, on: bool) {
        let _ = on;
    }

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
    fn set_send_mode(&mut self, mode: SendMode) -> io::Result<()> {
        (**self).set_send_mode(mode)
    }
    fn wait_until_released(&mut self) -> io::Result<u64> {
        (**self).wait_until_released()
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
    fn set_quick_ack(&mut self, on: bool) {
        (**self).set_quick_ack(on);
    }
    fn seek(&mut self, offset: u64) -> io::Result<()> {
        (**self).seek(offset)
    }
}
