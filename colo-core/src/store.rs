//! The secondary's page store: what the RAM cache is to the migration stream.

use std::sync::Arc;

use migration_stream::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable};
use migration_stream::raw::checkpoint::CheckpointComplete;
use migration_stream::raw::transport::HeldChannels;
use migration_stream::{DirtyLog, GuestRamMmap, MemoryError, PageStore};
use ram_cache::{
    CacheBlockSpec, CacheError, CacheKind, DiscardInhibitor, FlushPool, FlushReport, GuestStopped,
    RamCache,
};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// A RAM cache as the store of an incoming migration.
///
/// During precopy, received pages are the guest's memory. In COLO they belong to a checkpoint, of which a
/// running guest sees nothing before the flush. [`run_secondary`](crate::driver::run_secondary) changes
/// from the one to the other before its guest runs. The change comes once, at a moment at which no page
/// is on its way: between the confirmation of the migration and *checkpoint-ready*, before which the
/// primary sends nothing.
#[derive(Debug)]
pub struct ColoStore {
    table: RamBlockTable,
    cache: Box<dyn RamCache>,
}

impl ColoStore {
    /// A store over the guest's RAM with a cache of this kind, to be made before the first byte of RAM
    /// arrives. No RAM is discarded as long as it lives.
    ///
    /// # Errors
    /// The blocks are no valid table, or there is no memory for the cache.
    pub fn new(
        kind: CacheKind,
        blocks: Vec<CacheBlockSpec>,
        inhibitor: DiscardInhibitor,
    ) -> Result<Self, StoreError> {
        let table = blocks
            .iter()
            .map(|spec| RamBlock::new(spec.name.clone(), spec.len as u64))
            .collect::<Result<_, _>>()
            .and_then(RamBlockTable::new)?;
        let cache = kind.make(blocks, inhibitor)?;
        Ok(Self { table, cache })
    }

    /// As [`ColoStore::new`], over all of `ram`.
    ///
    /// # Errors
    /// There is no memory for the cache.
    pub fn over<B: Bitmap + Send + Sync + 'static>(
        kind: CacheKind,
        ram: &GuestRamMmap<B>,
        inhibitor: DiscardInhibitor,
    ) -> Result<Self, StoreError> {
        let blocks = ram.blocks().iter().zip(ram.regions());
        let blocks = blocks.map(|((_, block), region)| {
            CacheBlockSpec::whole_region(block.name(), Arc::clone(region))
        });
        Self::new(kind, blocks.collect(), inhibitor)
    }

    fn note_written(&self, log: &mut dyn DirtyLog) -> Result<(), StoreError> {
        let mut result = Ok(());
        log.sync(&mut |block, first_page, word| {
            if let Err(e) = self.cache.or_dirty_word(block.index(), first_page, word) {
                result = Err(e);
            }
        })?;
        Ok(result?)
    }

    fn commit(
        &self,
        stopped: GuestStopped<'_>,
        log: &mut dyn DirtyLog,
        pool: &FlushPool,
    ) -> Result<FlushReport, StoreError> {
        self.note_written(log)?;
        Ok(self.cache.commit(stopped, pool)?)
    }

    /// Gives the memory back. A store that threads still write to cannot be released: whoever runs
    /// them owns it, and gives it back when they have been joined.
    pub(crate) fn release(self) {
        self.cache.release();
    }
}

/// The migration is over, COLO begins: from here on pages belong to checkpoints. No page may be on its way
/// meanwhile: see [`IncomingPages::between_packets`](multifd::IncomingPages::between_packets).
///
/// # Errors
/// The cache's; the guest must not run then.
pub fn enter_colo(store: &ColoStore) -> Result<(), StoreError> {
    Ok(store.cache.enter_colo()?)
}

/// The guest was stopped for a checkpoint, and has written since the last one what `log` knows.
/// Pages of the checkpoint may be arriving. Not needed before a flush, but saves it work.
///
/// # Errors
/// The log could not be read, or the cache's.
pub fn guest_stopped(
    store: &ColoStore,
    stopped: GuestStopped<'_>,
    log: &mut dyn DirtyLog,
) -> Result<(), StoreError> {
    store.note_written(log)?;
    Ok(store.cache.guest_stopped(stopped)?)
}

/// Copies all of the checkpoint into the guest, and back over what the guest itself has written
/// since the last one, which `log` knows: what the VMM has written for it since it was stopped, as
/// a device's reset does, included.
///
/// The channels stay held until the result is dropped: pages that they take in from then on
/// belong to the next checkpoint.
///
/// Without all of a checkpoint there is nothing to flush:
///
/// ```compile_fail,E0061
/// # use colo_core::ColoStore;
/// # use migration_stream::DirtyLog;
/// # use ram_cache::{FlushPool, GuestStopped};
/// # fn early(store: &ColoStore, stopped: GuestStopped<'_>, log: &mut dyn DirtyLog, pool: &FlushPool) {
/// let flushed = colo_core::raw::flush(store, stopped, log, pool);
/// # }
/// ```
///
/// # Errors
/// The log could not be read, or a page could not be copied. The guest must not run then.
pub fn flush(
    store: &ColoStore,
    stopped: GuestStopped<'_>,
    log: &mut dyn DirtyLog,
    pool: &FlushPool,
    checkpoint: CheckpointComplete,
) -> Result<(FlushReport, HeldChannels), StoreError> {
    let held = checkpoint.into_held();
    Ok((store.commit(stopped, log, pool)?, held))
}

/// Gives memory back that a flush has left without use. To be called after [`flush`] and before the guest
/// runs. Pages of
/// the next checkpoint may be arriving.
///
/// # Errors
/// The cache's; it goes on as before.
pub fn reclaim(store: &ColoStore, stopped: GuestStopped<'_>) -> Result<(), StoreError> {
    Ok(store.cache.reclaim(stopped)?)
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
        let slice = self.cache.prepare(block.index(), offset, len);
        slice.map_err(memory)
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        let landed = self.cache.landed(block.index(), offset, len);
        landed.map_err(memory)
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        let zero = self.cache.zero(block.index(), offset, len);
        zero.map_err(memory)
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

    const KINDS: [CacheKind; 2] = [CacheKind::Mirror, CacheKind::Cow];

    fn store(kind: CacheKind) -> (ColoStore, Arc<MmapRegion>, DiscardControl) {
        let guest = Arc::new(MmapRegion::<()>::new(16 * 4096).unwrap());
        let discard = DiscardControl::new();
        let spec = CacheBlockSpec::whole_region("ram", Arc::clone(&guest));
        let store = ColoStore::new(kind, vec![spec], discard.disable().unwrap()).unwrap();
        (store, guest, discard)
    }

    fn flush(store: &ColoStore, written: Vec<(u64, u64)>, threads: usize) -> FlushReport {
        let stopped = GuestStopped::witnessed_by(store);
        let log = &mut Written(written);
        let report = store.commit(stopped, log, &FlushPool::new(threads).unwrap());
        reclaim(store, stopped).unwrap();
        report.unwrap()
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
    fn precopy_reaches_the_guest_and_marks_nothing() {
        for kind in KINDS {
            let (store, guest, _) = store(kind);
            receive(&store, 3, 7);
            store.zero(RAM, 4 * 4096, 4096).unwrap();
            assert_eq!(guest_byte(&guest, 3), 7);
            assert_eq!(flush(&store, Vec::new(), 1).pages, 0);
        }
    }

    #[test]
    fn a_checkpoint_reaches_the_guest_with_the_flush_and_undoes_what_the_guest_wrote() {
        use vm_memory::VolatileMemory;
        for kind in KINDS {
            let (store, guest, discard) = store(kind);
            receive(&store, 3, 7);
            receive(&store, 5, 9);
            enter_colo(&store).unwrap();
            receive(&store, 3, 8);
            store.zero(RAM, 5 * 4096, 4096).unwrap();
            guest
                .as_volatile_slice()
                .write_obj(0x55u8, 6 * 4096 + 17)
                .unwrap();
            assert_eq!((guest_byte(&guest, 3), guest_byte(&guest, 5)), (7, 9));
            let stopped = GuestStopped::witnessed_by(&store);
            let log = &mut Written(vec![(0, 1 << 6)]);
            guest_stopped(&store, stopped, log).unwrap();
            // A device's reset writes to the guest as well.
            guest
                .as_volatile_slice()
                .write_obj(0x55u8, 7 * 4096 + 17)
                .unwrap();
            assert_eq!(flush(&store, vec![(0, 1 << 7)], 2).pages, 4);
            assert_eq!([3, 5, 6, 7].map(|p| guest_byte(&guest, p)), [8, 0, 0, 0]);
            assert!(!discard.allowed());
            store.release();
            assert_eq!(discard.allowed(), kind == CacheKind::Mirror);
        }
    }

    #[test]
    fn a_page_outside_the_block_is_an_error() {
        for kind in KINDS {
            let (store, ..) = store(kind);
            assert!(store.prepare(RAM, 16 * 4096, 4096).is_err());
            assert!(store.prepare(BlockId::new(1), 0, 4096).is_err());
            assert!(store.zero(RAM, u64::MAX - 4095, 4096).is_err());
        }
    }
}
