//! Dirty logs of writers in this process, and of several writers.

use std::sync::Arc;

use vm_memory::MmapRegion;
use vm_memory::bitmap::AtomicBitmap;

use crate::ram::BlockId;
use crate::{DirtyLog, MemoryError, PAGE_SIZE};

/// Hands on the words that are not zero; `words` begins with page 0 of the block.
pub(crate) fn report(block: BlockId, words: &[u64], sink: &mut dyn FnMut(BlockId, u64, u64)) {
    for (first_page, word) in (0u64..).step_by(64).zip(words) {
        if *word != 0 {
            sink(block, first_page, *word);
        }
    }
}

/// The pages that the VMM itself has written, in the bitmaps that `vm-memory` keeps in its mappings.
///
/// [`GuestRamMmap::own_writes`](crate::GuestRamMmap::own_writes) makes one.
#[derive(Debug)]
pub struct BitmapDirtyLog {
    regions: Vec<Arc<MmapRegion<AtomicBitmap>>>,
}

impl BitmapDirtyLog {
    /// Returns the log of these mappings, in the order of the blocks. Each bit of a bitmap is one page
    /// of 4,096 bytes.
    #[must_use]
    pub const fn new(regions: Vec<Arc<MmapRegion<AtomicBitmap>>>) -> Self {
        Self { regions }
    }
}

impl DirtyLog for BitmapDirtyLog {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.regions.iter().for_each(|r| r.bitmap().reset());
        Ok(())
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        for (index, region) in (0..).zip(&self.regions) {
            let words = region.bitmap().get_and_reset();
            let pages = (region.size() as u64).div_ceil(PAGE_SIZE);
            if (words.len() as u64) < pages.div_ceil(64) {
                return Err(MemoryError::Backend {
                    what: "a bitmap of guest memory is not one bit for each page",
                    source: format!("{} words for {pages} pages", words.len()).into(),
                });
            }
            report(BlockId::new(index), &words, sink);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// The writes of two writers: of vCPUs and of the VMM, say. A page may be reported by both.
#[derive(Clone, Copy, Debug)]
pub struct BothLogs<A, B>(
    /// One log.
    pub A,
    /// The other.
    pub B,
);

impl<A: DirtyLog, B: DirtyLog> DirtyLog for BothLogs<A, B> {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.0.start()?;
        self.1.start()
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        self.0.sync(sink)?;
        self.1.sync(sink)
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        // Both are to be stopped, whatever the first says.
        let first = self.0.stop();
        self.1.stop().and(first)
    }

    fn begins_with_every_page(&self) -> bool {
        self.0.begins_with_every_page() || self.1.begins_with_every_page()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::{GuestRam, GuestRamMmap, PageStore};

    const LEN: usize = 70 * 4096;

    fn guest() -> (GuestMemoryMmap<AtomicBitmap>, GuestRamMmap<AtomicBitmap>) {
        let places = [(GuestAddress(0), LEN), (GuestAddress(1 << 30), 2 * 4096)];
        let guest = GuestMemoryMmap::from_ranges(&places).unwrap();
        let ram = GuestRamMmap::over(&guest, &["low", "high"]).unwrap();
        (guest, ram)
    }

    fn seen(log: &mut impl DirtyLog) -> Vec<(usize, u64, u64)> {
        let mut seen = Vec::new();
        log.sync(&mut |block, first, word| seen.push((block.index(), first, word)))
            .unwrap();
        seen
    }

    #[test]
    fn what_the_vmm_writes_is_reported_once_and_pages_that_land_are_not() {
        let (guest, ram) = guest();
        let mut log = ram.own_writes();
        guest.write_obj(1_u8, GuestAddress(0)).unwrap();
        log.start().unwrap();
        assert_eq!(seen(&mut log), [], "written before the log was started");
        guest.write_obj(2_u8, GuestAddress(65 * 4096)).unwrap();
        let high = GuestAddress((1 << 30) + 4096);
        guest.write_obj(3_u8, high).unwrap();
        let page = ram.prepare(BlockId::new(0), 4096, 4096).unwrap();
        page.copy_from(&[4_u8; 4096]);
        ram.landed(BlockId::new(0), 4096, 4096).unwrap();
        assert_eq!(seen(&mut log), [(0, 64, 1 << 1), (1, 0, 1 << 1)]);
        assert_eq!(seen(&mut log), []);
        log.stop().unwrap();
        assert_eq!(guest.read_obj::<u8>(GuestAddress(4096)).unwrap(), 4);
        let mut byte = [0_u8];
        let slice = ram.slice(BlockId::new(1), 4096, 1).unwrap();
        slice.copy_to(&mut byte);
        assert_eq!(byte, [3]);
        assert!(GuestRamMmap::over(&guest, &["low"]).is_err());
    }

    /// A log that reports one page, and counts.
    struct One(u64, Vec<&'static str>, bool);

    impl DirtyLog for One {
        fn start(&mut self) -> Result<(), MemoryError> {
            self.1.push("start");
            Ok(())
        }
        fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
            sink(BlockId::new(0), 0, self.0);
            Ok(())
        }
        fn stop(&mut self) -> Result<(), MemoryError> {
            self.1.push("stop");
            let source = "as it was told to".into();
            let what = "stopping";
            if self.2 {
                return Err(MemoryError::Backend { what, source });
            }
            Ok(())
        }
    }

    #[test]
    fn both_logs_are_started_read_and_stopped_whatever_one_of_them_says() {
        let mut both = BothLogs(One(1, Vec::new(), true), One(2, Vec::new(), false));
        both.start().unwrap();
        assert_eq!(seen(&mut both), [(0, 0, 1), (0, 0, 2)]);
        assert!(both.stop().is_err());
        assert_eq!(
            (both.0.1, both.1.1),
            (vec!["start", "stop"], vec!["start", "stop"])
        );
    }
}
