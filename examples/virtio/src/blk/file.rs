//! A disk in a file or on a block device, one request at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::{FallocateFlags, fallocate};

use super::backend::{ALIGNMENT, Buffer, Geometry, Operation, SECTOR};

/// Bytes of zeroes that are written at a time where a disk cannot make them by itself.
const ZERO_PIECE: usize = 1 << 20;

/// How a disk is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// The guest cannot write it.
    pub read_only: bool,
    /// The host's page cache is not used (`O_DIRECT`).
    pub direct: bool,
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The host refused.
    #[error("cannot open disk '{}'", path.escape_debug())]
    Open {
        /// Its path.
        path: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("disk '{}' is neither a file nor a block device", path.escape_debug())]
    Kind {
        /// Its path.
        path: String,
    },
    /// Its length does not suit direct I/O.
    #[error("disk '{}' is {length} bytes long: direct i/o needs a multiple of {ALIGNMENT}", path.escape_debug())]
    Length {
        /// Its path.
        path: String,
        /// Its length, bytes.
        length: u64,
    },
}

/// An open disk. All methods may be called by several threads at once.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    geometry: Geometry,
    direct: bool,
    /// Held for writing by a direct write that reads, changes and writes whole blocks: no other may
    /// change one of them meanwhile.
    blocks: RwLock<()>,
}

impl DiskFile {
    /// Opens the file or block device at `path`.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let name = || PathBuf::from(path).to_string_lossy().into_owned();
        let failed = |source| DiskError::Open {
            path: name(),
            source,
        };
        let mut open = OpenOptions::new();
        open.read(true).write(!options.read_only);
        if options.direct {
            open.custom_flags(libc::O_DIRECT);
        }
        let mut file = open.open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path: name() });
        }
        // The length of a block device is not in its metadata.
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if options.direct && !length.is_multiple_of(ALIGNMENT as u64) {
            return Err(DiskError::Length {
                path: name(),
                length,
            });
        }
        Ok(Self {
            file,
            geometry: Geometry {
                length: length - length % SECTOR,
                read_only: options.read_only,
                physical_block: 4096,
            },
            direct: options.direct,
            blocks: RwLock::new(()),
        })
    }

    /// Returns what the disk is like.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    #[cfg_attr(not(feature = "io-uring"), allow(dead_code))]
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Returns whether a range can be read and written as it is.
    #[must_use]
    pub fn is_aligned(&self, offset: u64, len: usize) -> bool {
        !self.direct || offset.is_multiple_of(ALIGNMENT as u64) && len.is_multiple_of(ALIGNMENT)
    }

    /// Does a request, and returns its result and the buffer of a read.
    pub fn perform(&self, operation: Operation) -> (io::Result<()>, Option<Buffer>) {
        match operation {
            Operation::Read { offset, mut buffer } => {
                let result = self.read(offset, &mut buffer);
                (result, Some(buffer))
            }
            Operation::Write { offset, data, fua } => {
                let written = self.write(offset, &data);
                (written.and_then(|()| self.flush_if(fua)), None)
            }
            Operation::Flush => (self.flush_if(true), None),
            Operation::Discard { offset, len } => (self.discard(offset, len), None),
            Operation::Zero {
                offset,
                len,
                unmap,
                fua,
            } => {
                let zeroed = self.zero(offset, len, unmap);
                (zeroed.and_then(|()| self.flush_if(fua)), None)
            }
        }
    }

    fn flush_if(&self, wanted: bool) -> io::Result<()> {
        if wanted {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }

    fn read(&self, offset: u64, buffer: &mut Buffer) -> io::Result<()> {
        if self.is_aligned(offset, buffer.len()) {
            return self.file.read_exact_at(buffer.bytes_mut(), offset);
        }
        let (start, mut whole) = around(offset, buffer.len());
        self.file.read_exact_at(whole.bytes_mut(), start)?;
        // Less than a block.
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let len = buffer.len();
        buffer
            .bytes_mut()
            .copy_from_slice(&whole.bytes()[skip..skip + len]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &Buffer) -> io::Result<()> {
        if self.is_aligned(offset, data.len()) {
            let _others = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            return self.file.write_all_at(data.bytes(), offset);
        }
        let _alone = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        let (start, mut whole) = around(offset, data.len());
        self.file.read_exact_at(whole.bytes_mut(), start)?;
        let skip = usize::try_from(offset - start).unwrap_or(0);
        whole.bytes_mut()[skip..skip + data.len()].copy_from_slice(data.bytes());
        self.file.write_all_at(whole.bytes(), start)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _others = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, punch, offset, len) {
            // A discard is a hint.
            Err(error) if unsupported(error) => Ok(()),
            result => Ok(result?),
        }
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        let done = {
            let _others = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
            fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, len)
        };
        match done {
            Err(error) if unsupported(error) => self.write_zeroes(offset, len),
            result => Ok(result?),
        }
    }

    fn write_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            // Pieces after the first begin at a block.
            let to_block = ZERO_PIECE as u64 - offset % ALIGNMENT as u64;
            let piece = len.min(to_block);
            let zeroes = Buffer::new(usize::try_from(piece).unwrap_or(ZERO_PIECE));
            self.write(offset, &zeroes)?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

fn unsupported(error: rustix::io::Errno) -> bool {
    // A block device that cannot says EINVAL where the file systems say EOPNOTSUPP.
    use rustix::io::Errno;
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
}

/// The whole blocks around a range: where they begin, and memory for them. They lie in the disk,
/// whose length is a multiple of a block.
fn around(offset: u64, len: usize) -> (u64, Buffer) {
    let block = ALIGNMENT as u64;
    let start = offset - offset % block;
    let head = usize::try_from(offset - start).unwrap_or(0);
    (start, Buffer::new((head + len).next_multiple_of(ALIGNMENT)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn disk(options: DiskOptions) -> (tempfile::NamedTempFile, DiskFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        let disk = DiskFile::open(file.path(), options).unwrap();
        (file, disk)
    }

    fn write(disk: &DiskFile, offset: u64, bytes: &[u8]) {
        let mut data = Buffer::new(bytes.len());
        data.bytes_mut().copy_from_slice(bytes);
        let data = Arc::new(data);
        let fua = true;
        let (result, _) = disk.perform(Operation::Write { offset, data, fua });
        result.unwrap();
    }

    fn read(disk: &DiskFile, offset: u64, len: usize) -> Vec<u8> {
        let buffer = Buffer::new(len);
        let (result, buffer) = disk.perform(Operation::Read { offset, buffer });
        result.unwrap();
        buffer.unwrap().bytes().to_vec()
    }

    #[test]
    fn a_direct_disk_takes_sectors_that_are_no_whole_blocks() {
        let direct = DiskOptions {
            direct: true,
            ..DiskOptions::default()
        };
        let (_file, disk) = disk(direct);
        write(&disk, 0, &[1; 8192]);
        write(&disk, 3584, &[2; 1024]);
        assert_eq!(read(&disk, 3072, 512), [1; 512]);
        assert_eq!(read(&disk, 3584, 1024), [2; 1024]);
        assert_eq!(read(&disk, 4608, 512), [1; 512]);
        // The last sector of the disk.
        write(&disk, 65024, &[3; 512]);
        assert_eq!(read(&disk, 65024, 512), [3; 512]);
    }

    #[test]
    fn many_threads_change_sectors_of_one_block_of_a_direct_disk_and_none_is_lost() {
        let direct = DiskOptions {
            direct: true,
            ..DiskOptions::default()
        };
        let (_file, disk) = disk(direct);
        std::thread::scope(|scope| {
            for sector in 0..8u8 {
                let disk = &disk;
                scope.spawn(move || {
                    for round in 1..=20u8 {
                        write(disk, u64::from(sector) * SECTOR, &[round ^ sector; 512]);
                    }
                });
            }
        });
        for sector in 0..8u8 {
            assert_eq!(
                read(&disk, u64::from(sector) * SECTOR, 512),
                [20 ^ sector; 512]
            );
        }
    }

    #[test]
    fn zeroed_ranges_read_as_zeroes_also_where_they_are_written() {
        let (_file, disk) = disk(DiskOptions::default());
        write(&disk, 0, &[7; 16384]);
        for (offset, unmap) in [(512, true), (4096, false)] {
            let len = 1024;
            let fua = false;
            let zero = Operation::Zero {
                offset,
                len,
                unmap,
                fua,
            };
            disk.perform(zero).0.unwrap();
            assert_eq!(read(&disk, offset, 1024), [0; 1024]);
        }
        disk.write_zeroes(8192 + 512, 2048).unwrap();
        assert_eq!(read(&disk, 8192 + 512, 2048), [0; 2048]);
        assert_eq!(read(&disk, 8192, 512), [7; 512]);
        assert_eq!(read(&disk, 8192 + 512 + 2048, 512), [7; 512]);
    }

    #[test]
    fn a_read_beyond_a_file_that_was_cut_fails() {
        let (file, disk) = disk(DiskOptions::default());
        file.as_file().set_len(4096).unwrap();
        let buffer = Buffer::new(512);
        let offset = 8192;
        let (result, _) = disk.perform(Operation::Read { offset, buffer });
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let read_only = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        for path in ["/dev/null", "/"] {
            let error = DiskFile::open(Path::new(path), read_only).unwrap_err();
            assert!(matches!(error, DiskError::Kind { .. }), "{error}");
        }
        let nothing = DiskFile::open(Path::new("/nothing\n"), read_only).unwrap_err();
        assert_eq!(nothing.to_string(), r"cannot open disk '/nothing\n'");
    }

    #[test]
    fn a_direct_disk_is_whole_blocks_long() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096 + 512).unwrap();
        let direct = DiskOptions {
            direct: true,
            ..DiskOptions::default()
        };
        assert!(matches!(
            DiskFile::open(file.path(), direct),
            Err(DiskError::Length { length: 4608, .. })
        ));
        let buffered = DiskFile::open(file.path(), DiskOptions::default()).unwrap();
        assert_eq!(buffered.geometry().length, 4608);
    }
}
