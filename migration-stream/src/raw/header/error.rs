//! What can be wrong with a header.

use crate::raw::container::Recognised;

/// `QEVM`: the first four bytes of a main stream.
pub const MAGIC: u32 = 0x5145_564d;

/// The only version there is; version 2 ended with QEMU 0.12.
pub const VERSION: u32 = 3;

/// Why a stream is none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The first word is another.
    #[error("magic {found:#010x}, expected {MAGIC:#010x}{}", Recognised(*.found))]
    Magic {
        /// What is there instead.
        found: u32,
    },
    /// The stream's version is not ours.
    #[error("stream version {found}, expected {VERSION}")]
    Version {
        /// The version received.
        found: u32,
    },
}
