//! Files: read and written at any position, by several threads at once.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::{ByteSink, ByteSource, Chunk, Readiness};

/// A file of which any part can be read and written, through `&self`: no call moves a position that
/// another depends on. Implemented for [`std::fs::File`] with the feature `fd`.
///
/// There are no deadlines: the kernel has none for files.
pub trait PositionedFile: Send + Sync {
    /// Reads into `buf` what is at byte `offset`; 0 only at the end of the file or for an empty
    /// `buf`.
    ///
    /// # Errors
    /// The file's.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `bytes` at byte `offset`.
    ///
    /// # Errors
    /// The file's.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Fills `guest` from byte `offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where the file ends before; the file's.
    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()>;

    /// Writes all of `guest` at byte `offset`.
    ///
    /// # Errors
    /// The file's.
    fn write_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()>;

    /// Length of the file, bytes.
    ///
    /// # Errors
    /// The file's.
    fn size(&self) -> io::Result<u64>;
}

impl<T: PositionedFile + ?Sized> PositionedFile for Arc<T> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, bytes)
    }
    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        (**self).read_guest(offset, guest)
    }
    fn write_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        (**self).write_guest(offset, guest)
    }
    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }
}

/// A file as a channel, one direction at a time, from a position on. Deadlines mean nothing to it.
pub struct FileChannel {
    file: Arc<dyn PositionedFile>,
    position: u64,
}

impl FileChannel {
    /// A channel whose first byte is byte `position` of the file.
    #[must_use]
    pub fn new(file: Arc<dyn PositionedFile>, position: u64) -> Self {
        Self { file, position }
    }

    fn advance(&mut self, n: usize) -> io::Result<()> {
        let end = self.position.checked_add(n as u64);
        self.position = end.ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(())
    }
}

impl std::fmt::Debug for FileChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileChannel")
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

impl ByteSink for FileChannel {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        for chunk in chunks.iter().filter(|c| !c.is_empty()) {
            match chunk {
                Chunk::Bytes(bytes) => self.file.write_at(self.position, bytes)?,
                Chunk::Guest(guest) => self.file.write_guest(self.position, guest)?,
            }
            self.advance(chunk.len())?;
        }
        Ok(())
    }

    fn set_write_deadline(&mut self, _deadline: Option<Instant>) {}

    fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.position = offset;
        Ok(())
    }

    fn is_file(&self) -> bool {
        true
    }
}

impl ByteSource for FileChannel {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        for slice in guest.iter().filter(|s| !s.is_empty()) {
            self.file.read_guest(self.position, slice)?;
            self.advance(slice.len())?;
            done += slice.len();
        }
        let n = self.file.read_at(self.position, buf)?;
        self.advance(n)?;
        Ok(done + n)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.read_scatter(&[], buf).map(Some)
    }

    fn wait(
        &mut self,
        _other: Option<BorrowedFd<'_>>,
        _deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        Ok(Readiness::Channel)
    }

    fn set_read_deadline(&mut self, _deadline: Option<Instant>) {}

    fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.position = offset;
        Ok(())
    }
}
