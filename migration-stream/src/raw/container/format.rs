//! Formats that are recognised by their first bytes.

use std::fmt;

/// A format that is recognised by its first bytes and that is no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// lzop.
    Lzop,
    /// lz4's frames.
    Lz4,
    /// zstd's frames.
    Zstd,
    /// A disk image, which may have snapshots with VM state in it.
    Qcow2,
    /// An ELF file, such as `dump-guest-memory` writes.
    Elf,
    /// An image that libvirt saved.
    Libvirt,
    /// A multifd channel of QEMU.
    Multifd,
}

impl Format {
    /// How many bytes [`Format::of`] looks at.
    pub const PREFIX: usize = 4;

    /// Recognises the format of a file that begins with these bytes.
    #[must_use]
    pub const fn of(prefix: [u8; Self::PREFIX]) -> Option<Self> {
        Some(match prefix {
            [0x1f, 0x8b, 8, _] => Self::Gzip,
            [b'B', b'Z', b'h', b'1'..=b'9'] => Self::Bzip2,
            [0xfd, b'7', b'z', b'X'] => Self::Xz,
            [0x89, b'L', b'Z', b'O'] => Self::Lzop,
            [0x04, 0x22, 0x4d, 0x18] => Self::Lz4,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            [b'Q', b'F', b'I', 0xfb] => Self::Qcow2,
            [0x7f, b'E', b'L', b'F'] => Self::Elf,
            [b'L', b'i', b'b', b'v'] => Self::Libvirt,
            [0x11, 0x22, 0x33, 0x44] => Self::Multifd,
            _ => return None,
        })
    }

    /// The command that turns such a file into a stream, if one does.
    #[must_use]
    pub const fn decompressor(self) -> Option<&'static str> {
        Some(match self {
            Self::Gzip => "gzip -dc",
            Self::Bzip2 => "bzip2 -dc",
            Self::Xz => "xz -dc",
            Self::Lzop => "lzop -dc",
            Self::Lz4 => "lz4 -dc",
            Self::Zstd => "zstd -dc",
            Self::Qcow2 | Self::Elf | Self::Libvirt | Self::Multifd => return None,
        })
    }
}

impl fmt::Display for Format {
    /// Writes what it is and what can be done with it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
            Self::Lzop => "lzop",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Qcow2 => {
                return f.write_str(
                    "this is a qcow2 disk image; vm state in it is that of a snapshot, which \
                     `qemu-system-x86_64 -loadvm` loads",
                );
            }
            Self::Elf => return f.write_str("this is an elf file, perhaps a dump of guest memory"),
            Self::Libvirt => {
                return f.write_str("this is an image that libvirt saved (virsh save)");
            }
            Self::Multifd => {
                return f.write_str(
                    "this is a multifd channel, whose main channel is another connection",
                );
            }
        };
        write!(f, "this is compressed with {name}")?;
        match self.decompressor() {
            Some(command) => write!(f, ": pass it through `{command}`"),
            None => Ok(()),
        }
    }
}

/// What a note in an error adds to a magic number that is not a stream's.
pub(crate) struct Recognised(pub u32);

impl fmt::Display for Recognised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Format::of(self.0.to_be_bytes()) {
            Some(format) => write!(f, "; {format}"),
            None => Ok(()),
        }
    }
}
