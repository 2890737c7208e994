//! Which pages were written: KVM's log, and a bitmap for a writer of our own.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migration_stream::ram::BlockId;
use migration_stream::{DirtyLog, KvmDirtyLog, MemoryError, PAGE_SIZE};
use vm_memory::bitmap::AtomicBitmap;

use crate::machine::MemorySlots;
use crate::memory::Memory;

/// KVM's dirty log. No device of this VMM writes guest RAM, so KVM's word is all there is, but for a reset,
/// after which every page is reported once. A VMM with DMA adds a [`SoftwareDirtyLog`] beside it.
#[derive(Debug)]
pub struct SlotsDirtyLog {
    kvm: KvmDirtyLog,
    slots: Arc<MemorySlots>,
}

impl SlotsDirtyLog {
    pub(crate) fn new(slots: Arc<MemorySlots>) -> Self {
        let kvm = slots.dirty_log();
        Self { kvm, slots }
    }
}

impl DirtyLog for SlotsDirtyLog {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.slots.take_rewritten();
        self.kvm.start()
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        if self.slots.take_rewritten() {
            for region in self.slots.memory().regions() {
                let pages = region.mapping.size() as u64 / PAGE_SIZE;
                for first in (0..pages).step_by(64) {
                    sink(
                        region.block,
                        first,
                        u64::MAX >> (64 - (pages - first).min(64)),
                    );
                }
            }
        }
        self.kvm.sync(sink)
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        self.kvm.stop()
    }
}

fn report(block: BlockId, words: &[u64], sink: &mut dyn FnMut(BlockId, u64, u64)) {
    for (first_page, word) in (0u64..).step_by(64).zip(words) {
        if *word != 0 {
            sink(block, first_page, *word);
        }
    }
}

/// One bit for each page of each block, set by whoever writes guest RAM in this process.
#[derive(Debug)]
pub struct DirtyBitmap {
    logging: AtomicBool,
    blocks: Vec<AtomicBitmap>,
}

impl DirtyBitmap {
    /// A clear bitmap over `memory`, not logging.
    #[must_use]
    pub fn new(memory: &Memory) -> Self {
        const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
        Self {
            logging: AtomicBool::new(false),
            blocks: memory
                .regions()
                .iter()
                .map(|region| AtomicBitmap::new(region.mapping.size(), PAGE))
                .collect(),
        }
    }

    /// Marks the page of `block` with byte `offset` in it. Call it *after* the write: a sync
    /// between mark and write would lose the page.
    pub fn mark(&self, block: BlockId, offset: u64) {
        if !self.logging.load(Ordering::Acquire) {
            return;
        }
        if let (Some(bitmap), Ok(page)) = (
            self.blocks.get(block.index()),
            usize::try_from(offset / PAGE_SIZE),
        ) {
            bitmap.set_bit(page);
        }
    }
}

/// A [`DirtyLog`] over a [`DirtyBitmap`].
#[derive(Debug)]
pub struct SoftwareDirtyLog {
    memory: Arc<Memory>,
    bitmap: Arc<DirtyBitmap>,
}

impl SoftwareDirtyLog {
    /// The log of what is marked in `bitmap`, which belongs to `memory`.
    #[must_use]
    pub const fn new(memory: Arc<Memory>, bitmap: Arc<DirtyBitmap>) -> Self {
        Self { memory, bitmap }
    }
}

impl DirtyLog for SoftwareDirtyLog {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.bitmap.blocks.iter().for_each(AtomicBitmap::reset);
        self.bitmap.logging.store(true, Ordering::Release);
        Ok(())
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        for (region, bitmap) in self.memory.regions().iter().zip(&self.bitmap.blocks) {
            report(region.block, &bitmap.get_and_reset(), sink);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        self.bitmap.logging.store(false, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marked_page_is_reported_once() {
        let memory = Arc::new(Memory::new(1 << 20).unwrap());
        let bitmap = Arc::new(DirtyBitmap::new(&memory));
        let mut log = SoftwareDirtyLog::new(memory, Arc::clone(&bitmap));
        let low = BlockId::new(0);
        let pages = |log: &mut SoftwareDirtyLog| {
            let mut seen = Vec::new();
            log.sync(&mut |block, first, word| seen.push((block, first, word)))
                .unwrap();
            seen
        };

        bitmap.mark(low, 0x1000);
        log.start().unwrap();
        assert_eq!(pages(&mut log), []);
        bitmap.mark(low, 70 * PAGE_SIZE + 5);
        assert_eq!(pages(&mut log), [(low, 64, 1 << 6)]);
        assert_eq!(pages(&mut log), []);
        log.stop().unwrap();
        bitmap.mark(low, 0);
        assert_eq!(pages(&mut log), []);
    }
}
