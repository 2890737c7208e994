//! What can be wrong with a `dirty-bitmap` section.

use super::{ALIGN, MAX_BITMAPS, MAX_BITS_LEN};
use crate::IdStr;

/// What is wrong with a `dirty-bitmap` section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyBitmapError {
    /// The flags are no chunk's.
    #[error("unknown combination of dirty bitmap flags {flags:#x}")]
    Flags {
        /// The flags, without what says how many bytes they are.
        flags: u32,
    },
    /// A bitmap is something we do not know.
    #[error("dirty bitmap with unknown flags {found:#04x}")]
    BitmapFlags {
        /// Its flags.
        found: u8,
    },
    /// A granularity that is none.
    #[error("dirty bitmap of granularity {granularity}, expected a power of two from 512 on")]
    Granularity {
        /// The granularity, bytes.
        granularity: u32,
    },
    /// Sectors that there cannot be.
    #[error("dirty bitmap bits for {sectors} sectors from {first_sector:#x} on")]
    Range {
        /// The first sector.
        first_sector: u64,
        /// How many.
        sectors: u32,
    },
    /// The first sector is not that of a word's first bit.
    #[error(
        "dirty bitmap bits from sector {first_sector:#x} on, which is in a word of 64 bits for {granularity} bytes each"
    )]
    Alignment {
        /// The first sector.
        first_sector: u64,
        /// Bytes that one bit is for.
        granularity: u32,
    },
    /// More bits than one chunk has.
    #[error("dirty bitmap chunk of {len} bytes, expected at most {MAX_BITS_LEN}")]
    TooLong {
        /// Their length, bytes.
        len: u64,
    },
    /// Bits of another length than their sectors need.
    #[error("dirty bitmap bits of {found} bytes, expected {expected} and padding to {ALIGN}")]
    BitsLength {
        /// Their length, bytes.
        found: u64,
        /// What the sectors need, bytes.
        expected: u64,
    },
    /// A chunk leaves its bitmap's name out, and no chunk before it has one.
    #[error("dirty bitmap chunk without a name")]
    NoName,
    /// A bitmap is started again.
    #[error("dirty bitmap '{name}' of '{node}' is started twice")]
    StartedTwice {
        /// Its node.
        node: IdStr,
        /// The bitmap.
        name: IdStr,
    },
    /// A chunk of a bitmap that was not started.
    #[error("dirty bitmap '{name}' of '{node}' was not started")]
    NotStarted {
        /// Its node.
        node: IdStr,
        /// The bitmap.
        name: IdStr,
    },
    /// A chunk of a bitmap that is complete.
    #[error("dirty bitmap '{name}' of '{node}' goes on after its end")]
    AfterComplete {
        /// Its node.
        node: IdStr,
        /// The bitmap.
        name: IdStr,
    },
    /// More bitmaps than a stream may have.
    #[error("more than {MAX_BITMAPS} dirty bitmaps")]
    TooMany,
    /// More of them than is kept.
    #[error("dirty bitmaps of more than {max} bytes")]
    SectionsTooLong {
        /// The limit, bytes.
        max: usize,
    },
}
