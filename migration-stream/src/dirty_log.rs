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
