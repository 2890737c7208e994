//! Guest RAM in mappings of `vm-memory`'s, as most VMMs have it.
#![allow(unsafe_code)]

use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileSlice};

use crate::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable};
use crate::raw::ram::zero_check;
use crate::{BitmapDirtyLog, GuestRam, MemoryError, PAGE_SIZE, PageStore};

/// What a page is cleared with.
static ZEROES: [u8; 4096] = [0; 4096];
const _: () = assert!(ZEROES.len() as u64 == PAGE_SIZE);

/// Guest RAM of which each block is one mapping: where pages come from ([`GuestRam`]) and where they
/// land ([`PageStore`]).
///
/// ```
/// use migration_stream::GuestRamMmap;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let guest = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
/// let ram = GuestRamMmap::over(&guest, &["pc.ram"])?;
/// # assert_eq!(ram.regions().len(), 1);
/// # Ok(())
/// # }
/// ```
///
/// Pages land in the guest itself, which must not run before all are there: a COLO secondary's guest
/// runs meanwhile, and has a cache in this one's place.
///
/// `B` is the bitmap of the mappings. Pages that land here are not marked in it; what the VMM's devices
/// write is, and [`GuestRamMmap::own_writes`] is the log of that.
#[derive(Debug)]
pub struct GuestRamMmap<B = ()> {
    blocks: RamBlockTable,
    regions: Vec<Arc<MmapRegion<B>>>,
}

impl<B: Bitmap> GuestRamMmap<B> {
    /// Returns the RAM of `guest`, whose regions are blocks of these names, in the order of their guest
    /// addresses.
    ///
    /// # Errors
    /// Not as many names as regions, or the blocks are no valid table.
    pub fn over(guest: &GuestMemoryMmap<B>, names: &[&str]) -> Result<Self, GuestRamMmapError> {
        let regions: Vec<_> = guest.iter().map(|region| region.get_mmap()).collect();
        if regions.len() != names.len() {
            return Err(GuestRamMmapError::Count {
                blocks: names.len(),
                regions: regions.len(),
            });
        }
        let blocks = names.iter().zip(&regions);
        let blocks = blocks.map(|(name, region)| RamBlock::new(*name, region.size() as u64));
        let blocks = RamBlockTable::new(blocks.collect::<Result<_, _>>()?)?;
        Self::new(blocks, regions)
    }

    /// The blocks in these mappings, one for each, in the order of the table. They can be read, and
    /// written if pages are to land in them.
    ///
    /// # Errors
    /// Not as many mappings as blocks, or one that is not as long as its block.
    pub fn new(
        blocks: RamBlockTable,
        regions: Vec<Arc<MmapRegion<B>>>,
    ) -> Result<Self, GuestRamMmapError> {
        if regions.len() != blocks.len() {
            return Err(GuestRamMmapError::Count {
                blocks: blocks.len(),
                regions: regions.len(),
            });
        }
        for ((_, block), region) in blocks.iter().zip(&regions) {
            let mapped = region.size() as u64;
            if mapped != block.used_length() {
                return Err(GuestRamMmapError::Length {
                    name: block.name().to_owned(),
                    used_length: block.used_length(),
                    mapped,
                });
            }
        }
        Ok(Self { blocks, regions })
    }

    /// The blocks.
    #[must_use]
    pub const fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    /// The mappings, in the order of the blocks.
    #[must_use]
    pub fn regions(&self) -> &[Arc<MmapRegion<B>>] {
        &self.regions
    }

    /// The mapping of a block, `None` for an id of another table.
    #[must_use]
    pub fn region(&self, block: BlockId) -> Option<&Arc<MmapRegion<B>>> {
        self.regions.get(block.index())
    }

    fn range(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        let (known, region) = self
            .blocks
            .get(block)
            .zip(self.region(block))
            .ok_or(MemoryError::NoBlock(block))?;
        usize::try_from(offset)
            .ok()
            .and_then(|offset| unmarked(region, offset, len))
            .ok_or_else(|| MemoryError::OutOfBlock {
                name: known.name().to_owned(),
                offset,
                len,
                used_length: known.used_length(),
            })
    }
}

impl GuestRamMmap {
    /// The blocks in private anonymous memory, all zero. It takes up nothing before it is written; how
    /// much there may be of it is for the caller to check, where a peer has announced the blocks.
    ///
    /// # Errors
    /// The host has no addresses for it.
    pub fn anonymous(blocks: RamBlockTable) -> Result<Self, GuestRamMmapError> {
        let regions = blocks.iter().map(|(_, block)| {
            let len = usize::try_from(block.used_length()).unwrap_or(usize::MAX);
            MmapRegion::new(len)
                .map(Arc::new)
                .map_err(|source| GuestRamMmapError::Map {
                    name: block.name().to_owned(),
                    used_length: block.used_length(),
                    source,
                })
        });
        let regions = regions.collect::<Result<_, _>>()?;
        Self::new(blocks, regions)
    }
}

impl GuestRamMmap<AtomicBitmap> {
    /// Returns the log of what was written through these mappings: by the VMM's devices, not by vCPUs.
    #[must_use]
    pub fn own_writes(&self) -> BitmapDirtyLog {
        BitmapDirtyLog::new(self.regions.clone())
    }
}

/// Returns a range of a mapping, without the mapping's bitmap.
fn unmarked<B: Bitmap>(
    region: &MmapRegion<B>,
    offset: usize,
    len: usize,
) -> Option<VolatileSlice<'_>> {
    let end = offset.checked_add(len)?;
    if end > region.size() {
        return None;
    }
    // SAFETY: the range lies in the mapping, which lives as long as the borrow of `region`, and guest
    // memory is only ever accessed through volatile slices.
    Some(unsafe { VolatileSlice::new(region.as_ptr().add(offset), len) })
}

impl<B: Bitmap + Send + Sync> GuestRam for GuestRamMmap<B> {
    fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        self.range(block, offset, len)
    }
}

impl<B: Bitmap + Send + Sync> PageStore for GuestRamMmap<B> {
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
        for at in (0..len).step_by(ZEROES.len()) {
            let page = self.range(block, offset + at as u64, ZEROES.len().min(len - at))?;
            // To read a page that was never written allocates nothing: the host shows its page of
            // zeroes. To write it would.
            if !zero_check(&page) {
                page.copy_from(&ZEROES);
            }
        }
        Ok(())
    }
}

/// Why mappings are not the memory of a table of blocks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestRamMmapError {
    /// There is not one mapping for each block.
    #[error("{regions} mappings were given for {blocks} ram blocks")]
    Count {
        /// How many blocks there are.
        blocks: usize,
        /// How many mappings there are.
        regions: usize,
    },
    /// A mapping is not as long as its block.
    #[error(
        "ram block '{name}' of {used_length:#x} bytes was given a mapping of {mapped:#x} bytes", name = crate::Escaped(.name))]
    Length {
        /// The block's name.
        name: String,
        /// Length of the block, bytes.
        used_length: u64,
        /// Length of the mapping, bytes.
        mapped: u64,
    },
    /// The host did not map memory for a block.
    #[error("cannot map {used_length:#x} bytes for ram block '{name}'", name = crate::Escaped(.name))]
    Map {
        /// The block's name.
        name: String,
        /// Length of the block, bytes.
        used_length: u64,
        /// The host's answer.
        #[source]
        source: MmapRegionError,
    },
    /// The blocks are no valid table.
    #[error(transparent)]
    Blocks(#[from] RamBlockError),
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, VolatileMemory};

    use super::*;
    use crate::ram::RamBlock;

    const RAM: BlockId = BlockId::new(0);
    const ROM: BlockId = BlockId::new(1);

    fn table() -> RamBlockTable {
        RamBlockTable::new(vec![
            RamBlock::new("pc.ram", 4 * PAGE_SIZE).unwrap(),
            RamBlock::new("rom", PAGE_SIZE).unwrap(),
        ])
        .unwrap()
    }

    fn mapping(pages: usize) -> Arc<MmapRegion> {
        Arc::new(MmapRegion::new(pages * ZEROES.len()).unwrap())
    }

    fn ram() -> GuestRamMmap {
        GuestRamMmap::anonymous(table()).unwrap()
    }

    #[test]
    fn there_is_a_mapping_for_each_block_and_as_long() {
        assert!(GuestRamMmap::new(table(), vec![mapping(4), mapping(1)]).is_ok());
        assert!(matches!(
            GuestRamMmap::new(table(), vec![mapping(4)]),
            Err(GuestRamMmapError::Count {
                blocks: 2,
                regions: 1
            })
        ));
        for pages in [1, 3] {
            let error = GuestRamMmap::new(table(), vec![mapping(4), mapping(pages * 2)]);
            assert_eq!(
                error.unwrap_err().to_string(),
                format!(
                    "ram block 'rom' of 0x1000 bytes was given a mapping of {:#x} bytes",
                    pages * 0x2000
                )
            );
        }
    }

    #[test]
    fn memory_that_the_host_does_not_have_is_an_error() {
        let huge = RamBlockTable::new(vec![RamBlock::new("pc.ram", 1 << 62).unwrap()]);
        assert!(matches!(
            GuestRamMmap::anonymous(huge.unwrap()),
            Err(GuestRamMmapError::Map { name, used_length, .. })
                if name == "pc.ram" && used_length == 1 << 62
        ));
    }

    #[test]
    fn what_lands_in_a_block_is_in_its_mapping_and_is_sent_from_there() {
        let rom = mapping(1);
        let ram = GuestRamMmap::new(table(), vec![mapping(4), Arc::clone(&rom)]).unwrap();
        ram.prepare(ROM, 0xffc, 4).unwrap().copy_from(b"last");
        ram.landed(ROM, 0xffc, 4).unwrap();
        let mut bytes = [0; 6];
        rom.as_volatile_slice()
            .read_slice(&mut bytes, 0xffa)
            .unwrap();
        assert_eq!(&bytes, b"\0\0last");
        ram.slice(ROM, 0xffa, 6).unwrap().copy_to(&mut bytes);
        assert_eq!(&bytes, b"\0\0last");
        assert!(Arc::ptr_eq(ram.region(ROM).unwrap(), &rom));
        assert!(zero_check(&ram.slice(RAM, 0, 4 * 4096).unwrap()));
    }

    #[test]
    fn a_range_outside_of_its_block_is_refused_by_all() {
        let ram = ram();
        let all = |block, offset, len| {
            [
                ram.slice(block, offset, len).map(drop),
                ram.prepare(block, offset, len).map(drop),
                ram.landed(block, offset, len),
                ram.zero(block, offset, len),
            ]
        };
        for (id, at, length) in [
            (RAM, 0, 4 * 4096 + 1),
            (RAM, 4 * PAGE_SIZE - 1, 2),
            (ROM, PAGE_SIZE, 1),
            (ROM, u64::MAX, 2),
            (ROM, 1, usize::MAX),
        ] {
            let block = &ram.blocks().get(id).unwrap();
            for refused in all(id, at, length) {
                assert!(
                    matches!(
                        refused,
                        Err(MemoryError::OutOfBlock { ref name, offset, len, used_length })
                            if name == block.name() && (offset, len) == (at, length)
                                && used_length == block.used_length()
                    ),
                    "{refused:?}"
                );
            }
        }
        let unknown = BlockId::new(2);
        for refused in all(unknown, 0, 1) {
            assert!(matches!(refused, Err(MemoryError::NoBlock(id)) if id == unknown));
        }
        assert!(ram.region(unknown).is_none());
        for allowed in all(RAM, 0, 4 * 4096) {
            allowed.unwrap();
        }
    }

    #[test]
    fn zero_pages_clear_what_was_there_and_no_more() {
        let ram = ram();
        ram.slice(RAM, 0, 4 * 4096)
            .unwrap()
            .copy_from(&[7_u8; 4 * 4096]);
        ram.zero(RAM, PAGE_SIZE, 2 * 4096).unwrap();
        // No stream asks for less than a page; what is asked for is done.
        ram.zero(RAM, 3 * PAGE_SIZE, 1).unwrap();
        let mut bytes = vec![0xff_u8; 4 * 4096];
        ram.slice(RAM, 0, bytes.len()).unwrap().copy_to(&mut bytes);
        let expected = [vec![7; 4096], vec![0; 2 * 4096 + 1], vec![7; 4095]].concat();
        assert!(bytes == expected);
    }

    /// Whether a page of its own lies behind this address, and not the page of zeroes that all share:
    /// bit 56 of the page's word in pagemap, as `Documentation/admin-guide/mm/pagemap.rst` has it.
    fn is_allocated(region: &MmapRegion, page: usize) -> bool {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut word = [0; 8];
        let index = region.as_ptr() as usize / 4096 + page;
        pagemap.read_exact_at(&mut word, index as u64 * 8).unwrap();
        u64::from_le_bytes(word) >> 56 & 1 == 1
    }

    #[test]
    fn a_page_that_was_never_written_stays_unallocated_when_it_is_zero() {
        let ram = ram();
        ram.zero(RAM, 0, 4 * 4096).unwrap();
        let region = ram.region(RAM).unwrap();
        assert!((0..4).all(|page| !is_allocated(region, page)));
        region.as_volatile_slice().write_obj(0_u8, 0).unwrap();
        assert!(is_allocated(region, 0), "a page that was written is");
    }
}
