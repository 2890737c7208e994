//! A page store for tests: plain memory for each block, and nothing else.

use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::{GuestRam, MemoryError, PageStore};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::Result;

/// Memory for the blocks of a table.
#[derive(Debug)]
pub struct Memory {
    blocks: RamBlockTable,
    regions: Vec<MmapRegion>,
}

impl Memory {
    /// Memory of `blocks`, filled with a byte that is not zero: a page that never arrives cannot
    /// pass for one that arrived as zero.
    ///
    /// # Errors
    /// There is not enough of it.
    pub fn new(blocks: RamBlockTable) -> Result<Self> {
        let mut regions = Vec::with_capacity(blocks.len());
        for (_, block) in blocks.iter() {
            let region = MmapRegion::new(usize::try_from(block.used_length())?)?;
            let all = region.as_volatile_slice();
            all.copy_from(&vec![0xa5_u8; all.len()]);
            regions.push(region);
        }
        Ok(Self { blocks, regions })
    }

    /// A copy of the block called `name`.
    ///
    /// # Errors
    /// There is no such block.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let id = self
            .blocks
            .find(name.as_bytes())
            .ok_or_else(|| format!("no block {name} among {:?}", self.blocks))?;
        let all = self.regions[id.index()].as_volatile_slice();
        let mut bytes = vec![0; all.len()];
        all.copy_to(&mut bytes);
        Ok(bytes)
    }

    fn range(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<VolatileSlice<'_>, MemoryError> {
        let known = self.blocks.get(block).ok_or(MemoryError::NoBlock(block))?;
        let outside = || MemoryError::OutOfBlock {
            name: known.name().to_owned(),
            offset,
            len,
            used_length: known.used_length(),
        };
        let start = usize::try_from(offset).map_err(|_| outside())?;
        self.regions[block.index()]
            .get_slice(start, len)
            .map_err(|_| outside())
    }
}

impl GuestRam for Memory {
    fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<VolatileSlice<'_>, MemoryError> {
        self.range(block, offset, len)
    }
}

impl PageStore for Memory {
    fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<VolatileSlice<'_>, MemoryError> {
        self.range(block, offset, len)
    }

    fn landed(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<(), MemoryError> {
        self.range(block, offset, len).map(drop)
    }

    fn zero(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<(), MemoryError> {
        self.range(block, offset, len)?.copy_from(&vec![0_u8; len]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use migration_stream::ram::RamBlock;

    use super::*;

    #[test]
    fn what_lands_is_there_and_what_does_not_is_not_zero() {
        let blocks = RamBlockTable::new(vec![RamBlock::new("ram", 0x2000).unwrap()]).unwrap();
        let memory = Memory::new(blocks).unwrap();
        let id = BlockId::new(0);
        memory.zero(id, 0, 0x1000).unwrap();
        memory.prepare(id, 0x1ffc, 4).unwrap().copy_from(b"last");
        memory.landed(id, 0x1ffc, 4).unwrap();
        let bytes = memory.bytes("ram").unwrap();
        assert!(bytes[..0x1000].iter().all(|b| *b == 0));
        assert_eq!(&bytes[0x1ffa..], b"\xa5\xa5last");
        assert!(memory.prepare(id, 0x1ffd, 4).is_err());
        assert!(memory.bytes("rom").is_err());
    }
}
