//! Guest memory as a VMM has it: mapped, in huge pages where the system gives them, and new.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::tests::Result;
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::{GuestRam, GuestRamMmap, MemoryError, PAGE_SIZE, PageStore};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// The block that the file of a run stands behind.
pub const MAIN: &str = "ram0";

/// Has the system ready to give `len` bytes. Where this machine is itself a guest, memory that it has
/// not used of late is first to be had from the host: that is not what is measured.
pub fn warm(len: u64) -> Result<()> {
    let region: MmapRegion = MmapRegion::new(usize::try_from(len)?)?;
    advise_huge(&region);
    populate(&region)
}

/// QEMU asks for huge pages too. A system that has none gives others.
fn advise_huge(region: &MmapRegion) {
    // SAFETY: the range is the whole of a mapping that `region` keeps; the advice changes how it is
    // backed, not what is in it.
    unsafe {
        libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE);
    }
}

/// Takes the memory from the system. What is in it stays.
fn populate(region: &MmapRegion) -> Result<()> {
    let advice = libc::MADV_POPULATE_WRITE;
    // SAFETY: the range is the whole of a mapping that `region` keeps; its content does not change.
    let ret = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    if ret == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}

/// The memory of a guest.
#[derive(Debug)]
pub struct Ram {
    ram: GuestRamMmap,
    /// A bit for each page of each block that was written: the others are zero because nobody touched
    /// them, and are not looked at.
    written: Vec<Vec<AtomicU64>>,
}

impl Ram {
    /// New memory for these blocks.
    pub fn fresh(blocks: &[(String, u64)]) -> Result<Self> {
        Self::new(blocks, |len| Ok(MmapRegion::new(len)?))
    }

    /// New memory, of which the main block begins as the content of `file`.
    pub fn with_content(blocks: &[(String, u64)], file: &Path) -> Result<Self> {
        let main = blocks.iter().position(|(name, _)| name == MAIN);
        let mut index = 0;
        Self::new(blocks, |len| {
            let is_main = main == Some(index);
            index += 1;
            if !is_main {
                return Ok(MmapRegion::new(len)?);
            }
            let file = FileOffset::new(File::open(file)?, 0);
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            Ok(MmapRegion::build(Some(file), len, prot, flags)?)
        })
    }

    /// Takes all of it from the system, as a destination can while it waits for its source.
    pub fn populate(&self) -> Result<()> {
        self.ram.regions().iter().try_for_each(|r| populate(r))
    }

    /// A copy of the main block.
    pub fn content(&self) -> Result<Vec<u8>> {
        let main = self.ram.blocks().find(MAIN.as_bytes());
        let region = main.and_then(|id| self.ram.region(id));
        let all = region.ok_or("no main block")?.as_volatile_slice();
        let mut bytes = vec![0; all.len()];
        all.copy_to(&mut bytes);
        Ok(bytes)
    }

    fn new(
        blocks: &[(String, u64)],
        mut map: impl FnMut(usize) -> Result<MmapRegion>,
    ) -> Result<Self> {
        let mut table = Vec::new();
        let mut regions = Vec::new();
        let mut written = Vec::new();
        for (name, len) in blocks {
            table.push(RamBlock::new(name.as_str(), *len)?);
            let region = map(usize::try_from(*len)?)?;
            advise_huge(&region);
            regions.push(Arc::new(region));
            let words = len.div_ceil(PAGE_SIZE * 64);
            written.push((0..words).map(|_| AtomicU64::new(0)).collect());
        }
        Ok(Self {
            ram: GuestRamMmap::new(RamBlockTable::new(table)?, regions)?,
            written,
        })
    }

    /// The words of the pages of a range, and which bits of them.
    fn pages(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (u64, &AtomicU64, u64)> {
        let words = self.written.get(block.index());
        let first = offset / PAGE_SIZE;
        (first..first + len as u64 / PAGE_SIZE).filter_map(move |page| {
            let word = words?.get(usize::try_from(page / 64).ok()?)?;
            Some((page, word, 1 << (page % 64)))
        })
    }
}

impl GuestRam for Ram {
    fn blocks(&self) -> &RamBlockTable {
        self.ram.blocks()
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<VolatileSlice<'_>, MemoryError> {
        self.ram.slice(block, offset, len)
    }
}

impl PageStore for Ram {
    fn blocks(&self) -> &RamBlockTable {
        self.ram.blocks()
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<VolatileSlice<'_>, MemoryError> {
        self.ram.prepare(block, offset, len)
    }

    fn landed(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<(), MemoryError> {
        for (_, word, bit) in self.pages(block, offset, len) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(())
    }

    fn zero(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<(), MemoryError> {
        self.ram.landed(block, offset, len)?;
        for (page, word, bit) in self.pages(block, offset, len) {
            if word.load(Ordering::Relaxed) & bit != 0 {
                self.ram
                    .slice(block, page * PAGE_SIZE, 4096)?
                    .copy_from(&[0_u8; 4096]);
            }
        }
        Ok(())
    }
}
