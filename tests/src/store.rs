//! Where pages land in tests, and what is there then.

use migration_stream::GuestRamMmap;
use migration_stream::ram::RamBlockTable;
use vm_memory::VolatileMemory;

use crate::Result;

/// Memory of `blocks`, filled with a byte that is not zero: a page that never arrives cannot pass for
/// one that arrived as zero.
///
/// # Errors
/// There is not enough of it.
pub fn memory(blocks: RamBlockTable) -> Result<GuestRamMmap> {
    let memory = GuestRamMmap::anonymous(blocks)?;
    for region in memory.regions() {
        let all = region.as_volatile_slice();
        all.copy_from(&vec![0xa5_u8; all.len()]);
    }
    Ok(memory)
}

/// A copy of the block called `name`.
///
/// # Errors
/// There is no such block.
pub fn bytes(memory: &GuestRamMmap, name: &str) -> Result<Vec<u8>> {
    let blocks = memory.blocks();
    let region = blocks
        .find(name.as_bytes())
        .and_then(|id| memory.region(id))
        .ok_or_else(|| format!("no block {name} among {blocks:?}"))?;
    let all = region.as_volatile_slice();
    let mut bytes = vec![0; all.len()];
    all.copy_to(&mut bytes);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use migration_stream::PageStore;
    use migration_stream::ram::{BlockId, RamBlock};

    use super::*;

    #[test]
    fn what_lands_is_there_and_what_does_not_is_not_zero() {
        let blocks = RamBlockTable::new(vec![RamBlock::new("ram", 0x2000).unwrap()]).unwrap();
        let memory = memory(blocks).unwrap();
        let id = BlockId::new(0);
        memory.zero(id, 0, 0x1000).unwrap();
        memory.prepare(id, 0x1ffc, 4).unwrap().copy_from(b"last");
        memory.landed(id, 0x1ffc, 4).unwrap();
        let ram = bytes(&memory, "ram").unwrap();
        assert!(ram[..0x1000].iter().all(|b| *b == 0));
        assert_eq!(&ram[0x1ffa..], b"\xa5\xa5last");
        assert!(bytes(&memory, "rom").is_err());
    }
}
