//! Where a COLO secondary keeps checkpoints until they are complete.
//!
//! Under COLO a secondary VM runs its own guest while the primary sends checkpoints. Pages of a checkpoint must not
//! reach the running guest before the checkpoint is complete. They are received into a cache, and put in place
//! when both VMs are paused and all pages have arrived.
//!
//! Two caches do this, behind one trait: [`MirrorCache`] is a second copy of RAM, which is QEMU's
//! design (`migration/ram.c`, 11.1); [`CowCache`] makes the guest's memory a private mapping of the last
//! checkpoint, so that only what the two sides have dirtied is there twice.
//!
//! Invariant at every checkpoint: cache and received pages together are the primary's RAM, and every page that the
//! secondary dirtied or received is recorded. After the commit the guest therefore equals the primary.
//!
//! ```
//! use std::sync::Arc;
//!
//! use ram_cache::{CacheBlockSpec, CacheKind, DiscardControl, FlushPool, GuestStopped, PAGE_SIZE};
//! use vm_memory::{Bytes, MmapRegion};
//!
//! let guest = Arc::new(MmapRegion::<()>::new(1 << 20)?);
//! let discard = DiscardControl::new();
//! let pool = FlushPool::new(2)?;
//!
//! // Before the first byte of RAM arrives.
//! let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
//! let cache = CacheKind::Cow.make(vec![block], discard.disable()?)?;
//!
//! // Precopy: pages are the guest's memory.
//! cache.prepare(0, 0, 4096)?.write_slice(&[1; 4096], 0)?;
//! cache.landed(0, 0, 4096)?;
//!
//! // A checkpoint: the running guest sees nothing of it.
//! cache.enter_colo()?;
//! cache.prepare(0, PAGE_SIZE, 4096)?.write_slice(&[2; 4096], 0)?;
//! cache.landed(0, PAGE_SIZE, 4096)?;
//!
//! // The guest is paused. The same commit puts back the page of its own dirty log, page 0.
//! cache.or_dirty_word(0, 0, 0b1)?;
//! let stopped = GuestStopped::witnessed_by(&guest);
//! let report = cache.commit(stopped, &pool)?;
//! assert_eq!(report.pages, 2);
//! // Before it runs again.
//! cache.reclaim(stopped)?;
//!
//! // The channels have been joined: the memory is given back. The guest's memory stays a mapping of the
//! // checkpoint, which ballooning would expose. With a mirror it would be allowed again.
//! cache.release();
//! assert!(!discard.allowed());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! * [`RamCache`], [`CacheKind`], [`CacheBlockSpec`]: what a cache does, and for what memory.
//! * [`MirrorCache`], [`CowCache`]: the two caches.
//! * [`FlushPool`], [`FlushReport`], [`GuestStopped`]: the commit.
//! * [`DirtyBitmap`]: one atomic bit per page.
//! * [`Populate`], [`advise_huge_pages`]: guest memory that is there before the first page arrives.
//! * [`DiscardControl`]: keeps pages of the guest from being discarded under the cache.
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
mod kind;
mod mapping;
mod mirror;
mod pagemap;
mod populate;
mod zero;

pub use bitmap::{BitmapError, DirtyBitmap, DrainRuns, PAGES_PER_WORD, PageRun};
pub use block::CacheBlockSpec;
pub use cache::RamCache;
pub use cow::CowCache;
pub use discard::{
    DiscardControl, DiscardDisabled, DiscardInUse, DiscardInhibitor, DiscardRequired,
};
pub use error::CacheError;
pub use flush::{FlushPool, FlushPoolError, FlushReport, GuestStopped};
pub use kind::CacheKind;
pub use mapping::GuestMapping;
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
