//! What can go wrong with a cache.

use std::io;

use vm_memory::mmap::MmapRegionError;

use crate::bitmap::BitmapError;

/// Why a cache could not be made or a range not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A block is empty or does not start and end on a page boundary.
    #[error(
        "ram block '{name}' ({len:#x} bytes at {offset_in_region:#x} of its mapping) is not one or more whole pages", name = .name.escape_debug())]
    NotWholePages {
        /// The block.
        name: String,
        /// Where it starts in its mapping, bytes.
        offset_in_region: usize,
        /// Its length, bytes.
        len: usize,
    },
    /// A block does not lie in the guest mapping it was given with.
    #[error(
        "ram block '{name}' ({len:#x} bytes at {offset_in_region:#x}) is outside its mapping of {region_len:#x} bytes", name = .name.escape_debug())]
    OutsideRegion {
        /// The block.
        name: String,
        /// Where it starts in its mapping, bytes.
        offset_in_region: usize,
        /// Its length, bytes.
        len: usize,
        /// Length of the mapping, bytes.
        region_len: usize,
    },
    /// Two blocks are the same guest memory.
    #[error("ram blocks '{first}' and '{second}' overlap in guest memory", first = .first.escape_debug(), second = .second.escape_debug())]
    Overlap {
        /// The block that comes first in the list.
        first: String,
        /// The block that comes later in the list.
        second: String,
    },
    /// The host cannot provide the memory of the copy.
    #[error("cannot map a cache of {len:#x} bytes for ram block '{name}'", name = .name.escape_debug())]
    Map {
        /// The block.
        name: String,
        /// Bytes wanted.
        len: usize,
        /// The host's answer.
        source: MmapRegionError,
    },
    /// The cache cannot be kept out of core dumps.
    #[error("cannot exclude the cache of ram block '{name}' from core dumps", name = .name.escape_debug())]
    CoreDump {
        /// The block.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// There is no file in memory for a block, or the guest's memory cannot be mapped to it.
    #[error("cannot make a file of {len:#x} bytes in memory the memory of ram block '{name}'", name = .name.escape_debug())]
    File {
        /// The block.
        name: String,
        /// Bytes wanted.
        len: usize,
        /// The host's answer.
        source: io::Error,
    },
    /// There is no memory for what is known of a block's pages.
    #[error("no memory for a table of the {pages} pages of ram block '{name}'", name = .name.escape_debug())]
    Table {
        /// The block.
        name: String,
        /// Its pages.
        pages: usize,
    },
    /// The addresses in which pages wait cannot be had.
    #[error("cannot map a cache of {len:#x} bytes for the pages of checkpoints")]
    Staging {
        /// Bytes wanted.
        len: usize,
        /// The host's answer.
        source: MmapRegionError,
    },
    /// More pages have been received in one checkpoint than there are.
    #[error("no place for another page of the checkpoint, of {pages}")]
    StagingFull {
        /// Places there are.
        pages: u32,
    },
    /// A page of a checkpoint is whole.
    #[error("range {offset:#x}+{len:#x} of ram block '{name}' is not whole pages", name = .name.escape_debug())]
    PartOfPage {
        /// The block.
        name: String,
        /// Start of the range in the block, bytes.
        offset: u64,
        /// Length of the range, bytes.
        len: usize,
    },
    /// Which pages are copies cannot be found out.
    #[error("cannot read /proc/self/pagemap")]
    Pagemap(#[source] io::Error),
    /// Memory cannot be given back, as when it is locked.
    #[error("cannot drop pages of '{name}'", name = .name.escape_debug())]
    Discard {
        /// The block, or the memory in which pages wait.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// There is no block of that index.
    #[error("no ram block {block}: the cache has {blocks}")]
    NoBlock {
        /// The index asked for.
        block: usize,
        /// Number of blocks.
        blocks: usize,
    },
    /// The range does not lie in the block.
    #[error("range {offset:#x}+{len:#x} is outside ram block '{name}' of {block_len:#x} bytes", name = .name.escape_debug())]
    OutOfBlock {
        /// The block.
        name: String,
        /// Start of the range in the block, bytes.
        offset: u64,
        /// Length of the range, bytes.
        len: usize,
        /// Length of the block, bytes.
        block_len: usize,
    },
    /// The block's dirty bitmap refuses, or there is no memory for it.
    #[error("dirty bitmap of ram block '{name}'", name = .name.escape_debug())]
    Bitmap {
        /// The block.
        name: String,
        /// Why.
        source: BitmapError,
    },
    /// A thread that helped with a commit panicked.
    #[error("a thread that copies a checkpoint into the guest panicked")]
    Panicked,
}
