//! A stream out of memory, and what takes it in.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use migration_stream::io::{ByteSource, PositionedFile, Readiness};
use migration_stream::precopy::{Loaded, Target, TargetConfig, TargetError};
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{ConfigurationRule, DecoderConfig, StreamReader, TailLimits};
use vm_memory::VolatileSlice;

use crate::Store;

/// Bytes as a file, and as a channel on which they come a few at a time.
#[derive(Clone, Debug)]
pub struct Bytes {
    bytes: Arc<[u8]>,
    at: usize,
    /// How many come at once.
    piece: usize,
    /// Length of the file, which ends with zeroes.
    len: u64,
}

impl Bytes {
    /// These bytes, `piece` at a time, at least one.
    #[must_use]
    pub fn new(bytes: &[u8], piece: usize) -> Self {
        Self {
            bytes: bytes.into(),
            at: 0,
            piece: piece.max(1),
            len: bytes.len() as u64,
        }
    }

    /// As a file, `len` bytes long: behind the bytes there are zeroes.
    #[must_use]
    pub fn sparse(self, len: u64) -> Self {
        Self { len, ..self }
    }

    fn from(&self, offset: u64) -> &[u8] {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        self.bytes.get(start..).unwrap_or_default()
    }
}

impl ByteSource for Bytes {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        let mut rest = self.bytes.get(self.at..).unwrap_or_default();
        rest = rest.get(..self.piece).unwrap_or(rest);
        let mut read = 0;
        for slice in guest {
            let n = slice.len().min(rest.len());
            slice.copy_from(&rest[..n]);
            rest = &rest[n..];
            read += n;
        }
        let n = buf.len().min(rest.len());
        buf[..n].copy_from_slice(&rest[..n]);
        read += n;
        self.at += read;
        Ok(read)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.read_scatter(&[], buf).map(Some)
    }

    fn wait(&mut self, _: Option<BorrowedFd<'_>>, _: Option<Instant>) -> io::Result<Readiness> {
        Ok(Readiness::Channel)
    }

    fn set_read_deadline(&mut self, _: Option<Instant>) {}

    fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.at = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(())
    }
}

impl PositionedFile for Bytes {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = self.len.saturating_sub(offset);
        let n = buf
            .len()
            .min(usize::try_from(rest).unwrap_or(usize::MAX))
            .min(self.piece);
        let bytes = self.from(offset);
        let there = n.min(bytes.len());
        buf[..there].copy_from_slice(&bytes[..there]);
        buf[there..n].fill(0);
        Ok(n)
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        let end = offset.checked_add(guest.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let bytes = self.from(offset);
        guest.copy_from(&bytes[..bytes.len().min(guest.len())]);
        Ok(())
    }

    fn write_guest(&self, _: u64, _: &VolatileSlice<'_>) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }
}

/// Takes a stream in as a target does that learns the guest's memory from it.
///
/// # Errors
/// Whatever is wrong with it.
pub fn load(
    reader: StreamReader,
    barrier: &mut dyn PageBarrier,
    xbzrle: bool,
) -> Result<Option<Loaded>, TargetError> {
    let config = TargetConfig::new(DecoderConfig::new(ConfigurationRule::Any).xbzrle(xbzrle))
        .max_devices(1 << 20);
    let (target, blocks) = Target::from_announcement(config, reader, None)?;
    let Some(store) = Store::new(blocks) else {
        return Ok(None);
    };
    let (loaded, _) =
        target
            .keeping_dirty_bitmaps()
            .load_opaque(&store, barrier, TailLimits::default())?;
    Ok(Some(loaded))
}
