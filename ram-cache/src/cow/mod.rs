//! Guest RAM as a private mapping of the last checkpoint.

mod commit;
mod ram;
mod staging;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::VolatileSlice;

use self::commit::Commit;
use self::ram::CowBlock;
use self::staging::Staging;
use crate::PAGE_SIZE;
use crate::block::{self, CacheBlockSpec};
use crate::cache::RamCache;
use crate::copy::Copier;
use crate::discard::DiscardInhibitor;
use crate::error::CacheError;
use crate::flush::{FlushPool, FlushReport, GuestStopped, Share};
use crate::pagemap::Pagemap;

/// The last checkpoint in a file in memory (the *base*), of which guest RAM is a private mapping.
///
/// The guest's own writes give it copies of single pages. It shares all other pages with the base. RAM takes memory
/// once, and twice only for pages that either side has dirtied since the last checkpoint.
///
/// *In precopy* pages go into the base, where the guest sees them.
///
/// *In COLO* a page of which the guest has a copy goes into the base too: the guest sees its copy. Any other page is
/// *staged* in memory that grows with the checkpoint.
///
/// *The commit* copies staged pages into the base, and writes the base's content over the guest's copies. Dropping a
/// copy would cost the guest a fault at its next write, which takes as long as eight copies. So every page is copied
/// once, as with a [`MirrorCache`](crate::MirrorCache). After the commit, [`RamCache::reclaim`] drops copies that the
/// guest has not written since the checkpoint before, once they are more than a thirty-second of RAM.
///
/// # Duties of the VMM
/// Making the cache replaces the mapping of guest RAM at the same addresses. Earlier content is lost and reads as
/// zero. The guest must not run yet. No device may hold page addresses that outlast a change of the mapping (KVM is
/// notified of it). The memory must not be locked.
///
/// The dirty log need not name every copy that the guest has. The kernel is asked about pages in the log
/// (`/proc/self/pagemap`, opened when the cache is made). Copies of pages that arrive are found when the commit
/// changes the base.
///
/// # After the release
/// The guest keeps its mapping. Its first write to a page that it shares with the base costs a fault and a copy, and
/// the base's page stays. A guest that writes all of its RAM needs it twice.
///
/// RAM discard stays forbidden, for as long as the VM lives. Memory goes on being a mapping of the base, whose pages
/// are those of an old checkpoint, or of one that was never committed. A page that is discarded (`MADV_DONTNEED`, by a
/// balloon or by free page reporting) does not read as zero then: it reads as what is behind it.
#[derive(Debug)]
pub struct CowCache {
    memory: Arc<Memory>,
    in_colo: AtomicBool,
    /// A commit is over and the guest has not run since, as far as is known.
    is_fresh: AtomicBool,
    /// Discard is forbidden as long as the cache exists, and as long as guest memory is a mapping of the base.
    no_discard: Option<DiscardInhibitor>,
}

impl Drop for CowCache {
    fn drop(&mut self) {
        if let Some(inhibitor) = self.no_discard.take() {
            inhibitor.for_good();
        }
    }
}

/// What a commit is of: the threads that help with it have it too until it is over.
#[derive(Debug)]
struct Memory {
    blocks: Vec<CowBlock>,
    staging: Staging,
    pagemap: Pagemap,
}

impl Memory {
    fn commit(&self, share: &Share, copier: &Copier) -> Result<FlushReport, CacheError> {
        Commit {
            block: block::find(&self.blocks, share.block)?,
            staging: &self.staging,
            pagemap: &self.pagemap,
            copier,
        }
        .words(share.words.clone())
    }
}

impl CowCache {
    /// Makes a cache for `blocks`, whose memory it replaces: it is all zero then. It keeps `inhibitor`, so that no
    /// page of the guest is discarded behind its back, and discard stays forbidden when it is released. If it cannot
    /// be made, the inhibitor is dropped and discard is as it was before.
    ///
    /// # Errors
    /// A block is empty, not made of whole pages, outside its mapping or on top of another block;
    /// or the host cannot provide what is needed.
    pub fn new(
        blocks: Vec<CacheBlockSpec>,
        inhibitor: DiscardInhibitor,
    ) -> Result<Self, CacheError> {
        block::check(&blocks)?;
        let pagemap = Pagemap::open().map_err(CacheError::Pagemap)?;
        let staging = Staging::new(blocks.iter().map(CacheBlockSpec::pages).sum())?;
        let blocks = blocks
            .into_iter()
            .map(CowBlock::new)
            .collect::<Result<Vec<_>, _>>()?;
        // Last: whatever fails before leaves guest memory as it was.
        blocks.iter().try_for_each(CowBlock::put_in_place)?;
        Ok(Self {
            memory: Arc::new(Memory {
                blocks,
                staging,
                pagemap,
            }),
            in_colo: AtomicBool::new(false),
            is_fresh: AtomicBool::new(false),
            no_discard: Some(inhibitor),
        })
    }

    /// Gives the memory back that is not the guest's. RAM discard stays forbidden; see [`RamCache::release`].
    pub fn release(self) {
        drop(self);
    }

    fn in_colo(&self) -> bool {
        self.in_colo.load(Ordering::Acquire)
    }
}

impl RamCache for CowCache {
    fn prepare(
        &self,
        block: usize,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        let (block, offset) = block::locate(&self.memory.blocks, block, offset, len)?;
        if self.in_colo() {
            block.stage(offset, len, &self.memory.staging)
        } else {
            block.prepare(offset, len)
        }
    }

    fn landed(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        block::locate(&self.memory.blocks, block, offset, len).map(drop)
    }

    fn zero(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError> {
        let (block, offset) = block::locate(&self.memory.blocks, block, offset, len)?;
        if self.in_colo() {
            block.stage_zero(offset, len)
        } else {
            block.zero(offset, len)
        }
    }

    fn enter_colo(&self) -> Result<(), CacheError> {
        // From here on whether the guest has a copy of a page is kept account of.
        self.memory
            .blocks
            .iter()
            .try_for_each(CowBlock::drop_copies)?;
        // Pages of checkpoints are received after the primary was sent a message, which is sent
        // after this: the channels order it, and Release/Acquire says so.
        self.in_colo.store(true, Ordering::Release);
        Ok(())
    }

    fn or_dirty_word(&self, block: usize, first_page: u64, word: u64) -> Result<(), CacheError> {
        self.is_fresh.store(false, Ordering::Release);
        block::find(&self.memory.blocks, block)?.note_dirtied(first_page, word)
    }

    fn guest_stopped(&self, _stopped: GuestStopped<'_>) -> Result<(), CacheError> {
        self.is_fresh.store(false, Ordering::Release);
        self.memory
            .blocks
            .iter()
            .try_for_each(|block| block.find_copies_of_dirtied(&self.memory.pagemap))
    }

    fn dirty_pages(&self) -> u64 {
        self.memory.blocks.iter().map(CowBlock::dirty_pages).sum()
    }

    fn commit(
        &self,
        _stopped: GuestStopped<'_>,
        pool: &FlushPool,
    ) -> Result<FlushReport, CacheError> {
        let memory = Arc::clone(&self.memory);
        let work: Vec<_> = memory.blocks.iter().map(|b| (b, b.work())).collect();
        let bytes = work.iter().map(|(_, work)| work.pages).sum::<u64>() * PAGE_SIZE;
        let share = pool.share(bytes);
        let shares: Vec<_> = (work.into_iter().enumerate())
            .flat_map(|(index, (block, work))| {
                let words = match share {
                    None => work.words,
                    Some(bytes) => block.shares(&work.words, bytes / PAGE_SIZE),
                };
                words.into_iter().map(move |words| Share {
                    block: index,
                    words,
                })
            })
            .collect();
        let report = if share.is_none() {
            let copier = Copier::for_flush(bytes);
            shares
                .iter()
                .try_fold(FlushReport::default(), |sum, share| {
                    Ok::<_, CacheError>(sum + memory.commit(share, &copier)?)
                })?
        } else {
            // A copier for each share: dropped by its thread, it orders that thread's copies.
            pool.run(shares, move |share| {
                memory.commit(share, &Copier::for_flush(bytes))
            })?
        };
        self.memory.staging.clear()?;
        self.is_fresh.store(true, Ordering::Release);
        Ok(report)
    }

    fn reclaim(&self, _stopped: GuestStopped<'_>) -> Result<(), CacheError> {
        // A copy that the guest has written since must never be dropped.
        if !self.is_fresh.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.memory
            .blocks
            .iter()
            .try_for_each(CowBlock::drop_cold_copies)
    }

    fn release(self: Box<Self>) {
        drop(self);
    }
}
