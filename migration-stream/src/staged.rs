//! Guest RAM beside which copies of pages can be kept, so that what is sent is the memory of one moment
//! while the guest runs on.
//!
//! The copies lie at the same offsets as the pages, in mappings of the blocks' sizes: pages that
//! follow each other do so in both, and a packet of them is one piece. Memory is taken up where a
//! page was copied, and used again for the next copy of it. A page that was not copied in the last
//! two rounds gives its memory back, so that what the copies take up is what is written again and again.
#![allow(unsafe_code)] // MADV_DONTNEED has no safe form

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::precopy::PageRun;
use crate::ram::{BlockId, RamBlockTable};
use crate::{GuestRam, GuestRamMmap, MemoryError, PAGE_SIZE};

/// [`PAGE_SIZE`] as a length in memory.
const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);

/// From this many pages on (32 MiB) a copy of a guest that stands still is made by all cores: below,
/// starting threads takes longer than they save.
const SHARED_FROM: u64 = 8192;

/// Guest RAM with room for copies. It is the guest's own, and the copies from
/// [`RamSender::keep`](crate::precopy::RamSender::keep) until what was kept has been sent.
///
/// The transport that sends pages, and the [`RamSetup`](crate::precopy::RamSetup) that it belongs to,
/// are made with this in the place of the guest's memory.
pub struct StagedRam {
    guest: Arc<dyn GuestRam>,
    copies: GuestRamMmap,
    kept: AtomicBool,
    use_of: Mutex<Vec<Use>>,
}

/// Which pages of a block's copies are in use, one bit a page.
struct Use {
    /// Copied in this round.
    now: Vec<u64>,
    /// Copied in the round before.
    before: Vec<u64>,
    /// Takes up memory.
    resident: Vec<u64>,
}

impl StagedRam {
    /// Room beside `guest`, which takes up no memory yet.
    ///
    /// # Errors
    /// The host has no addresses for it.
    pub fn new(guest: Arc<dyn GuestRam>) -> Result<Self, MemoryError> {
        let copies =
            GuestRamMmap::anonymous(guest.blocks().clone()).map_err(|e| MemoryError::Backend {
                what: "mapping room for copies of guest memory",
                source: e.into(),
            })?;
        let use_of = copies.regions().iter().map(|copies| {
            let words = vec![0; (copies.size() / PAGE_LEN).div_ceil(64)];
            Use {
                now: words.clone(),
                before: words.clone(),
                resident: words,
            }
        });
        let use_of = Mutex::new(use_of.collect());
        Ok(Self {
            guest,
            copies,
            kept: AtomicBool::new(false),
            use_of,
        })
    }

    /// Copies pages, over what was copied of them before. `still`: the guest stands still, and its
    /// processors may help.
    ///
    /// # Errors
    /// A run that does not lie in guest RAM.
    pub(crate) fn copy(&self, runs: &[PageRun], still: bool) -> Result<(), MemoryError> {
        {
            let mut use_of = self.use_of();
            for run in runs {
                if let Some(of_block) = use_of.get_mut(run.block.index()) {
                    set(&mut of_block.now, run.first, run.pages);
                }
            }
        }
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        let threads = match still && pages >= SHARED_FROM {
            true => thread::available_parallelism().map_or(1, usize::from),
            false => 1,
        };
        if threads == 1 {
            return runs.iter().try_for_each(|run| self.copy_run(*run));
        }
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || {
            while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.copy_run(*run)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let ours = work();
            helpers.into_iter().fold(ours, |result, helper| {
                result.and(helper.join().unwrap_or_else(|_| {
                    Err(MemoryError::Backend {
                        what: "copying guest memory",
                        source: "a thread panicked".into(),
                    })
                }))
            })
        })
    }

    fn copy_run(&self, run: PageRun) -> Result<(), MemoryError> {
        let (offset, len) = run.bytes();
        let from = self.guest.slice(run.block, offset, len)?;
        from.copy_to_volatile_slice(self.copies.slice(run.block, offset, len)?);
        Ok(())
    }

    /// What is read from now on are the copies. All that will be read was copied, and nothing that
    /// was to be read before is still waiting.
    pub(crate) fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// What is read from now on is the guest's memory; a round is over, and all of it was read.
    pub(crate) fn release(&self) {
        self.kept.store(false, Ordering::Release);
        for (of_block, copies) in self.use_of().iter_mut().zip(self.copies.regions()) {
            of_block.end_round(copies);
        }
    }

    /// How many bytes the copies take up.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let pages: u64 = self
            .use_of()
            .iter()
            .flat_map(|of_block| &of_block.resident)
            .map(|word| u64::from(word.count_ones()))
            .sum();
        pages * PAGE_SIZE
    }

    fn use_of(&self) -> MutexGuard<'_, Vec<Use>> {
        // Bits that say too much or too little cost memory at worst.
        self.use_of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestRam for StagedRam {
    fn blocks(&self) -> &RamBlockTable {
        self.guest.blocks()
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        let guest = self.guest.slice(block, offset, len)?;
        if self.kept.load(Ordering::Acquire) {
            self.copies.slice(block, offset, len)
        } else {
            Ok(guest)
        }
    }
}

impl Use {
    /// Gives memory back that was of no use for two rounds.
    fn end_round(&mut self, copies: &MmapRegion) {
        let words = self.now.iter_mut().zip(&mut self.before);
        for (index, ((now, before), resident)) in words.zip(&mut self.resident).enumerate() {
            let mut stale = *resident & !*now & !*before;
            *resident = (*resident | *now) & !stale;
            *before = std::mem::take(now);
            while stale != 0 {
                let first = stale.trailing_zeros();
                let count = (stale >> first).trailing_ones();
                let run = (u64::MAX >> (64 - count)) << first;
                stale &= !run;
                let at = (index * 64 + first as usize) * PAGE_LEN;
                if let Ok(slice) = copies.get_slice(at, count as usize * PAGE_LEN) {
                    discard(&slice);
                }
            }
        }
    }
}

/// Gives the memory behind whole pages of a private anonymous mapping back; they are zero then.
fn discard(slice: &VolatileSlice<'_>) {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the guard keeps the range mapped, which is of a private anonymous mapping of our own:
    // its bytes become zero, and nobody reads them before they are written again. There is no Rust
    // reference to them.
    let _ = unsafe { libc::madvise(guard.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) };
    // An error leaves the memory where it is.
}

fn set(words: &mut [u64], first: u64, count: u64) {
    let mut page = first;
    let end = first.saturating_add(count);
    while page < end {
        let upto = end.min((page / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (upto - page))) << (page % 64);
        if let Some(word) = usize::try_from(page / 64)
            .ok()
            .and_then(|index| words.get_mut(index))
        {
            *word |= mask;
        }
        page = upto;
    }
}

impl fmt::Debug for StagedRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagedRam")
            .field("kept", &self.kept)
            .field("resident_bytes", &self.resident_bytes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::RamBlock;

    const PAGES: u64 = 2 * SHARED_FROM;
    const RAM: BlockId = BlockId::new(0);

    fn staged() -> (Arc<GuestRamMmap>, StagedRam) {
        let blocks = RamBlockTable::new(vec![RamBlock::new("ram", PAGES * PAGE_SIZE).unwrap()]);
        let guest = Arc::new(GuestRamMmap::anonymous(blocks.unwrap()).unwrap());
        let staged = StagedRam::new(Arc::clone(&guest) as _).unwrap();
        (guest, staged)
    }

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun {
            block: RAM,
            first,
            pages,
        }
    }

    fn write(guest: &GuestRamMmap, page: u64, byte: u8) {
        let slice = guest.slice(RAM, page * PAGE_SIZE, PAGE_LEN).unwrap();
        slice.copy_from(&[byte; PAGE_LEN]);
    }

    fn read(staged: &StagedRam, page: u64) -> [u8; PAGE_LEN] {
        let mut bytes = [0; PAGE_LEN];
        let slice = staged.slice(RAM, page * PAGE_SIZE, PAGE_LEN).unwrap();
        slice.copy_to(&mut bytes);
        bytes
    }

    #[test]
    fn what_was_kept_is_read_whatever_the_guest_writes_until_it_is_released() {
        for still in [false, true] {
            let (guest, staged) = staged();
            for page in 0..PAGES {
                write(&guest, page, 1);
            }
            let runs: Vec<_> = (0..PAGES / 128).map(|i| run(i * 128, 128)).collect();
            staged.copy(&runs, still).unwrap();
            // Copied again, as it was written meanwhile.
            write(&guest, 70, 2);
            staged.copy(&[run(64, 64)], still).unwrap();
            staged.keep();
            for page in [0, 70, PAGES - 1] {
                write(&guest, page, 9);
            }
            assert_eq!(read(&staged, 0), [1; PAGE_LEN]);
            assert_eq!(read(&staged, 70), [2; PAGE_LEN]);
            assert_eq!(read(&staged, PAGES - 1), [1; PAGE_LEN]);
            staged.release();
            assert_eq!(read(&staged, 70), [9; PAGE_LEN]);
        }
    }

    #[test]
    fn memory_of_pages_that_are_not_copied_any_more_is_given_back() {
        let (guest, staged) = staged();
        write(&guest, 5, 1);
        for round in 0..3 {
            staged.copy(&[run(100, 10)], true).unwrap();
            if round == 0 {
                staged.copy(&[run(0, 1000)], true).unwrap();
            }
            staged.release();
            let pages = staged.resident_bytes() / PAGE_SIZE;
            assert_eq!(pages, if round < 2 { 1000 } else { 10 }, "round {round}");
        }
        staged.keep();
        assert_eq!(read(&staged, 5), [0; PAGE_LEN], "nothing is left of it");
    }

    #[test]
    fn ranges_outside_of_guest_memory_are_refused() {
        let (_, staged) = staged();
        assert!(staged.copy(&[run(PAGES, 1)], false).is_err());
        assert!(staged.slice(BlockId::new(1), 0, 1).is_err());
        staged.keep();
        assert!(staged.slice(RAM, PAGES * PAGE_SIZE, 1).is_err());
    }
}
