//! Where pages come from and where they land: the traits through which a VMM plugs in its memory.
//!
//! Guest memory is shared with running vCPUs, so it is only ever seen as a [`VolatileSlice`].

use vm_memory::VolatileSlice;

use crate::ram::{BlockId, RamBlockTable};

/// Guest RAM as the source of an outgoing migration.
pub trait GuestRam: Send + Sync {
    /// The blocks, in the order in which they are announced.
    fn blocks(&self) -> &RamBlockTable;

    /// The bytes `offset .. offset + len` of a block.
    ///
    /// # Errors
    /// The block is not of this table, or the range does not lie in it.
    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError>;
}

/// Where the pages of an incoming migration land: guest RAM, a RAM cache, or both.
///
/// The order of calls for a range is `prepare`, then the bytes are written into the slice, then
/// `landed`. Calls for different ranges come from several channel threads at once. A range that
/// was prepared and never landed (the channel broke) must not reach a running guest.
pub trait PageStore: Send + Sync {
    /// The blocks that may be received.
    fn blocks(&self) -> &RamBlockTable;

    /// The memory into which the bytes `offset .. offset + len` of a block are to be read. It holds
    /// what landed there before, of which XBZRLE leaves what did not change.
    ///
    /// The slice begins at `offset` and may end before `len`, at the end of a page: where pages that
    /// follow each other in the block do not in memory. The rest is then asked for again.
    ///
    /// # Errors
    /// The block is not of this table, or the range does not lie in it.
    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError>;

    /// The bytes of a prepared range are in place.
    ///
    /// # Errors
    /// As for [`PageStore::prepare`].
    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError>;

    /// The range is all zero. Memory that is zero already is not touched, so that a page that was
    /// never written stays unallocated.
    ///
    /// # Errors
    /// As for [`PageStore::prepare`].
    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError>;
}

/// Prepares all of a range: hands each piece of its memory to `take`, with where it begins in the block.
///
/// # Errors
/// Those of [`PageStore::prepare`], and of `take`; a store that gives no memory or more than it was
/// asked for.
pub fn prepare_range<'a, S: PageStore + ?Sized, E: From<MemoryError>>(
    store: &'a S,
    block: BlockId,
    offset: u64,
    len: usize,
    mut take: impl FnMut(u64, VolatileSlice<'a>) -> Result<(), E>,
) -> Result<(), E> {
    let mut done = 0;
    while done < len {
        let (from, rest) = (offset + done as u64, len - done);
        let slice = store.prepare(block, from, rest)?;
        if slice.is_empty() || slice.len() > rest {
            let block = store.blocks().get(block);
            return Err(E::from(MemoryError::OutOfBlock {
                name: block.map_or_else(String::new, |b| b.name().to_owned()),
                offset: from,
                len: rest,
                used_length: block.map_or(0, |b| b.used_length()),
            }));
        }
        done += slice.len();
        take(from, slice)?;
    }
    Ok(())
}

impl<T: PageStore + ?Sized> PageStore for std::sync::Arc<T> {
    fn blocks(&self) -> &RamBlockTable {
        (**self).blocks()
    }
    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        (**self).prepare(block, offset, len)
    }
    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        (**self).landed(block, offset, len)
    }
    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        (**self).zero(block, offset, len)
    }
}

impl<T: PageStore + ?Sized> PageStore for &T {
    fn blocks(&self) -> &RamBlockTable {
        (**self).blocks()
    }
    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        (**self).prepare(block, offset, len)
    }
    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        (**self).landed(block, offset, len)
    }
    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        (**self).zero(block, offset, len)
    }
}

impl<T: DirtyLog + ?Sized> DirtyLog for Box<T> {
    fn start(&mut self) -> Result<(), MemoryError> {
        (**self).start()
    }
    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        (**self).sync(sink)
    }
    fn stop(&mut self) -> Result<(), MemoryError> {
        (**self).stop()
    }
    fn begins_with_every_page(&self) -> bool {
        (**self).begins_with_every_page()
    }
}

/// Pages the guest (or the VMM on its behalf) has written.
pub trait DirtyLog: Send {
    /// Starts logging. Pages written before this call need not be reported.
    ///
    /// # Errors
    /// The hypervisor's.
    fn start(&mut self) -> Result<(), MemoryError>;

    /// Calls `sink(block, first_page, word)` for pages written since the previous call (or since
    /// `start`), 64 pages a word: bit `i` of `word` is page `first_page + i`, and `first_page` is a
    /// multiple of 64. A page is reported at least once after its last write.
    ///
    /// # Errors
    /// The hypervisor's.
    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError>;

    /// Stops logging.
    ///
    /// # Errors
    /// The hypervisor's.
    fn stop(&mut self) -> Result<(), MemoryError>;

    /// Whether every page is sent once, reported or not. The log of memory that is still arriving
    /// from elsewhere reports each page itself, and says no.
    fn begins_with_every_page(&self) -> bool {
        true
    }
}

/// Why memory could not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The id is not of this table.
    #[error("no ram {0}")]
    NoBlock(BlockId),
    /// The range does not lie in the block.
    #[error("range {offset:#x}+{len:#x} is outside ram block '{name}' of {used_length:#x} bytes", name = crate::Escaped(.name))]
    OutOfBlock {
        /// The block's name.
        name: String,
        /// Start of the range in the block, bytes.
        offset: u64,
        /// Length of the range, bytes.
        len: usize,
        /// Length of the block, bytes.
        used_length: u64,
    },
    /// The VMM's own failure (hypervisor, mapping).
    #[error("{what}")]
    Backend {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
