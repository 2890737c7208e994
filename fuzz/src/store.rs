//! Guest memory as a stream announces it.

use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::{MemoryError, PAGE_SIZE, PageStore};
use vm_memory::mmap::MmapRegion;
use vm_memory::{VolatileMemory, VolatileSlice};

/// The most memory that is given to a stream, bytes. Nothing of it is taken before it is written.
const LIMIT: u64 = 64 << 20;

/// Memory of a guest.
#[derive(Debug)]
pub struct Store {
    blocks: RamBlockTable,
    regions: Vec<MmapRegion>,
}

impl Store {
    /// Memory for these blocks, if it is not too much.
    ///
    /// # Panics
    /// The system has none.
    #[must_use]
    pub fn new(blocks: RamBlockTable) -> Option<Self> {
        let lengths: Vec<u64> = blocks.iter().map(|(_, b)| b.used_length()).collect();
        let total = lengths
            .iter()
            .try_fold(0_u64, |sum, len| sum.checked_add(*len));
        total.filter(|total| *total <= LIMIT)?;
        let regions = lengths
            .into_iter()
            .map(|len| {
                let len = usize::try_from(len).expect("below the limit");
                MmapRegion::new(len).expect("memory")
            })
            .collect();
        Some(Self { blocks, regions })
    }

    fn range(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        let region = self
            .regions
            .get(block.index())
            .ok_or(MemoryError::NoBlock(block))?;
        let start = usize::try_from(offset).expect("an offset that was checked");
        // The libraries have checked the range: a store is not where that is found out.
        Ok(region
            .get_slice(start, len)
            .expect("a range that was checked"))
    }
}

impl PageStore for Store {
    fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        self.range(block, offset, len)
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.range(block, offset, len).map(drop)
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.range(block, offset, len)?;
        // Every page of a large block would take longer than all the rest.
        let last = offset + (len as u64).saturating_sub(PAGE_SIZE);
        for at in [offset, last] {
            let page = self.range(block, at, len.min(4096))?;
            page.copy_from(&[0_u8; 4096]);
        }
        Ok(())
    }
}
