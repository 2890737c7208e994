//! QEMU's design: a second, full copy of guest RAM.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::bitmap::{BitmapError, DirtyBitmap};
use crate::copy::Copier;
use crate::discard::DiscardInhibitor;
use crate::error::CacheError;
use crate::flush::{FlushPool, FlushReport, GuestStopped};
use crate::zero::zero_unless_zero;
use crate::{PAGE_BYTES, PAGE_SIZE, mapping};

/// A RAM block to be mirrored: where it lies in the guest's memory.
#[derive(Clone, Debug)]
pub struct CacheBlockSpec {
    /// The block's name, for messages.
    pub name: String,
    /// The mapping of guest memory that the block lies in.
    pub guest: Arc<MmapRegion>,
    /// Where in the mapping the block starts, bytes, a multiple of [`PAGE_SIZE`].
    pub offset_in_region: usize,
    /// The block's length in bytes, a non-zero multiple of [`PAGE_SIZE`]. For a block that can be
    /// resized this is the length it can grow to, not the length in use: a page that comes into use
    /// later must have its place in the cache.
    pub len: usize,
}

impl CacheBlockSpec {
    /// A block that is a whole mapping of guest memory.
    #[must_use]
    pub fn whole_region(name: impl Into<String>, guest: Arc<MmapRegion>) -> Self {
        Self {
            name: name.into(),
            offset_in_region: 0,
            len: guest.size(),
            guest,
        }
    }

    /// Whether the block is whole pages within its mapping.
    fn check(&self) -> Result<(), CacheError> {
        if self.len == 0
            || !self.len.is_multiple_of(PAGE_BYTES)
            || !self.offset_in_region.is_multiple_of(PAGE_BYTES)
        {
            return Err(CacheError::NotWholePages {
                name: self.name.clone(),
                offset_in_region: self.offset_in_region,
                len: self.len,
            });
        }
        match self.offset_in_region.checked_add(self.len) {
            Some(end) if end <= self.guest.size() => Ok(()),
            _ => Err(CacheError::OutsideRegion {
                name: self.name.clone(),
                offset_in_region: self.offset_in_region,
                len: self.len,
                region_len: self.guest.size(),
            }),
        }
    }

    /// The addresses the block has in this process.
    fn addresses(&self) -> Range<usize> {
        let start = self.guest.as_ptr().addr() + self.offset_in_region;
        start..start + self.len
    }
}

/// A full copy of guest RAM with a dirty bitmap.
///
/// Blocks are named by their index in the list given to [`MirrorCache::new`], offsets and lengths
/// are bytes in the block. All methods but [`MirrorCache::release`] take `&self` and may be called
/// from any number of threads.
///
/// # The order of things
/// *Before the first byte of RAM* the cache is made, zero as the guest's RAM is.
///
/// *In precopy* the guest does not run yet, and both copies are written: pages are read into
/// [`MirrorCache::cache_slice`] and go on with [`MirrorCache::copy_to_guest`]; zero pages are
/// [`MirrorCache::zero_both`]. Nothing is marked, since nothing differs.
///
/// *In COLO* pages are marked first ([`MirrorCache::mark`]) and then written into the cache;
/// zero pages are [`MirrorCache::zero_cache_and_mark`]. Marking first means that the cache can hold
/// no byte that the bitmap does not know of. A channel that breaks in the middle of a page leaves
/// it marked and half written, and that is harmless: only a complete checkpoint is ever flushed,
/// and a page of a complete checkpoint was written whole. If the checkpoint never completes, the
/// secondary fails over with its own RAM as it is, and the cache is released unflushed.
///
/// *At a complete checkpoint* the guest is stopped, its own dirty log goes into the same bitmap
/// ([`MirrorCache::or_dirty_word`]) and [`MirrorCache::flush`] copies all marked pages. Pages that
/// only the secondary dirtied are thereby put back to what the primary has.
///
/// # Life
/// The cache is neither `Clone` nor can it be released while a slice of it is in use, so whoever
/// owns it has it alone. Give it by value to the set of receive channels that writes it and take it
/// back from their join: released before the join is then not an error but a program that does not
/// compile.
///
/// ```compile_fail
/// # fn twice(cache: ram_cache::MirrorCache) {
/// let second = cache.clone(); // a second owner could release what the channels still write
/// second.release();
/// # }
/// ```
///
/// ```compile_fail,E0505
/// # fn early(cache: ram_cache::MirrorCache) -> Result<(), ram_cache::CacheError> {
/// let receiving = cache.cache_slice(0, 0, 4096)?;
/// cache.release(); // the slice is still in use
/// receiving.copy_from(&[0u8; 4096]);
/// # Ok(())
/// # }
/// ```
///
/// ```compile_fail,E0507
/// # use std::sync::Arc;
/// # fn shared(cache: Arc<ram_cache::MirrorCache>) {
/// cache.release(); // the other threads' handles are still there
/// # }
/// ```
#[derive(Debug)]
pub struct MirrorCache {
    blocks: Vec<Block>,
    // Held, not used: discard is forbidden as long as the cache exists.
    _no_discard: DiscardInhibitor,
}

#[derive(Debug)]
struct Block {
    spec: CacheBlockSpec,
    cache: MmapRegion,
    dirty: DirtyBitmap,
}

/// A part of a flush: words of the dirty bitmap of a block.
struct Share<'a> {
    block: &'a Block,
    words: Range<usize>,
}

impl MirrorCache {
    /// Maps a cache for `blocks`, all zero. Until it is released (or dropped) it keeps `inhibitor`,
    /// so that no page of the guest is discarded behind its back; if it cannot be made, the
    /// inhibitor is dropped and discard is as it was before.
    ///
    /// No page of the cache is allocated before something other than zero is written to it.
    ///
    /// # Errors
    /// A block is empty, not made of whole pages, outside its mapping or on top of another block;
    /// or the host cannot provide the memory.
    pub fn new(
        blocks: Vec<CacheBlockSpec>,
        inhibitor: DiscardInhibitor,
    ) -> Result<Self, CacheError> {
        for (index, spec) in blocks.iter().enumerate() {
            spec.check()?;
            let addresses = spec.addresses();
            for other in &blocks[..index] {
                let taken = other.addresses();
                if addresses.start < taken.end && taken.start < addresses.end {
                    return Err(CacheError::Overlap {
                        first: other.name.clone(),
                        second: spec.name.clone(),
                    });
                }
            }
        }
        let blocks = blocks
            .into_iter()
            .map(Block::new)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            blocks,
            _no_discard: inhibitor,
        })
    }

    /// The cache's memory for a range, to be received into.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    pub fn cache_slice(
        &self,
        block: usize,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        let (block, offset) = self.locate(block, offset, len)?;
        block.cache_slice(offset, len)
    }

    /// The guest's own memory for a range.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    pub fn guest_slice(
        &self,
        block: usize,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        let (block, offset) = self.locate(block, offset, len)?;
        block.guest_slice(offset, len)
    }

    /// Precopy: copies a range that was received into the cache on to the guest. Marks nothing.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    pub fn copy_to_guest(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        let (block, offset) = self.locate(block, offset, len)?;
        block.copy_to_guest(offset, len)
    }

    /// Precopy: makes a range zero in cache and guest. Memory that is zero already is only read,
    /// so that pages the guest never used take no memory on either side. Marks nothing.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    pub fn zero_both(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        let (block, offset) = self.locate(block, offset, len)?;
        block.zero(&block.cache_slice(offset, len)?)?;
        block.zero(&block.guest_slice(offset, len)?)
    }

    /// COLO: marks a range and makes it zero in the cache, where it is not zero already.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    pub fn zero_cache_and_mark(
        &self,
        block: usize,
        offset: u64,
        len: usize,
    ) -> Result<(), CacheError> {
        let (block, offset) = self.locate(block, offset, len)?;
        block.mark(offset, len)?;
        block.zero(&block.cache_slice(offset, len)?)
    }

    /// COLO: marks the pages a range touches, before it is written. They go into the guest with
    /// the next flush.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    pub fn mark(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        let (block, offset) = self.locate(block, offset, len)?;
        block.mark(offset, len)
    }

    /// Marks pages that the secondary's own guest has dirtied: bit `i` of `word` is page
    /// `first_page + i` of the block, and `first_page` is a multiple of 64.
    ///
    /// # Errors
    /// No such block, `first_page` is not a multiple of 64, or a set bit is beyond the block.
    pub fn or_dirty_word(
        &self,
        block: usize,
        first_page: u64,
        word: u64,
    ) -> Result<(), CacheError> {
        let block = self.block(block)?;
        block
            .dirty
            .or_word(first_page, word)
            .map_err(|source| block.bitmap_error(source))
    }

    /// Number of marked pages, all blocks together.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    /// Copies every marked page from the cache into the guest and clears its mark.
    ///
    /// Runs of marked pages are copied whole, on as many cores as `pool` has. The work is divided
    /// by dirty bytes, not by blocks or addresses; a small flush is not divided at all.
    ///
    /// The witness says that the checkpoint is complete and that nobody else writes guest or cache.
    /// Were it untrue, the flush would still be defined behaviour (the copies are of memory that is
    /// never borrowed as Rust data), but what the guest then holds would mean nothing.
    ///
    /// # Errors
    /// None that the checks of [`MirrorCache::new`] leave possible. After an error the guest holds
    /// a part of the checkpoint and must not run.
    pub fn flush(
        &self,
        _stopped: GuestStopped<'_>,
        pool: &FlushPool,
    ) -> Result<FlushReport, CacheError> {
        let bytes = self.dirty_pages() * PAGE_SIZE;
        match pool.share(bytes) {
            None => {
                let copier = Copier::for_flush(bytes);
                self.blocks
                    .iter()
                    .try_fold(FlushReport::default(), |sum, block| {
                        Ok(sum + block.flush_words(0..block.dirty.word_count(), &copier)?)
                    })
            }
            Some(share) => pool.run(&self.shares(share / PAGE_SIZE), |share| {
                let copier = Copier::for_flush(bytes);
                share.block.flush_words(share.words.clone(), &copier)
            }),
        }
    }

    /// Gives the memory back and allows RAM discard again. Dropping the cache does the same; this
    /// is the name to read at the place where it must happen, after the receive channels have been
    /// joined.
    pub fn release(self) {
        drop(self);
    }

    /// The dirty bitmap cut into pieces of about `pages` marked pages each.
    fn shares(&self, pages: u64) -> Vec<Share<'_>> {
        let mut shares = Vec::new();
        for block in &self.blocks {
            for words in block.dirty.shares(pages) {
                shares.push(Share { block, words });
            }
        }
        shares
    }

    fn block(&self, index: usize) -> Result<&Block, CacheError> {
        self.blocks.get(index).ok_or(CacheError::NoBlock {
            block: index,
            blocks: self.blocks.len(),
        })
    }

    /// The block and the offset in it, when the range lies there.
    fn locate(&self, block: usize, offset: u64, len: usize) -> Result<(&Block, usize), CacheError> {
        let block = self.block(block)?;
        match usize::try_from(offset).map(|start| (start, start.checked_add(len))) {
            Ok((start, Some(end))) if end <= block.spec.len => Ok((block, start)),
            _ => Err(block.out_of_block(offset, len)),
        }
    }
}

impl Block {
    fn new(spec: CacheBlockSpec) -> Result<Self, CacheError> {
        let cache = mapping::anonymous(spec.len).map_err(|source| CacheError::Map {
            name: spec.name.clone(),
            len: spec.len,
            source,
        })?;
        mapping::exclude_from_core_dumps(&cache).map_err(|source| CacheError::CoreDump {
            name: spec.name.clone(),
            source,
        })?;
        let dirty =
            DirtyBitmap::new(spec.len as u64 / PAGE_SIZE).map_err(|source| CacheError::Bitmap {
                name: spec.name.clone(),
                source,
            })?;
        Ok(Self { spec, cache, dirty })
    }

    fn cache_slice(&self, offset: usize, len: usize) -> Result<VolatileSlice<'_>, CacheError> {
        self.cache
            .get_slice(offset, len)
            .map_err(|_| self.out_of_block(offset as u64, len))
    }

    fn guest_slice(&self, offset: usize, len: usize) -> Result<VolatileSlice<'_>, CacheError> {
        self.spec
            .guest
            .get_slice(self.spec.offset_in_region + offset, len)
            .map_err(|_| self.out_of_block(offset as u64, len))
    }

    fn copy_to_guest(&self, offset: usize, len: usize) -> Result<(), CacheError> {
        let cache = self.cache_slice(offset, len)?;
        cache.copy_to_volatile_slice(self.guest_slice(offset, len)?);
        Ok(())
    }

    fn zero(&self, memory: &VolatileSlice<'_>) -> Result<(), CacheError> {
        zero_unless_zero(memory).map_err(|_| self.out_of_block(0, memory.len()))
    }

    fn mark(&self, offset: usize, len: usize) -> Result<(), CacheError> {
        if len == 0 {
            return Ok(());
        }
        let first = offset / PAGE_BYTES;
        let last = (offset + len - 1) / PAGE_BYTES;
        self.dirty
            .set_range(first as u64, (last - first + 1) as u64)
            .map_err(|source| self.bitmap_error(source))
    }

    fn flush_words(&self, words: Range<usize>, copier: &Copier) -> Result<FlushReport, CacheError> {
        let mut report = FlushReport::default();
        let mut runs = self.dirty.drain_words(words);
        while let Some(pages) = runs.next_pages() {
            let (offset, len) = (pages.start * PAGE_BYTES, pages.len() * PAGE_BYTES);
            copier.copy(
                &self.cache_slice(offset, len)?,
                &self.guest_slice(offset, len)?,
            );
            report.pages += pages.len() as u64;
            report.runs += 1;
        }
        report.bytes = report.pages * PAGE_SIZE;
        Ok(report)
    }

    fn out_of_block(&self, offset: u64, len: usize) -> CacheError {
        CacheError::OutOfBlock {
            name: self.spec.name.clone(),
            offset,
            len,
            block_len: self.spec.len,
        }
    }

    fn bitmap_error(&self, source: BitmapError) -> CacheError {
        CacheError::Bitmap {
            name: self.spec.name.clone(),
            source,
        }
    }
}
