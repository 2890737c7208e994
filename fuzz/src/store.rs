//! Guest memory as a stream announces it.

use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::{GuestRamMmap, MemoryError, PAGE_SIZE, PageStore};
use vm_memory::VolatileSlice;

/// The most memory that is given to a stream, bytes. Nothing of it is taken before it is written.
const LIMIT: u64 = 64 << 20;

/// Memory of a guest.
#[derive(Debug)]
pub struct Store(GuestRamMmap);

impl Store {
    /// Memory for these blocks, if it is not too much.
    ///
    /// # Panics
    /// The system has none.
    #[must_use]
    pub fn new(blocks: RamBlockTable) -> Option<Self> {
        let fits = blocks.total_bytes() <= LIMIT;
        fits.then(|| Self(GuestRamMmap::anonymous(blocks).expect("memory")))
    }

    fn range(&self, block: BlockId, offset: u64, len: usize) -> VolatileSlice<'_> {
        // The libraries have checked the range: a store is not where that is found out.
        self.0
            .prepare(block, offset, len)
            .expect("a range that was checked")
    }
}

impl PageStore for Store {
    fn blocks(&self) -> &RamBlockTable {
        self.0.blocks()
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        Ok(self.range(block, offset, len))
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.range(block, offset, len);
        Ok(())
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.range(block, offset, len);
        // Every page of a large block would take longer than all the rest.
        let last = offset + (len as u64).saturating_sub(PAGE_SIZE);
        for at in [offset, last] {
            self.range(block, at, len.min(4096))
                .copy_from(&[0_u8; 4096]);
        }
        Ok(())
    }
}
