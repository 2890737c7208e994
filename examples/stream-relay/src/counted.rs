//! Sources of bytes that are counted while they are read.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_stream::io::{ByteSource, CancelToken, PositionedFile, Readiness};
use vm_memory::VolatileSlice;

use crate::progress::Progress;

/// A channel or a file whose bytes count as incoming.
pub(crate) struct Counted<T> {
    inner: T,
    progress: Arc<Progress>,
}

impl<T> Counted<T> {
    pub(crate) const fn new(inner: T, progress: Arc<Progress>) -> Self {
        Self { inner, progress }
    }
}

impl<T: ByteSource> ByteSource for Counted<T> {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read_scatter(guest, buf)?;
        self.progress.incoming.add_bytes(n);
        Ok(n)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let n = self.inner.try_read(buf)?;
        self.progress.incoming.add_bytes(n.unwrap_or_default());
        Ok(n)
    }

    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        self.inner.wait(other, deadline)
    }

    fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        self.inner.set_read_deadline(deadline);
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.inner.set_cancel(token);
    }

    fn set_quick_ack(&mut self, on: bool) {
        self.inner.set_quick_ack(on);
    }

    fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.inner.seek(offset)
    }
}

impl<T: PositionedFile> PositionedFile for Counted<T> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read_at(offset, buf)?;
        self.progress.incoming.add_bytes(n);
        Ok(n)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, bytes)
    }

    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        self.inner.read_guest(offset, guest)?;
        self.progress.incoming.add_bytes(guest.len());
        Ok(())
    }

    fn write_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        self.inner.write_guest(offset, guest)
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }
}
