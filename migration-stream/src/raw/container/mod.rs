//! What a file is that does not begin as a stream does: compressed data, a disk image, or an image that
//! libvirt saved (`virsh save`), in which a stream begins behind a header.
//!
//! A libvirt image (`qemu_saveimage.h`, libvirt 11) begins with 92 bytes, in the byte order of its host:
//!
//! ```text
//! "LibvirtQemudSave"  u32 version  u32 length of the data  u32 was running  u32 format
//! u32 offset of the cookie  14 * u32 0
//! ```
//!
//! Then come the data (the domain's XML, padded) and the stream, compressed as `format` says.

mod error;
mod format;

pub use self::error::ContainerError;
use self::error::LIBVIRT_VERSION;
pub use self::format::Format;
pub(crate) use self::format::Recognised;

use crate::error::{Cause, DecodeError};
use crate::raw::codec::Reader;
use crate::raw::header;

const LIBVIRT_SAVED: &[u8; 16] = b"LibvirtQemudSave";
const LIBVIRT_PARTIAL: &[u8; 16] = b"LibvirtQemudPart";

/// How the stream in a libvirt image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LibvirtFormat {
    /// As it is.
    Raw,
    /// Compressed.
    Compressed(Format),
    /// With every page in its place (`mapped-ram`).
    Sparse,
}

/// The header of an image that libvirt saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LibvirtHeader {
    /// Length of what stands between header and stream, bytes.
    pub data_len: u32,
    /// Whether the guest was running when it was saved.
    pub was_running: bool,
    /// How the stream is stored.
    pub format: LibvirtFormat,
}

impl LibvirtHeader {
    /// Its length, bytes.
    pub const LEN: usize = 92;

    /// Whether a file that begins with these bytes is a libvirt image; `None` when they are too few
    /// to tell.
    #[must_use]
    pub fn is_next(bytes: &[u8]) -> Option<bool> {
        let magics = [LIBVIRT_SAVED, LIBVIRT_PARTIAL];
        let there = bytes.len().min(LIBVIRT_SAVED.len());
        match magics.iter().any(|m| m.get(..there) == bytes.get(..there)) {
            true if there < LIBVIRT_SAVED.len() => None,
            is_next => Some(is_next),
        }
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`ContainerError`], or the bytes end before it does.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.clone();
        let magic: [u8; 16] = r.array()?;
        if magic == *LIBVIRT_PARTIAL {
            return Err(at.error(ContainerError::Partial));
        }
        if magic != *LIBVIRT_SAVED {
            let found = u32::from_be_bytes([magic[0], magic[1], magic[2], magic[3]]);
            return Err(at.error(header::HeaderError::Magic { found }));
        }
        let at = r.clone();
        let words: [[u8; 4]; 5] = [r.array()?, r.array()?, r.array()?, r.array()?, r.array()?];
        r.take(14 * 4)?;
        // The byte order is that in which the version is small.
        let is_little = u32::from_le_bytes(words[0]) < u32::from_be_bytes(words[0]);
        let [version, data_len, was_running, format, _cookie] = words.map(|word| {
            if is_little {
                u32::from_le_bytes(word)
            } else {
                u32::from_be_bytes(word)
            }
        });
        if !(1..=LIBVIRT_VERSION).contains(&version) {
            return Err(at.error(ContainerError::Version { version }));
        }
        let format = match format {
            0 => LibvirtFormat::Raw,
            1 => LibvirtFormat::Compressed(Format::Gzip),
            2 => LibvirtFormat::Compressed(Format::Bzip2),
            3 => LibvirtFormat::Compressed(Format::Xz),
            4 => LibvirtFormat::Compressed(Format::Lzop),
            5 => LibvirtFormat::Compressed(Format::Zstd),
            6 => LibvirtFormat::Sparse,
            format => return Err(at.error(ContainerError::Format { format })),
        };
        Ok(Self {
            data_len,
            was_running: was_running != 0,
            format,
        })
    }

    /// Where the stream begins, bytes from the beginning of the image.
    ///
    /// # Errors
    /// [`ContainerError::Compressed`]: what begins there has to be decompressed first.
    pub fn stream_offset(&self) -> Result<u64, ContainerError> {
        let offset = Self::LEN as u64 + u64::from(self.data_len);
        match self.format {
            LibvirtFormat::Raw | LibvirtFormat::Sparse => Ok(offset),
            LibvirtFormat::Compressed(format) => Err(ContainerError::Compressed { format, offset }),
        }
    }
}

impl From<ContainerError> for Cause {
    fn from(error: ContainerError) -> Self {
        Self::Container(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(version: u32, format: u32) -> Vec<u8> {
        let mut bytes = LIBVIRT_SAVED.to_vec();
        for word in [version, 0xf00, 1, format, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.resize(LibvirtHeader::LEN, 0);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<LibvirtHeader, Cause> {
        LibvirtHeader::decode(&mut Reader::new(bytes, 0)).map_err(|e| e.cause)
    }

    #[test]
    fn the_stream_of_a_libvirt_image_begins_behind_its_data() {
        let header = decode(&image(2, 0)).unwrap();
        assert_eq!(header.stream_offset(), Ok(92 + 0xf00));
        assert!(header.was_running);
        // The other byte order.
        let mut bytes = image(2, 6);
        for word in bytes[16..36].chunks_mut(4) {
            word.reverse();
        }
        let header = decode(&bytes).unwrap();
        assert_eq!(header.format, LibvirtFormat::Sparse);
        assert_eq!(header.data_len, 0xf00);
    }

    #[test]
    fn a_compressed_image_says_how_to_decompress_it() {
        let error = decode(&image(2, 5)).unwrap().stream_offset().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("`tail -c +3933 | zstd -dc`"), "{text}");
    }

    #[test]
    fn an_image_that_is_not_finished_or_not_known_is_refused() {
        let mut bytes = image(2, 0);
        bytes[..16].copy_from_slice(LIBVIRT_PARTIAL);
        assert_eq!(decode(&bytes), Err(ContainerError::Partial.into()));
        assert_eq!(
            decode(&image(3, 0)),
            Err(ContainerError::Version { version: 3 }.into())
        );
        assert_eq!(
            decode(&image(2, 7)),
            Err(ContainerError::Format { format: 7 }.into())
        );
        assert!(matches!(
            decode(&image(2, 0)[..91]),
            Err(Cause::Truncated { needed: 1 })
        ));
        assert_eq!(LibvirtHeader::is_next(b"LibvirtQ"), None);
        assert_eq!(LibvirtHeader::is_next(b"QEVM"), Some(false));
        assert_eq!(LibvirtHeader::is_next(b"LibvirtQemudPart"), Some(true));
    }

    #[test]
    fn what_is_no_stream_is_named_with_what_to_do() {
        for (prefix, said) in [
            (*b"\x1f\x8b\x08\0", "`gzip -dc`"),
            (*b"BZh9", "`bzip2 -dc`"),
            (*b"\xfd7zX", "`xz -dc`"),
            (*b"\x89LZO", "`lzop -dc`"),
            (*b"\x04\x22\x4d\x18", "`lz4 -dc`"),
            (*b"\x28\xb5\x2f\xfd", "`zstd -dc`"),
            (*b"QFI\xfb", "qcow2"),
            (*b"\x7fELF", "elf"),
            (*b"Libv", "libvirt"),
        ] {
            let found = u32::from_be_bytes(prefix);
            let text = header::HeaderError::Magic { found }.to_string();
            assert!(text.contains(said), "{text}");
        }
        let found = u32::from_be_bytes(*b"GET ");
        let text = header::HeaderError::Magic { found }.to_string();
        assert_eq!(text, "magic 0x47455420, expected 0x5145564d");
    }
}
