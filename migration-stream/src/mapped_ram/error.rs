//! What can go wrong with the pages in a file.

use std::io;

use crate::MemoryError;
use crate::ram::BlockId;
use crate::raw::mapped_ram::LayoutError;

/// Why pages could not be read from a file, or written to one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappedRamError {
    /// The file could not be read or written.
    #[error("byte {offset:#x} of the file")]
    File {
        /// Where in the file.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file ends before the block's pages do.
    #[error("the file has {size:#x} bytes, but the block's pages end at {end:#x}")]
    Truncated {
        /// Where the pages end in the file.
        end: u64,
        /// Length of the file, bytes.
        size: u64,
    },
    /// The bitmap has a page that the block has not.
    #[error("page {page} in the bitmap of a block of {pages} pages")]
    BeyondBlock {
        /// Index of the page.
        page: u64,
        /// Length of the block, pages.
        pages: u64,
    },
    /// The block has no place in the file: it is not one of those announced.
    #[error("{0} has no place in the file")]
    NoArea(BlockId),
    /// The file would be longer than a file can be.
    #[error("block '{name}'", name = crate::Escaped(.name))]
    Layout {
        /// The block that has no room.
        name: String,
        /// Why.
        #[source]
        source: LayoutError,
    },
    /// A thread that moves pages has ended.
    #[error("a thread that moves pages has ended")]
    Thread,
    /// A thread could not be started.
    #[error("starting a thread that moves pages")]
    Spawn(#[source] io::Error),
    /// A token ended it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// Memory refused a range.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
