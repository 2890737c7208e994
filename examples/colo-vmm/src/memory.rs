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

use migration_stream::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable, zero_check};
use migration_stream::{GuestRam, MemoryError, PAGE_SIZE, PageStore};
use ram_cache::{Populate, PopulateError, Populated, advise_huge_pages};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
    VolatileMemory, VolatileSlice,
};

/// First address of the hole below 4 GiB in which RAM would hide the interrupt controllers.
pub const HOLE_START: u64 = 0xc000_0000;
/// First address above the hole.
pub const HOLE_END: u64 = 1 << 32;

/// The RAM block that begins at address 0.
pub const LOW_BLOCK: &str = "pc.ram";
/// The RAM block that begins at [`HOLE_END`].
pub const HIGH_BLOCK: &str = "pc.ram-above-4g";

/// A page of nothing.
const ZEROES: [u8; 4096] = [0; 4096];

/// One RAM block in its place.
#[derive(Clone, Debug)]
pub struct Region {
    /// The block's id in [`Memory::blocks`](GuestRam::blocks).
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
    blocks: RamBlockTable,
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
    #[error("cannot map {length:#x} bytes for ram block '{block}'")]
    Map {
        /// The block's name.
        block: &'static str,
        /// Its length, bytes.
        length: u64,
        /// The host's answer.
        #[source]
        source: MmapRegionError,
    },
    /// A mapping that was handed in has another size than its block.
    #[error("ram block '{block}' of {length:#x} bytes was given a mapping of {mapped:#x} bytes")]
    MappedSize {
        /// The block's name.
        block: &'static str,
        /// Its length, bytes.
        length: u64,
        /// The mapping's length, bytes.
        mapped: u64,
    },
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
        Self::with_mappings(bytes, |block, length| {
            usize::try_from(length)
                .map_err(|_| MemorySetupError::Size { bytes: length })
                .and_then(|length_usize| {
                    MmapRegion::new(length_usize).map_err(|source| MemorySetupError::Map {
                        block,
                        length,
                        source,
                    })
                })
                .map(Arc::new)
        })
    }

    /// RAM of `bytes` bytes in mappings of the caller's: `map(name, length)` is called once for
    /// each block of [`layout`]. A RAM cache that shares pages with the guest comes in here.
    ///
    /// # Errors
    /// Those of `map`; a mapping of another length than asked for.
    pub fn with_mappings(
        bytes: u64,
        mut map: impl FnMut(&'static str, u64) -> Result<Arc<MmapRegion<()>>, MemorySetupError>,
    ) -> Result<Self, MemorySetupError> {
        let mut regions = Vec::new();
        let mut blocks = Vec::new();
        let mut guest = Vec::new();
        for (index, (name, base, length)) in (0u32..).zip(layout(bytes)?) {
            let mapping = map(name, length)?;
            if mapping.size() as u64 != length {
                return Err(MemorySetupError::MappedSize {
                    block: name,
                    length,
                    mapped: mapping.size() as u64,
                });
            }
            let region = GuestRegionMmap::with_arc(Arc::clone(&mapping), base)
                .ok_or(MemorySetupError::Size { bytes })?;
            guest.push(region);
            blocks.push(RamBlock::new(name, length)?);
            regions.push(Region {
                block: BlockId::new(index),
                base,
                mapping,
            });
        }
        Ok(Self {
            regions,
            blocks: RamBlockTable::new(blocks)?,
            guest: GuestMemoryMmap::from_regions(guest)?,
        })
    }

    /// Asks for huge pages, see [`advise_huge_pages`].
    ///
    /// # Errors
    /// The kernel has none.
    pub fn advise_huge_pages(&self) -> Result<(), PopulateError> {
        let mut regions = self.regions.iter();
        regions.try_for_each(|region| advise_huge_pages(&region.mapping))
    }

    /// Takes all of it from the system, by as many threads as there are cores.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn populate(&self) -> Result<Populate, PopulateError> {
        let regions = self
            .regions
            .iter()
            .map(|region| Arc::clone(&region.mapping));
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Populate::start(regions.collect(), threads)
    }

    /// The blocks in their places, in the order of [`Memory::blocks`](GuestRam::blocks).
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// RAM by guest physical address, for loaders and devices.
    #[must_use]
    pub const fn guest(&self) -> &GuestMemoryMmap<()> {
        &self.guest
    }

    /// Size of RAM, bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.blocks.total_bytes()
    }

    fn checked(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        let region = self
            .regions
            .get(block.index())
            .ok_or(MemoryError::NoBlock(block))?;
        usize::try_from(offset)
            .ok()
            .and_then(|offset| region.mapping.get_slice(offset, len).ok())
            .ok_or_else(|| {
                let (name, used_length) = self
                    .blocks
                    .get(block)
                    .map_or_else(Default::default, |b| (b.name().to_owned(), b.used_length()));
                MemoryError::OutOfBlock {
                    name,
                    offset,
                    len,
                    used_length,
                }
            })
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

impl GuestRam for Memory {
    fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        self.checked(block, offset, len)
    }
}

/// Pages of plain live migration land in the guest itself: it does not run before all are there.
impl PageStore for Memory {
    fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        self.checked(block, offset, len)
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.checked(block, offset, len).map(drop)
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        let slice = self.checked(block, offset, len)?;
        for at in (0..len).step_by(ZEROES.len()) {
            let part = slice
                .subslice(at, ZEROES.len().min(len - at))
                .map_err(|source| MemoryError::Backend {
                    what: "guest memory cannot be sliced",
                    source: source.into(),
                })?;
            // Reading a page that was never touched maps the host's zero page and allocates
            // nothing; writing it would allocate.
            if !zero_check(&part) {
                part.copy_from(&ZEROES);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
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
            .slice(BlockId::new(1), 0x2000, 4)
            .unwrap()
            .copy_to(&mut seen[..]);
        assert_eq!(u32::from_le_bytes(seen), 0x1234_5678);
        assert!(!memory.guest().address_in_range(GuestAddress(HOLE_START)));
        assert_eq!(memory.bytes(), 5 << 30);
    }

    #[test]
    fn slices_stay_within_their_block() {
        let memory = Memory::new(1 << 20).unwrap();
        let low = BlockId::new(0);
        assert!(memory.slice(low, (1 << 20) - 4096, 4096).is_ok());
        assert!(matches!(
            memory.slice(low, (1 << 20) - 4096, 4097),
            Err(MemoryError::OutOfBlock { .. })
        ));
        assert!(memory.slice(low, u64::MAX, 1).is_err());
        assert!(matches!(
            memory.slice(BlockId::new(1), 0, 1),
            Err(MemoryError::NoBlock(_))
        ));
    }

    #[test]
    fn a_zero_page_clears_what_was_there() {
        let memory = Memory::new(1 << 20).unwrap();
        let at = GuestAddress(0x3000);
        memory.guest().write_obj(7u64, at).unwrap();
        memory.zero(BlockId::new(0), 0x2000, 0x3000).unwrap();
        assert_eq!(memory.guest().read_obj::<u64>(at).unwrap(), 0);
    }
}
