//! The memory of a guest whose blocks are known only when its source announces them.

use std::sync::Arc;

use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::{
    GuestRam, GuestRamMmap, GuestRamMmapError, MemoryError, PAGE_SIZE, PageStore,
};
use ram_cache::{BitmapError, DirtyBitmap, PAGES_PER_WORD, PageRun};
use vm_memory::VolatileSlice;

use crate::progress::Progress;

/// How much memory this machine has, bytes.
#[must_use]
pub fn memory_of_this_machine() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// Anonymous memory for each block. A page that is zero takes nothing up, however often it is read:
/// a file in memory would be given a page of its own by the first look at it.
#[derive(Debug)]
pub struct Memory {
    ram: GuestRamMmap,
    /// Pages that have landed since somebody took note of it, a bitmap for each block.
    landed: Vec<DirtyBitmap>,
    progress: Arc<Progress>,
}

impl Memory {
    /// Address space for `blocks`; what arrives in it counts as incoming.
    ///
    /// # Errors
    /// [`HoldError`]: the guest is larger than `limit` bytes, or than the address space.
    pub fn new(
        blocks: RamBlockTable,
        limit: u64,
        progress: Arc<Progress>,
    ) -> Result<Self, HoldError> {
        let total = blocks.total_bytes();
        if total > limit {
            return Err(HoldError::TooLarge { total, limit });
        }
        progress.set_memory(total);
        let ram = GuestRamMmap::anonymous(blocks)?;
        let bitmaps = ram
            .blocks()
            .iter()
            .map(|(_, block)| DirtyBitmap::new(block.pages()));
        Ok(Self {
            landed: bitmaps.collect::<Result<_, _>>()?,
            ram,
            progress,
        })
    }

    /// The blocks.
    #[must_use]
    pub const fn blocks(&self) -> &RamBlockTable {
        self.ram.blocks()
    }

    /// The memory itself. What is written there does not count as landed.
    #[must_use]
    pub const fn ram(&self) -> &GuestRamMmap {
        &self.ram
    }

    /// Calls `sink(block, first_page, word)` for the pages that have landed since the last call, as
    /// [`DirtyLog::sync`](migration_stream::DirtyLog::sync) does.
    pub(crate) fn take_landed(&self, sink: &mut dyn FnMut(BlockId, u64, u64)) {
        for ((block, _), landed) in self.blocks().iter().zip(&self.landed) {
            for PageRun { first_page, pages } in landed.drain_runs() {
                let (mut page, end) = (first_page, first_page + pages);
                while page < end {
                    let first = page / PAGES_PER_WORD * PAGES_PER_WORD;
                    let next = end.min(first + PAGES_PER_WORD);
                    let run = u64::MAX >> (PAGES_PER_WORD - (next - page));
                    sink(block, first, run << (page - first));
                    page = next;
                }
            }
        }
    }

    fn mark(&self, block: BlockId, offset: u64, len: usize) -> Result<u64, MemoryError> {
        let pages = len as u64 / PAGE_SIZE;
        let landed = self.landed.get(block.index());
        landed
            .ok_or(MemoryError::NoBlock(block))?
            .set_range(offset / PAGE_SIZE, pages)
            .map_err(|source| MemoryError::Backend {
                what: "noting what has landed",
                source: source.into(),
            })?;
        Ok(pages)
    }
}

impl GuestRam for Memory {
    fn blocks(&self) -> &RamBlockTable {
        self.ram.blocks()
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        self.ram.slice(block, offset, len)
    }
}

impl PageStore for Memory {
    fn blocks(&self) -> &RamBlockTable {
        self.ram.blocks()
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        self.ram.prepare(block, offset, len)
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.ram.landed(block, offset, len)?;
        let pages = self.mark(block, offset, len)?;
        self.progress.incoming.add_pages(pages);
        Ok(())
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.ram.zero(block, offset, len)?;
        let pages = self.mark(block, offset, len)?;
        self.progress.incoming.add_zero_pages(pages);
        Ok(())
    }
}

/// Why a guest cannot be held.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// It is larger than it may be.
    #[error("the guest has {total} bytes of memory, more than the {limit} that may be held")]
    TooLarge {
        /// Its size, bytes.
        total: u64,
        /// The limit, bytes.
        limit: u64,
    },
    /// The system has no room for it.
    #[error(transparent)]
    Map(#[from] GuestRamMmapError),
    /// The system has no room to note what has landed of it.
    #[error("noting what has landed of a guest's memory")]
    Landed(#[from] BitmapError),
}

#[cfg(test)]
mod tests {
    use migration_stream::ram::RamBlock;
    use migration_stream::raw::ram::zero_check;

    use super::*;

    fn blocks() -> RamBlockTable {
        RamBlockTable::new(vec![
            RamBlock::new("pc.ram", 4 * PAGE_SIZE).unwrap(),
            RamBlock::new("rom", PAGE_SIZE).unwrap(),
        ])
        .unwrap()
    }

    #[test]
    fn what_landed_is_there_until_it_is_cleared_and_is_counted() {
        let progress = Arc::<Progress>::default();
        let memory = Memory::new(blocks(), u64::MAX, Arc::clone(&progress)).unwrap();
        assert_eq!(progress.memory(), 5 * PAGE_SIZE);
        let id = BlockId::new(0);
        let pages = memory.prepare(id, PAGE_SIZE, 2 * 4096).unwrap();
        pages.copy_from(&[7_u8; 2 * 4096]);
        memory.landed(id, PAGE_SIZE, 2 * 4096).unwrap();
        memory.zero(id, 2 * PAGE_SIZE, 2 * 4096).unwrap();
        let all = memory.slice(id, 0, 4 * 4096).unwrap();
        let is_zero: Vec<_> = (0..4)
            .map(|page| zero_check(&all.subslice(page * 4096, 4096).unwrap()))
            .collect();
        assert_eq!(is_zero, [true, false, true, true]);
        assert_eq!(progress.incoming.pages(), 2);
        assert_eq!(progress.incoming.zero_pages(), 2);
    }

    #[test]
    fn a_range_outside_of_its_block_is_refused() {
        let memory = Memory::new(blocks(), u64::MAX, Arc::default()).unwrap();
        for (block, offset, len) in [(1, PAGE_SIZE, 1), (0, u64::MAX, 2), (0, 1, 4 * 4096)] {
            let id = BlockId::new(block);
            assert!(memory.prepare(id, offset, len).is_err());
            assert!(memory.landed(id, offset, len).is_err());
            assert!(memory.zero(id, offset, len).is_err());
        }
        assert!(matches!(
            memory.slice(BlockId::new(2), 0, 1),
            Err(MemoryError::NoBlock(_))
        ));
    }

    #[test]
    fn a_guest_larger_than_the_limit_is_refused_before_memory_is_taken() {
        let huge = RamBlock::new("pc.ram", 1 << 62).unwrap();
        let huge = RamBlockTable::new(vec![huge]).unwrap();
        assert!(matches!(
            Memory::new(huge.clone(), 1 << 40, Arc::default()),
            Err(HoldError::TooLarge { limit, .. }) if limit == 1 << 40
        ));
        assert!(matches!(
            Memory::new(huge, u64::MAX, Arc::default()),
            Err(HoldError::Map { .. })
        ));
    }
}
