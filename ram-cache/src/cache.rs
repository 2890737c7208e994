//! What every cache does for a COLO secondary.

use std::fmt;

use vm_memory::VolatileSlice;

use crate::error::CacheError;
use crate::flush::{FlushPool, FlushReport, GuestStopped};

/// Where a COLO secondary keeps the pages of a checkpoint until the checkpoint is complete.
///
/// Blocks are named by their index in the list that the cache was made for, offsets and lengths are
/// bytes in the block. All methods take `&self` and may be called from any number of threads.
///
/// # Order of calls
/// *Before the first byte of RAM* the cache is made.
///
/// *In precopy* the guest does not run yet, and pages that arrive are its memory.
///
/// *After [`enter_colo`](RamCache::enter_colo)* pages belong to a checkpoint, and the running guest sees
/// nothing of them. A page is recorded before its first byte is written, so that a channel that breaks in the
/// middle of a page leaves no page that looks complete. If the checkpoint never completes, the
/// guest goes on with its memory as it is, and the cache is released.
///
/// *At a checkpoint* the guest is paused, its own dirty log goes into
/// [`or_dirty_word`](RamCache::or_dirty_word), and [`guest_stopped`](RamCache::guest_stopped) is
/// called, before, while or after pages arrive. When all have arrived, [`commit`](RamCache::commit) puts them
/// in place, and puts back pages that only the secondary has written. [`reclaim`](RamCache::reclaim) gives memory back
/// before the guest runs again; the primary need not wait for it.
pub trait RamCache: fmt::Debug + Send + Sync {
    /// Returns where the bytes `offset .. offset + len` of a block are to be written. The slice begins at
    /// `offset`. It may end before `len`, at the end of a page: ask again for the rest. In precopy it holds the
    /// bytes that landed there before.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it; there is no memory for it.
    fn prepare(
        &self,
        block: usize,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError>;

    /// Notes that the bytes of a prepared range are in place.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    fn landed(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError>;

    /// Sets the range to zero. Memory that is zero already is not written, so that pages that were never used
    /// take no memory.
    ///
    /// # Errors
    /// No such block, or the range does not lie in it.
    fn zero(&self, block: usize, offset: u64, len: usize) -> Result<(), CacheError>;

    /// Ends precopy: from here on pages belong to checkpoints. The guest has not run yet, and no thread is inside
    /// a page.
    ///
    /// # Errors
    /// An error of the host. The guest must not run.
    fn enter_colo(&self) -> Result<(), CacheError>;

    /// Notes pages that the secondary's own guest has dirtied: bit `i` of `word` is page
    /// `first_page + i` of the block, and `first_page` is a multiple of 64.
    ///
    /// # Errors
    /// No such block, `first_page` is not a multiple of 64, or a set bit is beyond the block.
    fn or_dirty_word(&self, block: usize, first_page: u64, word: u64) -> Result<(), CacheError>;

    /// Notes that the guest is paused for a checkpoint, and that all of its dirty log was handed over. Optional.
    /// It saves the commit work when it is called while pages still arrive: the cache then knows which pages the
    /// guest has copies of.
    ///
    /// # Errors
    /// An error of the host.
    fn guest_stopped(&self, stopped: GuestStopped<'_>) -> Result<(), CacheError>;

    /// Returns the number of pages that the next commit puts in place or back.
    #[must_use]
    fn dirty_pages(&self) -> u64;

    /// Puts the received pages into the guest, and puts back pages that only the secondary has written.
    ///
    /// Copies whole runs of pages, on as many cores as `pool` has. The work is divided by dirty bytes. A small
    /// commit is not divided.
    ///
    /// The witness promises that the checkpoint is complete and that no other thread writes guest or cache. A
    /// false promise is no undefined behaviour, as no guest memory is borrowed as Rust data. The guest's memory
    /// is then meaningless.
    ///
    /// # Errors
    /// An error of the host. The guest holds a part of the checkpoint and must not run.
    fn commit(
        &self,
        stopped: GuestStopped<'_>,
        pool: &FlushPool,
    ) -> Result<FlushReport, CacheError>;

    /// Gives back memory that the commit has left unused. Optional. Called between a commit and the guest's resume;
    /// pages of the next checkpoint may arrive meanwhile. Without a commit before, nothing happens.
    ///
    /// # Errors
    /// An error of the host. The memory stays in use. The guest may run.
    fn reclaim(&self, stopped: GuestStopped<'_>) -> Result<(), CacheError>;

    /// Gives the cache's memory back. RAM discard is allowed again behind a [`MirrorCache`](crate::MirrorCache); a
    /// [`CowCache`](crate::CowCache) leaves it forbidden for as long as the VM lives. Dropping the cache does the same;
    /// this is the name to read at the place where it must happen, after the receive channels have
    /// been joined.
    fn release(self: Box<Self>);
}
