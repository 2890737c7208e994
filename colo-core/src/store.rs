//! The secondary's page store: what the RAM cache is to the migration stream.

use std::sync::atomic::{AtomicBool, Ordering};

use migration_stream::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable};
use migration_stream::{DirtyLog, MemoryError, PageStore};
use ram_cache::{
    CacheBlockSpec, CacheError, DiscardInhibitor, FlushPool, FlushReport, GuestStopped, MirrorCache,
};
use vm_memory::VolatileSlice;

/// A RAM cache as the store of an incoming migration.
///
/// During precopy a page goes to the cache and to the guest, and nothing is marked: at the
/// switch-over both are equal. Once [`ColoStore::enter_colo`] was called it goes to the cache only
/// and is marked, so that a running guest sees nothing of a checkpoint before the flush.
///
/// Which of the two is one question, asked in one place. It changes once, at a moment
/// at which no page is on its way: between the confirmation of the migration and
/// *checkpoint-ready*, before which the primary sends nothing.
#[derive(Debug)]
pub struct ColoStore {
    table: RamBlockTable,
    cache: MirrorCache,
    in_colo: AtomicBool,
}

impl ColoStore {
    /// A store over the guest's RAM, to be made before the first byte of RAM arrives. No RAM is
    /// discarded as long as it lives.
    ///
    /// # Errors
    /// The blocks are no valid table, or there is no memory for the cache.
    pub fn new(
        blocks: Vec<CacheBlockSpec>,
        inhibitor: DiscardInhibitor,
    ) -> Result<Self, StoreError> {
        let table = blocks
            .iter()
            .map(|spec| RamBlock::new(spec.name.clone(), spec.len as u64))
            .collect::<Result<_, _>>()
            .and_then(RamBlockTable::new)?;
        let cache = MirrorCache::new(blocks, inhibitor)?;
        Ok(Self {
            table,
            cache,
            in_colo: AtomicBool::new(false),
        })
    }

    /// The migration is over, COLO begins: from here on pages belong to checkpoints.
    pub fn enter_colo(&self) {
        // Pages of checkpoints are received after the primary was sent a message, which is sent
        // after this: the channels order it, and Release/Acquire says so.
        self.in_colo.store(true, Ordering::Release);
    }

    fn in_colo(&self) -> bool {
        self.in_colo.load(Ordering::Acquire)
    }

    /// Copies all of the checkpoint into the guest, and back over what the guest itself has written
    /// since the last one, which `log` knows.
    ///
    /// # Errors
    /// The log could not be read, or a page could not be copied. The guest must not run then.
    pub fn flush(
        &self,
        stopped: GuestStopped<'_>,
        log: &mut dyn DirtyLog,
        pool: &FlushPool,
    ) -> Result<FlushReport, StoreError> {
        let mut result = Ok(());
        log.sync(&mut |block, first_page, word| {
            if let Err(e) = self.cache.or_dirty_word(block.index(), first_page, word) {
                result = Err(e);
            }
        })?;
        result?;
        Ok(self.cache.flush(stopped, pool)?)
    }

    /// Gives the memory back. A store that threads still write to cannot be released: whoever runs
    /// them owns it, and gives it back when they have been joined.
    pub fn release(self) {
        self.cache.release();
    }
}

impl PageStore for ColoStore {
    fn blocks(&self) -> &RamBlockTable {
        &self.table
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        if self.in_colo() {
            // Before the bytes are written: a page that arrives in half is dropped with its
            // checkpoint, but never kept as clean.
            self.cache
                .mark(block.index(), offset, len)
                .map_err(memory)?;
        }
        self.cache
            .cache_slice(block.index(), offset, len)
            .map_err(memory)
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        if self.in_colo() {
            Ok(())
        } else {
            self.cache
                .copy_to_guest(block.index(), offset, len)
                .map_err(memory)
        }
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        if self.in_colo() {
            self.cache.zero_cache_and_mark(block.index(), offset, len)
        } else {
            self.cache.zero_both(block.index(), offset, len)
        }
        .map_err(memory)
    }
}

fn memory(source: CacheError) -> MemoryError {
    MemoryError::Backend {
        what: "the ram cache could not be reached",
        source: source.into(),
    }
}

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The blocks are no valid table.
    #[error(transparent)]
    Blocks(#[from] RamBlockError),
    /// The cache could not be made or reached.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The dirty log could not be read.
    #[error("reading the dirty log")]
    Log(#[from] MemoryError),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ram_cache::DiscardControl;
    use vm_memory::{Bytes, MmapRegion};

    use super::*;

    struct Written(Vec<(u64, u64)>);

    impl DirtyLog for Written {
        fn start(&mut self) -> Result<(), MemoryError> {
            Ok(())
        }
        fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
            for (first, word) in self.0.drain(..) {
                sink(BlockId::new(0), first, word);
            }
            Ok(())
        }
        fn stop(&mut self) -> Result<(), MemoryError> {
            Ok(())
        }
    }

    const RAM: BlockId = BlockId::new(0);

    fn store() -> (ColoStore, Arc<MmapRegion>, DiscardControl) {
        let guest = Arc::new(MmapRegion::new(16 * 4096).unwrap());
        let discard = DiscardControl::new();
        let spec = CacheBlockSpec::whole_region("ram", Arc::clone(&guest));
        let store = ColoStore::new(vec![spec], discard.disable().unwrap()).unwrap();
        (store, guest, discard)
    }

    fn receive(store: &ColoStore, page: u64, byte: u8) {
        let slice = store.prepare(RAM, page * 4096, 4096).unwrap();
        slice.write_slice(&[byte; 4096], 0).unwrap();
        store.landed(RAM, page * 4096, 4096).unwrap();
    }

    fn guest_byte(guest: &MmapRegion, page: usize) -> u8 {
        use vm_memory::VolatileMemory;
        guest
            .as_volatile_slice()
            .read_obj(page * 4096 + 17)
            .unwrap()
    }

    #[test]
    fn precopy_writes_cache_and_guest_and_marks_nothing() {
        let (store, guest, _) = store();
        receive(&store, 3, 7);
        store.zero(RAM, 4 * 4096, 4096).unwrap();
        assert_eq!(guest_byte(&guest, 3), 7);
        let pool = FlushPool::new(1).unwrap();
        let report = store
            .flush(
                GuestStopped::witnessed_by(&guest),
                &mut Written(Vec::new()),
                &pool,
            )
            .unwrap();
        assert_eq!(report.pages, 0);
    }

    #[test]
    fn a_checkpoint_reaches_the_guest_with_the_flush_and_undoes_what_the_guest_wrote() {
        use vm_memory::VolatileMemory;
        let (store, guest, discard) = store();
        receive(&store, 3, 7);
        receive(&store, 5, 9);
        store.enter_colo();
        receive(&store, 3, 8);
        store.zero(RAM, 5 * 4096, 4096).unwrap();
        guest
            .as_volatile_slice()
            .write_obj(0x55u8, 6 * 4096 + 17)
            .unwrap();
        assert_eq!((guest_byte(&guest, 3), guest_byte(&guest, 5)), (7, 9));
        let pool = FlushPool::new(2).unwrap();
        let mut log = Written(vec![(0, 1 << 6)]);
        let report = store
            .flush(GuestStopped::witnessed_by(&guest), &mut log, &pool)
            .unwrap();
        assert_eq!(report.pages, 3);
        assert_eq!([3, 5, 6].map(|p| guest_byte(&guest, p)), [8, 0, 0]);
        assert!(!discard.allowed());
        store.release();
        assert!(discard.allowed());
    }

    #[test]
    fn a_page_outside_the_block_is_an_error() {
        let (store, ..) = store();
        assert!(store.prepare(RAM, 16 * 4096, 4096).is_err());
        assert!(store.prepare(BlockId::new(1), 0, 4096).is_err());
        assert!(store.zero(RAM, u64::MAX - 4095, 4096).is_err());
    }
}
