//! Why no stream can be read out of an image.

use super::format::Format;

/// The only version that libvirt writes; 1 ended in 2010.
pub(super) const LIBVIRT_VERSION: u32 = 2;

/// Why the stream in an image cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// Libvirt did not finish the image.
    #[error("this is an image that libvirt did not finish saving: no guest is whole in it")]
    Partial,
    /// The image has a version that libvirt has never written.
    #[error("libvirt image of version {version}, expected 1 to {LIBVIRT_VERSION}")]
    Version {
        /// The version.
        version: u32,
    },
    /// The stream in the image is stored in an unknown way.
    #[error("libvirt image of format {format}, expected 0 (raw) to 6 (sparse)")]
    Format {
        /// The format.
        format: u32,
    },
    /// The stream in the image is compressed.
    #[error(
        "this is an image that libvirt saved; the stream in it begins at byte {offset:#x} and is \
         compressed{}",
        decompress(*.format, *.offset)
    )]
    Compressed {
        /// How.
        format: Format,
        /// Where the compressed data begin.
        offset: u64,
    },
}

fn decompress(format: Format, offset: u64) -> String {
    match format.decompressor() {
        // `tail` counts from 1.
        Some(command) => format!(": pass it through `tail -c +{} | {command}`", offset + 1),
        None => String::new(),
    }
}
