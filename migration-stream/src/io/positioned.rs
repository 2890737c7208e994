//! [`PositionedFile`] for the standard library's files.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::PositionedFile;
use super::sys;
use super::sys::signal::without_failure_signals;

/// Opens a file whose reads and writes do not go through the page cache (`O_DIRECT`, QEMU's parameter
/// `direct-io`). Only whole pages at page boundaries can be read and written: the pages of a file with
/// `mapped-ram`, but neither its stream nor its bitmaps.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where the file system has no such files; those of opening it.
pub fn open_direct(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)
        .map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::INVAL) => io::Error::new(
                io::ErrorKind::Unsupported,
                "the file system has no direct I/O",
            ),
            _ => e,
        })
}

impl PositionedFile for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        retry(|| FileExt::read_at(self, buf, offset))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        without_failure_signals(|| self.write_all_at(bytes, offset))
    }

    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        whole(guest, offset, |rest, at| {
            match sys::read_at(self, rest, at)? {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                n => Ok(n),
            }
        })
    }

    fn write_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        let write = |rest: &VolatileSlice<'_>, at| match sys::write_at(self, rest, at)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            n => Ok(n),
        };
        without_failure_signals(|| whole(guest, offset, write))
    }

    fn size(&self) -> io::Result<u64> {
        let metadata = self.metadata()?;
        if metadata.is_file() {
            return Ok(metadata.len());
        }
        // A block device has its length only as a position. Nobody depends on the position.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }
}

/// Calls `part` until it has moved all of `guest`.
fn whole(
    guest: &VolatileSlice<'_>,
    offset: u64,
    part: impl Fn(&VolatileSlice<'_>, i64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < guest.len() {
        let rest = guest.offset(done).map_err(io::Error::other)?;
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| i64::try_from(at).ok())
            .ok_or(io::ErrorKind::FileTooLarge)?;
        done += retry(|| part(&rest, at))?;
    }
    Ok(())
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
