//! QEMU's design: a second, full copy of guest RAM.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::bitmap::DirtyBitmap;
use crate::block::{self, CacheBlockSpec, bytes_of, pages_of};
use crate::cache::RamCache;
use crate::copy::Copier;
use crate::discard::DiscardInhibitor;
use crate::error::CacheError;
use crate::flush::{FlushPool, FlushReport, GuestStopped, Share};
use crate::zero::zero_unless_zero;
use crate::{PAGE_SIZE, mapping};

/// A full copy of guest RAM with a dirty bitmap.
///
/// In precopy a page is received into the cache and copied on to the guest, and nothing is marked:
/// nothing differs. Zero pages are made zero in both. In COLO a page is marked first and then written
/// into the cache; the commit copies all marked pages, those included that only the secondary has
/// dirtied.
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
/// # use ram_cache::RamCache;
/// # fn early(cache: ram_cache::MirrorCache) -> Result<(), ram_cache::CacheError> {
/// let receiving = cache.prepare(0, 0, 4096)?;
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
    // The threads that help with a commit have them too until it is over.
    blocks: Arc<[Block]>,
    in_colo: AtomicBool,
    // Held, not used: discard is forbidden as long as the cache exists.
    _no_discard: DiscardInhibitor,
}

#[derive(Debug)]
struct Block {
    spec: CacheBlockSpec,
    cache: MmapRegion,
    dirty: DirtyBitmap,
}

impl MirrorCache {
    /// Maps a cache for `blocks`, all zero as the guest's RAM has to be. Until it is released (or
    /// dropped) it keeps `inhibitor`, so that no page of the guest is discarded behind its back; if it
    /// cannot be made, the inhibitor is dropped and discard is as it was before.
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
        block::check(&blocks)?;
        let blocks = blocks
            .into_iter()
            .map(Block::new)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            blocks,
            in_colo: AtomicBool::new(false),
            _no_discard: inhibitor,
        })
    }

    /// Gives the memory back and allows RAM discard again; see [`RamCache::release`].
    pub fn release(self) {
        drop(self);
    }

    fn in_colo(&self) -> bool {
        self.in_colo.load(Ordering::Acquire)
    }

    /// The dirty bitmap cut into pieces of about `pages` marked pages each.
    fn shares(&self, pages: u64) -> Vec<Share> {
        let mut shares = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            for words in block.dirty.shares(pages) {
                shares.push(Share {
                    block: index,
                    words,
                });
            }
        }
        shares
    }
}

impl RamCache for MirrorCache {
    fn prepare(
        &self,
        block: usize,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        let (block, offset) = block::locate(&self.blocks, block, offset, len)?;
        if self.in_colo() {
            // Before the bytes are written: the cache holds no byte that the bitmap does not know of.
            block.mark(offset, len)?;
        }
        block.cache_slice(offset, len)
    }

    fn landed(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        let (block, offset) = block::locate(&self.blocks, block, offset, len)?;
        if self.in_colo() {
            return Ok(());
        }
        let cache = block.cache_slice(offset, len)?;
        cache.copy_to_volatile_slice(block.spec.guest_slice(offset, len)?);
        Ok(())
    }

    fn zero(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        let (block, offset) = block::locate(&self.blocks, block, offset, len)?;
        if self.in_colo() {
            block.mark(offset, len)?;
        } else {
            block.zero(&block.spec.guest_slice(offset, len)?)?;
        }
        block.zero(&block.cache_slice(offset, len)?)
    }

    fn enter_colo(&self) -> Result<(), CacheError> {
        // Pages of checkpoints are received after the primary was sent a message, which is sent
        // after this: the channels order it, and Release/Acquire says so.
        self.in_colo.store(true, Ordering::Release);
        Ok(())
    }

    fn or_dirty_word(&self, block: usize, first_page: u64, word: u64) -> Result<(), CacheError> {
        let block = block::find(&self.blocks, block)?;
        (block.dirty)
            .or_word(first_page, word)
            .map_err(|source| block.spec.bitmap_error(source))
    }

    /// The cache has its own copy of every page, whatever the guest has.
    fn guest_stopped(&self, _stopped: GuestStopped<'_>) -> Result<(), CacheError> {
        Ok(())
    }

    fn dirty_pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.dirty.count()).sum()
    }

    fn commit(
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
            Some(share) => {
                let blocks = Arc::clone(&self.blocks);
                pool.run(self.shares(share / PAGE_SIZE), move |share| {
                    let copier = Copier::for_flush(bytes);
                    let block = block::find(&blocks, share.block)?;
                    block.flush_words(share.words.clone(), &copier)
                })
            }
        }
    }

    /// Nothing was left over.
    fn reclaim(&self, _stopped: GuestStopped<'_>) -> Result<(), CacheError> {
        Ok(())
    }

    fn release(self: Box<Self>) {
        drop(self);
    }
}

impl AsRef<CacheBlockSpec> for Block {
    fn as_ref(&self) -> &CacheBlockSpec {
        &self.spec
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
        let dirty = spec.bitmap()?;
        Ok(Self { spec, cache, dirty })
    }

    fn cache_slice(&self, offset: usize, len: usize) -> Result<VolatileSlice<'_>, CacheError> {
        self.cache
            .get_slice(offset, len)
            .map_err(|_| self.spec.out_of_block(offset as u64, len))
    }

    fn zero(&self, memory: &VolatileSlice<'_>) -> Result<(), CacheError> {
        zero_unless_zero(memory).map_err(|_| self.spec.out_of_block(0, memory.len()))
    }

    fn mark(&self, offset: usize, len: usize) -> Result<(), CacheError> {
        let pages = pages_of(offset, len);
        self.dirty
            .set_range(pages.start as u64, pages.len() as u64)
            .map_err(|source| self.spec.bitmap_error(source))
    }

    fn flush_words(&self, words: Range<usize>, copier: &Copier) -> Result<FlushReport, CacheError> {
        let mut report = FlushReport::default();
        let mut runs = self.dirty.drain_words(words);
        while let Some(pages) = runs.next_pages() {
            let (offset, len) = bytes_of(&pages);
            copier.copy(
                &self.cache_slice(offset, len)?,
                &self.spec.guest_slice(offset, len)?,
            );
            report.pages += pages.len() as u64;
            report.runs += 1;
        }
        report.bytes = report.pages * PAGE_SIZE;
        Ok(report)
    }
}
