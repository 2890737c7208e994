//! How a flush is spread over cores, what it reports, and when it may run.

use std::marker::PhantomData;
use std::ops::{Add, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::{io, thread};

use crate::error::CacheError;
use crate::help::Open;

/// Below this a flush stays on the calling thread, bytes: it is over before another would be awake. A
/// processor that is idle may take milliseconds to be there in a virtual machine.
const ALONE_BELOW: u64 = 2 << 20;
/// The least work taken at once, bytes.
const LEAST_SHARE: u64 = 128 << 10;
/// The most work taken at once, bytes: bounds how long the last core works on alone.
const LARGEST_SHARE: u64 = 2 << 20;
/// Shares per core, so that a core that was busy elsewhere does not hold up the others.
const SHARES_PER_THREAD: u64 = 4;

/// The threads that copy a flush into the guest. One pool serves any number of caches; its threads
/// sleep between flushes, and end when it is dropped.
#[derive(Debug)]
pub struct FlushPool {
    /// A way to each thread that helps the calling one: every flush asks all of them.
    helpers: Vec<mpsc::Sender<Job>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl FlushPool {
    /// The most threads [`FlushPool::for_this_host`] takes: copying is bound by memory bandwidth,
    /// which a few cores use up.
    pub const MAX_DEFAULT_THREADS: usize = 8;

    /// Flushes on `threads` threads, of which the one that calls [`RamCache::commit`] is one. 0
    /// is taken as 1.
    ///
    /// # Errors
    /// The threads cannot be started.
    ///
    /// [`RamCache::commit`]: crate::RamCache::commit
    pub fn new(threads: usize) -> Result<Self, FlushPoolError> {
        let wanted = threads.saturating_sub(1);
        let helpers = (0..wanted)
            .map(|index| {
                let (helper, jobs) = mpsc::channel::<Job>();
                thread::Builder::new()
                    .name(format!("flush-{index}"))
                    .spawn(move || jobs.into_iter().for_each(|job| job()))?;
                Ok(helper)
            })
            .collect::<io::Result<_>>()
            .map_err(|source| FlushPoolError {
                threads: wanted,
                source,
            })?;
        Ok(Self { helpers })
    }

    /// Flushes on as many threads as there are cores for this process, at most
    /// [`FlushPool::MAX_DEFAULT_THREADS`].
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn for_this_host() -> Result<Self, FlushPoolError> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::new(cores.min(Self::MAX_DEFAULT_THREADS))
    }

    /// How many bytes a share of a flush of `bytes` should have, `None` if it is to stay whole.
    pub(crate) fn share(&self, bytes: u64) -> Option<u64> {
        if self.helpers.is_empty() || bytes < ALONE_BELOW {
            return None;
        }
        let threads = self.helpers.len() as u64 + 1;
        Some((bytes / (threads * SHARES_PER_THREAD)).clamp(LEAST_SHARE, LARGEST_SHARE))
    }

    /// Does every share, in any order. Whoever is free takes the next one, and the calling thread
    /// starts at once: while the helpers wake up it is copying. It does not wait for a helper that has
    /// not begun when no share is left, but for those inside a share; and what `work` owns is held by
    /// nobody any more when this returns.
    ///
    /// # Errors
    /// Those of `work`, or a helper panicked; the shares not begun by then are left undone.
    pub(crate) fn run<F>(&self, shares: Vec<Share>, work: F) -> Result<FlushReport, CacheError>
    where
        F: Fn(&Share) -> Result<FlushReport, CacheError> + Send + Sync + 'static,
    {
        let flush = Arc::new(Flush {
            shares,
            next: AtomicUsize::new(0),
            work,
            outcome: Mutex::new(Ok(FlushReport::default())),
        });
        // Also if this thread panics it is dropped, which waits for those inside.
        let open = Open::new(Arc::clone(&flush));
        for thread in &self.helpers {
            let helper = open.helper();
            // One that is gone does not help.
            let _ = thread.send(Box::new(move || helper.help(|flush| flush.help())));
        }
        flush.take_shares();
        drop(open);
        std::mem::replace(&mut *flush.outcome(), Ok(FlushReport::default()))
    }
}

/// A part of a flush: words of the bitmaps of a block.
#[derive(Debug)]
pub(crate) struct Share {
    /// The block's index.
    pub(crate) block: usize,
    pub(crate) words: Range<usize>,
}

/// A flush that several threads are at.
struct Flush<F> {
    shares: Vec<Share>,
    /// The share that is begun next; beyond the last one when none is to be.
    next: AtomicUsize,
    work: F,
    /// Of the threads that are done.
    outcome: Mutex<Result<FlushReport, CacheError>>,
}

impl<F> Flush<F>
where
    F: Fn(&Share) -> Result<FlushReport, CacheError>,
{
    /// Does shares until none is left.
    fn take_shares(&self) {
        let mut sum = FlushReport::default();
        // `Relaxed`: the shares were written before the helpers were asked, and each index is given
        // out once whatever the ordering.
        while let Some(share) = self.shares.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            match (self.work)(share) {
                Ok(report) => sum = sum + report,
                Err(error) => return self.fail(error),
            }
        }
        if let Ok(total) = &mut *self.outcome() {
            *total = *total + sum;
        }
    }

    /// The same on a helper, whose panic nobody else would see.
    fn help(&self) {
        // What a panic leaves behind is a part of a checkpoint, as an error does.
        if catch_unwind(AssertUnwindSafe(|| self.take_shares())).is_err() {
            self.fail(CacheError::Panicked);
        }
    }

    /// The first error is the outcome, and no share is begun any more.
    fn fail(&self, error: CacheError) {
        self.next.store(self.shares.len(), Ordering::Relaxed);
        let mut outcome = self.outcome();
        if outcome.is_ok() {
            *outcome = Err(error);
        }
    }

    fn outcome(&self) -> MutexGuard<'_, Result<FlushReport, CacheError>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of a [`FlushPool`] could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {threads} flush threads")]
pub struct FlushPoolError {
    /// How many were wanted.
    pub threads: usize,
    source: io::Error,
}

/// What a flush did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushReport {
    /// Pages copied into the guest.
    pub pages: u64,
    /// Copies made. A run of consecutive pages is one, or several where cores shared it.
    pub runs: u64,
    /// Bytes copied into the guest.
    pub bytes: u64,
}

impl Add for FlushReport {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            runs: self.runs + other.runs,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// The caller's word that the guest is stopped and that the checkpoint is complete: no vCPU runs,
/// no device writes guest RAM, and every receive thread has passed the sync point that ends the
/// checkpoint, so that none writes the cache.
///
/// It borrows the value that stands for the stop (the VMM's pause guard, its exclusive reference to
/// the vCPUs), so that the guest cannot be resumed while the witness is in use. It cannot check the
/// claim; it makes the caller state it where a reader will look.
#[derive(Clone, Copy, Debug)]
pub struct GuestStopped<'pause>(PhantomData<&'pause ()>);

impl<'pause> GuestStopped<'pause> {
    /// The guest stays stopped for as long as `pause` is borrowed.
    pub const fn witnessed_by<T: ?Sized>(_pause: &'pause T) -> Self {
        Self(PhantomData)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::{Barrier, mpsc};

    use vm_memory::{MmapRegion, VolatileMemory};

    use super::*;
    use crate::{CacheBlockSpec, CacheKind, DiscardControl};

    #[test]
    fn a_pool_of_one_and_a_small_flush_stay_on_the_calling_thread() {
        assert_eq!(FlushPool::new(0).unwrap().share(1 << 30), None);
        assert_eq!(FlushPool::new(1).unwrap().share(1 << 30), None);
        let two = FlushPool::new(2).unwrap();
        assert_eq!(two.share(ALONE_BELOW - 1), None);
        let eighth = ALONE_BELOW / (2 * SHARES_PER_THREAD);
        assert_eq!(two.share(ALONE_BELOW), Some(eighth));
        let many = FlushPool::new(16).unwrap();
        assert_eq!(many.share(ALONE_BELOW), Some(LEAST_SHARE));
        assert_eq!(two.share(1 << 30), Some(LARGEST_SHARE));
    }

    fn shares(count: usize) -> Vec<Share> {
        (0..count)
            .map(|block| Share { block, words: 0..1 })
            .collect()
    }

    fn report(share: &Share) -> FlushReport {
        let pages = share.block as u64;
        FlushReport {
            pages,
            runs: 1,
            bytes: pages * 4096,
        }
    }

    /// The sum of a hundred shares' reports.
    const HUNDRED: FlushReport = FlushReport {
        pages: 4950,
        runs: 100,
        bytes: 4950 * 4096,
    };

    fn is_helper() -> bool {
        std::thread::current()
            .name()
            .is_some_and(|name| name.starts_with("flush-"))
    }

    /// A pool with one helper, which begins nothing before the sender is dropped.
    fn busy_pool() -> (FlushPool, mpsc::Sender<()>) {
        let pool = FlushPool::new(2).unwrap();
        let (free, is_free) = mpsc::channel();
        let busy = Box::new(move || assert!(is_free.recv().is_err()));
        pool.helpers[0].send(busy).unwrap();
        (pool, free)
    }

    #[test]
    fn every_share_is_done_once_and_an_error_is_reported() {
        for threads in [1, 3] {
            let pool = FlushPool::new(threads).unwrap();
            let done = pool.run(shares(100), |share| Ok(report(share)));
            assert_eq!(done.unwrap(), HUNDRED);
            let failed = pool.run(shares(100), |share| match share.block {
                40 => Err(CacheError::StagingFull { pages: 40 }),
                _ => Ok(report(share)),
            });
            assert!(matches!(failed, Err(CacheError::StagingFull { pages: 40 })));
        }
    }

    #[test]
    fn after_an_error_no_share_is_begun() {
        let (pool, _free) = busy_pool();
        let begun = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&begun);
        let failed = pool.run(shares(100), move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Err(CacheError::StagingFull { pages: 1 })
        });
        assert!(matches!(failed, Err(CacheError::StagingFull { .. })));
        assert_eq!(begun.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_helper_that_has_not_begun_is_not_waited_for_and_holds_nothing() {
        let (pool, free) = busy_pool();
        let cache = Arc::new(());
        let flush = || {
            let cache = Arc::clone(&cache);
            pool.run(shares(100), move |share| {
                assert_eq!(Arc::strong_count(&cache), 2);
                Ok(report(share))
            })
        };
        for _ in 0..3 {
            assert_eq!(flush().unwrap(), HUNDRED);
            assert_eq!(Arc::strong_count(&cache), 1);
        }
        // It comes for three flushes that are over, and then for one that needs it.
        drop(free);
        let both = Arc::new(Barrier::new(2));
        let helped = pool.run(shares(2), move |share| {
            both.wait();
            Ok(report(share))
        });
        assert_eq!(helped.unwrap().runs, 2);
    }

    #[test]
    fn a_helper_inside_a_share_is_waited_for_and_holds_nothing_afterwards() {
        let pool = FlushPool::new(2).unwrap();
        for _ in 0..100 {
            let cache = Arc::new(Barrier::new(2));
            let both = Arc::clone(&cache);
            let done = pool.run(shares(2), move |share| {
                both.wait();
                if is_helper() {
                    std::thread::yield_now();
                }
                Ok(report(share))
            });
            assert_eq!(done.unwrap().runs, 2);
            assert_eq!(Arc::strong_count(&cache), 1);
        }
    }

    #[test]
    fn a_panic_ends_the_flush_on_whichever_thread_it_is() {
        let pool = FlushPool::new(2).unwrap();
        for on_helper in [true, false] {
            let cache = Arc::new(Barrier::new(2));
            let both = Arc::clone(&cache);
            let run = || {
                pool.run(shares(2), move |share| {
                    both.wait();
                    assert_ne!(is_helper(), on_helper, "flush");
                    Ok(report(share))
                })
            };
            let result = catch_unwind(AssertUnwindSafe(run));
            assert_eq!(Arc::strong_count(&cache), 1);
            if on_helper {
                assert!(matches!(result.unwrap(), Err(CacheError::Panicked)));
            } else {
                assert!(result.is_err());
            }
        }
    }

    #[test]
    fn a_cache_is_released_while_a_helper_of_its_last_commit_has_not_begun() {
        const LEN: usize = 4 << 20;
        for kind in [CacheKind::Mirror, CacheKind::Cow] {
            let (pool, free) = busy_pool();
            let guest = Arc::new(MmapRegion::<()>::new(LEN).unwrap());
            let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
            let discard = DiscardControl::new();
            let cache = kind.make(vec![block], discard.disable().unwrap()).unwrap();
            cache.enter_colo().unwrap();
            let mut offset = 0;
            while offset < LEN {
                let slice = cache.prepare(0, offset as u64, LEN - offset).unwrap();
                slice.copy_from(&vec![7u8; slice.len()]);
                offset += slice.len();
            }
            let stopped = GuestStopped::witnessed_by(&guest);
            let report = cache.commit(stopped, &pool).unwrap();
            assert_eq!(report.bytes, LEN as u64);
            cache.release();
            assert_eq!(discard.allowed(), kind == CacheKind::Mirror);
            assert_eq!(Arc::strong_count(&guest), 1);
            let mut bytes = vec![0u8; LEN];
            guest.as_volatile_slice().copy_to(&mut bytes);
            assert!(bytes.iter().all(|&byte| byte == 7));
            drop(free);
        }
    }
}
