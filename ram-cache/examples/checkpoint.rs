//! Two checkpoints of a secondary: one is committed, the other never becomes complete.
//!
//! `cargo run -p colo-ram-cache --example checkpoint`

use std::error::Error;
use std::sync::Arc;

use ram_cache::{
    CacheBlockSpec, CacheError, CacheKind, DiscardControl, FlushPool, GuestStopped, PAGE_SIZE,
    RamCache,
};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

const PAGES: u64 = 256;

/// Receives a page that is filled with `byte`.
fn receive(cache: &dyn RamCache, page: u64, byte: u8) -> Result<(), CacheError> {
    let offset = page * PAGE_SIZE;
    cache.prepare(0, offset, 4096)?.copy_from(&[byte; 4096]);
    cache.landed(0, offset, 4096)
}

/// Returns the first byte of a page of the guest.
fn byte(guest: &MmapRegion, page: usize) -> Result<u8, Box<dyn Error>> {
    Ok(guest.as_volatile_slice().read_obj(page * 4096)?)
}

fn checkpoints(kind: CacheKind) -> Result<(), Box<dyn Error>> {
    let guest = Arc::new(MmapRegion::new(usize::try_from(PAGES * PAGE_SIZE)?)?);
    let discard = DiscardControl::new();
    let pool = FlushPool::for_this_host()?;
    let block = CacheBlockSpec::whole_region("ram", Arc::clone(&guest));
    let cache = kind.make(vec![block], discard.disable()?)?;

    // Precopy: pages are the guest's memory.
    receive(&*cache, 0, 1)?;
    assert_eq!(byte(&guest, 0)?, 1);
    cache.enter_colo()?;

    // The guest runs: it writes page 1, and sees nothing of the checkpoint.
    receive(&*cache, 0, 2)?;
    guest.as_volatile_slice().write_obj(9u8, 4096)?;
    assert_eq!(byte(&guest, 0)?, 1);

    // The guest is stopped, its dirty log is read, and the checkpoint is complete.
    cache.or_dirty_word(0, 0, 0b10)?;
    let stopped = GuestStopped::witnessed_by(&guest);
    let report = cache.commit(stopped, &pool)?;
    cache.reclaim(stopped)?;
    println!("{kind:?}: {} pages put in place", report.pages);
    assert_eq!(report.pages, 2);
    assert_eq!((byte(&guest, 0)?, byte(&guest, 1)?), (2, 0));

    // The primary is lost within the next checkpoint: the guest goes on from the last one.
    receive(&*cache, 0, 3)?;
    cache.release();
    assert_eq!(byte(&guest, 0)?, 2);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    checkpoints(CacheKind::Mirror)?;
    checkpoints(CacheKind::Cow)
}
