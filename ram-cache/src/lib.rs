//! The COLO secondary's copy of guest RAM.
//!
//! Under COLO a secondary VM runs its own guest while the primary sends it checkpoints. The pages
//! of a checkpoint must not reach the running guest before the checkpoint is complete, so they are
//! received into a second copy of RAM, the [`MirrorCache`], and copied into the guest when both
//! VMs are stopped and all of the checkpoint is there. The design is QEMU's
//! (`migration/ram.c`, 11.1); the copy is not.
//!
//! What holds at every checkpoint: the cache equals the primary's RAM, and every page that the
//! secondary dirtied or that was received is flushed. So after the flush the guest equals the cache.
//!
//! ```
//! use std::sync::Arc;
//!
//! use ram_cache::{CacheBlockSpec, DiscardControl, FlushPool, GuestStopped, MirrorCache, PAGE_SIZE};
//! use vm_memory::{Bytes, MmapRegion};
//!
//! let guest = Arc::new(MmapRegion::new(1 << 20)?);
//! let discard = DiscardControl::new();
//! let pool = FlushPool::new(2)?;
//!
//! // Before the first byte of RAM arrives.
//! let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
//! let cache = MirrorCache::new(vec![block], discard.disable()?)?;
//!
//! // Precopy: both copies are written, nothing is marked.
//! cache.cache_slice(0, 0, 4096)?.write_slice(&[1; 4096], 0)?;
//! cache.copy_to_guest(0, 0, 4096)?;
//!
//! // A checkpoint: mark, then write. The running guest sees nothing of it.
//! cache.mark(0, PAGE_SIZE, 4096)?;
//! cache.cache_slice(0, PAGE_SIZE, 4096)?.write_slice(&[2; 4096], 0)?;
//!
//! // The guest is stopped; its own dirty log (page 0) goes into the same bitmap.
//! cache.or_dirty_word(0, 0, 0b1)?;
//! let report = cache.flush(GuestStopped::witnessed_by(&guest), &pool)?;
//! assert_eq!((report.pages, report.runs), (2, 1));
//!
//! // The channels have been joined: the memory goes, and ballooning is allowed again.
//! cache.release();
//! assert!(discard.allowed());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! * [`MirrorCache`] and [`CacheBlockSpec`]: the copy of RAM.
//! * [`FlushPool`], [`FlushReport`], [`GuestStopped`]: getting it into the guest.
//! * [`DirtyBitmap`]: one atomic bit per page.
//! * [`DiscardControl`]: no page of the guest is discarded behind the cache's back.
#![deny(unsafe_code)]

mod bitmap;
mod copy;
mod discard;
mod error;
mod flush;
mod mapping;
mod mirror;
mod zero;

pub use bitmap::{BitmapError, DirtyBitmap, DrainRuns, PAGES_PER_WORD, PageRun};
pub use discard::{
    DiscardControl, DiscardDisabled, DiscardInUse, DiscardInhibitor, DiscardRequired,
};
pub use error::CacheError;
pub use flush::{FlushPool, FlushPoolError, FlushReport, GuestStopped};
pub use mirror::{CacheBlockSpec, MirrorCache};

/// The page size of the migration stream and of the dirty bitmap, bytes.
pub const PAGE_SIZE: u64 = PAGE_BYTES as u64;

/// [`PAGE_SIZE`] as memory counts it.
const PAGE_BYTES: usize = 4096;

// The example of the README compiles and runs.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
struct Readme;
