//! A stream in a file, in a pipe or on standard input, from its first byte on.
//!
//! An image that libvirt saved (`virsh save`) is passed over up to the stream in it. A file that can be
//! sought in is read by position; anything else (a FIFO, a pipe on standard input, `/dev/fd/3`) is read
//! from front to back, which is enough for any stream but one with `mapped-ram`.

use std::fs::File;
use std::io::{self, IsTerminal, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migration_stream::io::FdChannel;
use migration_stream::raw::codec::Reader;
use migration_stream::raw::container::{ContainerError, LibvirtHeader};
use migration_stream::{DecodeError, Escaped, StreamReader};

/// The name of standard input.
pub const STANDARD_INPUT: &str = "-";

/// An opened input.
#[derive(Debug)]
pub enum Input {
    /// A file or block device: any part of it can be read.
    File {
        /// The file.
        file: Arc<File>,
        /// Where the stream, or the image with the stream, begins.
        offset: u64,
    },
    /// A pipe or a character device: it can be read once, from front to back.
    Pipe {
        /// Its reading end.
        channel: FdChannel,
        /// How much is passed over before the stream, or the image, begins.
        offset: u64,
    },
}

impl Input {
    /// Opens `path`, or standard input if that is [`STANDARD_INPUT`]. The stream begins at byte `offset`.
    /// A pipe's writer may be silent for `timeout`. Opening a FIFO waits for a writer.
    ///
    /// # Errors
    /// It cannot be opened, or it is a terminal or a directory.
    pub fn open(path: &Path, offset: u64, timeout: Duration) -> Result<Self, InputError> {
        let failed = |source| InputError::Open {
            path: path.into(),
            source,
        };
        let is_standard = path.as_os_str() == STANDARD_INPUT;
        let mut file = if is_standard {
            let stdin = io::stdin();
            File::from(stdin.as_fd().try_clone_to_owned().map_err(failed)?)
        } else {
            File::open(path).map_err(failed)?
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if file.is_terminal() {
            return Err(InputError::Terminal { path: path.into() });
        }
        if kind.is_dir() {
            return Err(InputError::Directory { path: path.into() });
        }
        if kind.is_file() || kind.is_block_device() {
            // Standard input may have been read by others before.
            let begin = if is_standard {
                file.stream_position().map_err(failed)?
            } else {
                0
            };
            return Ok(Self::File {
                file: Arc::new(file),
                offset: begin.saturating_add(offset),
            });
        }
        Ok(Self::Pipe {
            channel: FdChannel::new(file, timeout).map_err(failed)?,
            offset,
        })
    }
}

/// Moves `reader`, which is at the beginning of an input or `offset` bytes before it, to the stream: over
/// the `offset` bytes and over the header of a libvirt image. Returns that header.
///
/// # Errors
/// The image is not finished, not known or compressed; the input breaks off or cannot be read.
pub fn find_stream(
    reader: &mut StreamReader,
    offset: u64,
) -> Result<Option<LibvirtHeader>, InputError> {
    pass(reader, offset)?;
    loop {
        match LibvirtHeader::is_next(reader.buffered()) {
            Some(false) => return Ok(None),
            Some(true) if reader.buffered().len() >= LibvirtHeader::LEN => break,
            Some(true) | None => match fill(reader) {
                // Whoever decodes it says what is wrong with so short a stream.
                Err(InputError::Read { source, .. })
                    if source.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    return Ok(None);
                }
                other => other?,
            },
        }
    }
    let header = LibvirtHeader::decode(&mut Reader::new(reader.buffered(), reader.offset()))?;
    pass(reader, header.stream_offset()?)?;
    Ok(Some(header))
}

fn pass(reader: &mut StreamReader, count: u64) -> Result<(), InputError> {
    let end = reader.offset().saturating_add(count);
    loop {
        let left = end.saturating_sub(reader.offset());
        let here = reader.buffered().len();
        reader.consume(usize::try_from(left).map_or(here, |left| left.min(here)));
        if reader.offset() >= end {
            return Ok(());
        }
        fill(reader)?;
    }
}

fn fill(reader: &mut StreamReader) -> Result<(), InputError> {
    let offset = reader.offset();
    reader
        .fill(64 << 10)
        .map_err(|source| InputError::Read { offset, source })
}

/// Why there is no stream to read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// The file system's.
    #[error("opening {}", Escaped(&.path.to_string_lossy()))]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody types a stream.
    #[error("{} is a terminal: expected a file or a pipe", Escaped(&.path.to_string_lossy()))]
    Terminal {
        /// The path.
        path: PathBuf,
    },
    /// A directory.
    #[error("{} is a directory: expected a file or a pipe", Escaped(&.path.to_string_lossy()))]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// It breaks off, or cannot be read.
    #[error("reading byte {offset:#x} of the input")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The image is damaged or unknown.
    #[error(transparent)]
    Image(#[from] DecodeError),
    /// The stream in the image cannot be read as it is.
    #[error(transparent)]
    Container(#[from] ContainerError),
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn image(format: u8) -> Vec<u8> {
        let mut image = b"LibvirtQemudSave\x02\0\0\0\0\x10\0\0\x01\0\0\0".to_vec();
        image.extend([format, 0, 0, 0]);
        image.resize(92 + 0x1000, 0);
        image.extend_from_slice(b"QEVM\0\0\0\x03");
        image
    }

    fn reader(bytes: &[u8]) -> StreamReader {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(bytes).unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        StreamReader::new(FdChannel::new(file, Duration::from_secs(10)).unwrap(), b"")
    }

    #[test]
    fn a_stream_is_found_behind_an_offset_and_in_a_libvirt_image() {
        let bytes = [b"garbage".as_slice(), &image(0)].concat();
        let mut stream = reader(&bytes);
        let header = find_stream(&mut stream, 7).unwrap().unwrap();
        assert_eq!(header.data_len, 0x1000);
        while stream.buffered().len() < 8 {
            stream.fill(100).unwrap();
        }
        assert_eq!(stream.buffered(), b"QEVM\0\0\0\x03");
        assert_eq!(stream.offset(), 7 + 92 + 0x1000);

        let mut plain = reader(b"QEVM\0\0\0\x03");
        assert_eq!(find_stream(&mut plain, 0).unwrap(), None);
        assert_eq!(plain.offset(), 0);
        assert_eq!(find_stream(&mut reader(b"Lib"), 0).unwrap(), None);
    }

    #[test]
    fn a_compressed_image_and_a_short_input_are_refused() {
        let error = find_stream(&mut reader(&image(1)), 0).unwrap_err();
        assert!(error.to_string().contains("gzip -dc"), "{error}");
        let error = find_stream(&mut reader(b"QEVM"), 5).unwrap_err();
        assert!(
            matches!(error, InputError::Read { offset: 4, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_directory_is_no_input() {
        let dir = tempfile::tempdir().unwrap();
        let error = Input::open(dir.path(), 0, Duration::ZERO).unwrap_err();
        assert!(matches!(error, InputError::Directory { .. }), "{error}");
    }
}
