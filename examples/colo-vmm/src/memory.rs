//! Guest RAM: where it lies in the guest's physical address space, and how migration sees it.
//!
//! ```text
//! 0              RAM, at most 3 GiB            block "pc.ram"
//! 0xc000_0000    hole: LAPIC, IOAPIC, KVM's own pages
//! 0x1_0000_0000  the rest of RAM, if any       block "pc.ram-above-4g"
//! ```
//!
//! A RAM block is one mapping, so that no slice ever crosses a seam.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

use migration_stream::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable};
use migration_stream::{GuestRamMmap, GuestRamMmapError, PAGE_SIZE};
use ram_cache::{Populate, PopulateError, Populated, advise_huge_pages};
use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

/// First address of the hole below 4 GiB in which RAM would hide the interrupt controllers.
pub const HOLE_START: u64 = 0xc000_0000;
/// First address above the hole.
pub const HOLE_END: u64 = 1 << 32;

/// The RAM block that begins at address 0.
pub const LOW_BLOCK: &str = "pc.ram";
/// The RAM block that begins at [`HOLE_END`].
pub const HIGH_BLOCK: &str = "pc.ram-above-4g";

/// One RAM block in its place.
#[derive(Clone, Debug)]
pub struct Region {
    /// The block's id in [`Memory::ram`].
    pub block: BlockId,
    /// Where the guest sees it.
    pub base: GuestAddress,
    /// Where this process sees it.
    pub mapping: Arc<MmapRegion<()>>,
}

/// All RAM of a VM.
#[derive(Debug)]
pub struct Memory {
    regions: Vec<Region>,
    ram: Arc<GuestRamMmap>,
    guest: GuestMemoryMmap<()>,
}

/// Why RAM could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemorySetupError {
    /// Not a size that RAM can have.
    #[error("guest memory of {bytes:#x} bytes: expected at least 1 MiB, in whole pages")]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The host did not map it.
    #[error(transparent)]
    Map(#[from] GuestRamMmapError),
    /// The regions do not make up an address space.
    #[error("guest memory regions do not fit together")]
    Regions(#[from] GuestRegionCollectionError),
    /// The blocks do not make up a table.
    #[error(transparent)]
    Blocks(#[from] RamBlockError),
}

/// Name, guest address and length of the blocks of a VM with `bytes` of RAM.
///
/// # Errors
/// The size is less than 1 MiB or no multiple of the page size.
pub fn layout(bytes: u64) -> Result<Vec<(&'static str, GuestAddress, u64)>, MemorySetupError> {
    if bytes < 1 << 20 || !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(MemorySetupError::Size { bytes });
    }
    let low = bytes.min(HOLE_START);
    let mut blocks = vec![(LOW_BLOCK, GuestAddress(0), low)];
    if bytes > low {
        blocks.push((HIGH_BLOCK, GuestAddress(HOLE_END), bytes - low));
    }
    Ok(blocks)
}

impl Memory {
    /// RAM of `bytes` bytes in private anonymous memory, all zero, not yet allocated.
    ///
    /// # Errors
    /// See [`MemorySetupError`].
    pub fn new(bytes: u64) -> Result<Self, MemorySetupError> {
        let layout = layout(bytes)?;
        let blocks = layout
            .iter()
            .map(|(name, _, length)| RamBlock::new(*name, *length));
        let blocks = RamBlockTable::new(blocks.collect::<Result<_, _>>()?)?;
        let ram = GuestRamMmap::anonymous(blocks)?;
        let mut regions = Vec::new();
        let mut guest = Vec::new();
        let mappings = ram.blocks().iter().zip(ram.regions());
        for (((block, _), mapping), (_, base, _)) in mappings.zip(layout) {
            let mapping = Arc::clone(mapping);
            let region = GuestRegionMmap::with_arc(Arc::clone(&mapping), base)
                .ok_or(MemorySetupError::Size { bytes })?;
            guest.push(region);
            regions.push(Region {
                block,
                base,
                mapping,
            });
        }
        Ok(Self {
            regions,
            ram: Arc::new(ram),
            guest: GuestMemoryMmap::from_regions(guest)?,
        })
    }

    /// Asks for huge pages, see [`advise_huge_pages`].
    ///
    /// # Errors
    /// The kernel has none.
    pub fn advise_huge_pages(&self) -> Result<(), PopulateError> {
        let mut regions = self.ram.regions().iter();
        regions.try_for_each(|region| advise_huge_pages(region))
    }

    /// Takes all of it from the system, by as many threads as there are cores.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn populate(&self) -> Result<Populate, PopulateError> {
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Populate::start(self.ram.regions().to_vec(), threads)
    }

    /// The blocks in their places, in the order of [`Memory::ram`].
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// RAM by block, for migration. Pages of plain live migration land in the guest itself: it does not
    /// run before all are there.
    #[must_use]
    pub const fn ram(&self) -> &Arc<GuestRamMmap> {
        &self.ram
    }

    /// RAM by guest physical address, for loaders and devices.
    #[must_use]
    pub const fn guest(&self) -> &GuestMemoryMmap<()> {
        &self.guest
    }

    /// Size of RAM, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ram.blocks().total_bytes()
    }
}

/// Waits until guest RAM is there.
///
/// # Errors
/// It is not to be had.
pub fn populated(populate: Populate) -> Result<(), PopulateError> {
    if populate.join()? == Populated::Unsupported {
        tracing::warn!(
            "guest ram cannot be populated, and is taken from the system as it is written"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use migration_stream::GuestRam;
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn ram_beyond_three_gib_continues_above_the_hole() {
        let four = layout(4 << 30).unwrap();
        assert_eq!(
            four,
            [
                (LOW_BLOCK, GuestAddress(0), 3 << 30),
                (HIGH_BLOCK, GuestAddress(1 << 32), 1 << 30)
            ]
        );
        assert_eq!(layout(3 << 30).unwrap().len(), 1);
        assert!(layout(4095).is_err());
        assert!(layout((1 << 20) + 1).is_err());
    }

    #[test]
    fn a_block_and_the_guest_see_the_same_bytes() {
        let memory = Memory::new(5 << 30).unwrap();
        memory
            .guest()
            .write_obj(0x1234_5678u32, GuestAddress(HOLE_END + 0x2000))
            .unwrap();
        let mut seen = [0u8; 4];
        memory
            .ram()
            .slice(BlockId::new(1), 0x2000, 4)
            .unwrap()
            .copy_to(&mut seen[..]);
        assert_eq!(u32::from_le_bytes(seen), 0x1234_5678);
        assert!(!memory.guest().address_in_range(GuestAddress(HOLE_START)));
        assert_eq!(memory.bytes(), 5 << 30);
    }
}
