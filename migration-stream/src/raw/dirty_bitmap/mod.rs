//! Dirty bitmaps of block devices (the capability `dirty-bitmaps`): the section `dirty-bitmap`
//! (`migration/block-dirty-bitmap.c`, QEMU 11.1).
//!
//! Such a section comes as START, PART and END, and like a device's it has no length: its body is
//! chunks, the last of which says that it is.
//!
//! ```text
//! chunk     flags  [counted node alias]  [counted bitmap alias]  kind
//! flags     1 byte; 2 bytes if its highest bit is set, 4 if that of the second is too
//! START     be32 granularity  u8 1 enabled | 2 persistent | 4 autoload
//! BITS      be64 first sector  be32 sectors  [be64 length  bits]
//! COMPLETE  nothing
//! ```
//!
//! A name that is left out is that of the chunk before, in whichever section that was. Sectors are
//! of 512 bytes. Bit `i` of the bits is for `granularity` bytes from the first sector on; they are
//! words of 64, low bit first and little-endian, padded to 32 bytes.
//!
//! | type | what |
//! |---|---|
//! | [`Chunk`] | one chunk as it is, to be looked at or sent on |
//! | [`DirtyBitmapDecoder`] | the chunks of a stream, and which bitmap each is of |
//! | [`DirtyBitmapEncoder`] | chunks out of bitmaps |
//! | [`BitmapSections`] | all sections of a stream, kept to be sent on |

mod chunk;
mod error;
mod sections;
mod stream;
#[cfg(test)]
mod tests;

pub use chunk::{BitmapFlags, Chunk, ChunkKind, FlagsWidth};
pub use error::DirtyBitmapError;
pub use sections::{BitmapSections, header};
pub use stream::{DirtyBitmapDecoder, DirtyBitmapEncoder, MigratedBitmap};

use crate::IdStr;

/// The section's name. Its instance is 0.
pub const DIRTY_BITMAP_IDSTR: &str = "dirty-bitmap";
/// The section's version.
pub const DIRTY_BITMAP_VERSION: u32 = 1;
/// More bitmaps than any machine has; it bounds what a hostile peer can make us remember.
pub const MAX_BITMAPS: usize = 4096;
/// The longest bits that QEMU takes in one chunk, bytes; it sends a tenth of that.
pub const MAX_BITS_LEN: u64 = 10 << 10;
/// The longest chunk, bytes.
#[allow(clippy::cast_possible_truncation)] // 10 KiB
pub const MAX_CHUNK_LEN: usize = 4 + 2 * (1 + IdStr::MAX_LEN) + 8 + 4 + 8 + MAX_BITS_LEN as usize;

const SECTOR: u64 = 512;
/// What the length of the bits is padded to, bytes.
const ALIGN: u64 = ALIGN_LEN as u64;
const ALIGN_LEN: usize = 32;
