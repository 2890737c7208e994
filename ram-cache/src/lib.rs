//! Where a COLO secondary keeps checkpoints until they are complete.
//!
//! Under COLO a secondary VM runs its own guest while the primary sends it checkpoints. The pages
//! of a checkpoint must not reach the running guest before the checkpoint is complete, so they are
//! received into a cache, and put in place when both VMs are stopped and all of the checkpoint is there.
//!
//! Two caches do that, behind one trait: [`MirrorCache`] is a second copy of RAM, which is QEMU's
//! design (`migration/ram.c`, 11.1); [`CowCache`] makes the guest's memory a private mapping of the last
//! checkpoint, so that only what the two sides have dirtied is there twice.
//!
//! What holds at every checkpoint: cache and received pages are the primary's RAM, and every page that
//! the secondary dirtied or that was received is looked after. So after the commit the guest equals the
//! primary.
//!
//! ```
//! use std::sync::Arc;
//!
//! use ram_cache::{CacheBlockSpec, CacheKind, DiscardControl, FlushPool, GuestStopped, PAGE_SIZE};
//! use vm_memory::{Bytes, MmapRegion};
//!
//! let guest = Arc::new(MmapRegion::new(1 << 20)?);
//! let discard = DiscardControl::new();
//! let pool = FlushPool::new(2)?;
//!
//! // Before the first byte of RAM arrives.
//! let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
//! let cache = CacheKind::Cow.make(vec![block], discard.disable()?)?;
//!
//! // Precopy: what arrives is the guest's memory.
//! cache.prepare(0, 0, 4096)?.write_slice(&[1; 4096], 0)?;
//! cache.landed(0, 0, 4096)?;
//!
//! // A checkpoint: the running guest sees nothing of it.
//! cache.enter_colo()?;
//! cache.prepare(0, PAGE_SIZE, 4096)?.write_slice(&[2; 4096], 0)?;
//! cache.landed(0, PAGE_SIZE, 4096)?;
//!
//! // The guest is stopped; its own dirty log (page 0) is put back by the same commit.
//! cache.or_dirty_word(0, 0, 0b1)?;
//! let stopped = GuestStopped::witnessed_by(&guest);
//! let report = cache.commit(stopped, &pool)?;
//! assert_eq!(report.pages, 2);
//! // Before it runs again.
//! cache.tidy(stopped)?;
//!
//! // The channels have been joined: the memory goes. The guest's is a mapping of the checkpoint, which ballooning
//! // would show; behind a mirror it is allowed again.
//! cache.release();
//! assert!(!discard.allowed());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! * [`RamCache`], [`CacheKind`], [`CacheBlockSpec`]: what a cache does, and for what memory.
//! * [`MirrorCache`], [`CowCache`]: the two there are.
//! * [`FlushPool`], [`FlushReport`], [`GuestStopped`]: getting a checkpoint into the guest.
//! * [`DirtyBitmap`]: one atomic bit per page.
//! * [`Populate`], [`advise_huge_pages`]: guest memory that is there before the first page comes.
//! * [`DiscardControl`]: no page of the guest is discarded behind the cache's back.
#![deny(unsafe_code)]

mod bitmap;
mod block;
mod cache;
mod copy;
mod cow;
mod discard;
mod error;
mod flush;
mod help;
mod mapping;
mod mirror;
mod pagemap;
mod populate;
mod zero;

pub use bitmap::{BitmapError, DirtyBitmap, DrainRuns, PAGES_PER_WORD, PageRun};
pub use block::CacheBlockSpec;
pub use cache::{CacheKind, RamCache};
pub use cow::CowCache;
pub use discard::{
    DiscardControl, DiscardDisabled, DiscardInUse, DiscardInhibitor, DiscardRequired,
};
pub use error::CacheError;
pub use flush::{FlushPool, FlushPoolError, FlushReport, GuestStopped};
pub use mirror::MirrorCache;
pub use populate::{Populate, PopulateError, Populated, advise_huge_pages};

/// The page size of the migration stream and of the dirty bitmap, bytes.
pub const PAGE_SIZE: u64 = PAGE_BYTES as u64;

/// [`PAGE_SIZE`] as memory counts it.
const PAGE_BYTES: usize = 4096;

// The example of the README compiles and runs.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
struct Readme;
