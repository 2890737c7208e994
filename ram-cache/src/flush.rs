//! How a flush is spread over cores, what it reports, and when it may run.

use std::marker::PhantomData;
use std::ops::Add;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// Below this a flush stays on the calling thread, bytes: it is over before another would wake, and the
/// caller would wait for it. A processor that is idle may take milliseconds to be there in a virtual machine.
const ALONE_BELOW: u64 = 2 << 20;
/// The least work taken at once, bytes.
const LEAST_SHARE: u64 = 128 << 10;
/// The most work taken at once, bytes: bounds how long the last core works on alone.
const LARGEST_SHARE: u64 = 2 << 20;
/// Shares per core, so that a core that was busy elsewhere does not hold up the others.
const SHARES_PER_THREAD: u64 = 4;

/// The threads that copy a flush into the guest. One pool serves any number of caches; its threads
/// sleep between flushes.
#[derive(Debug)]
pub struct FlushPool {
    /// Those that help the calling thread; `None` when it has no help.
    helpers: Option<ThreadPool>,
}

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
        if threads <= 1 {
            return Ok(Self { helpers: None });
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads - 1)
            .thread_name(|index| format!("flush-{index}"))
            .build()
            .map_err(|source| FlushPoolError {
                threads: threads - 1,
                source,
            })?;
        Ok(Self {
            helpers: Some(pool),
        })
    }

    /// Flushes on as many threads as there are cores for this process, at most
    /// [`FlushPool::MAX_DEFAULT_THREADS`].
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn for_this_host() -> Result<Self, FlushPoolError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(cores.min(Self::MAX_DEFAULT_THREADS))
    }

    /// How many bytes a share of a flush of `bytes` should have, `None` if it is to stay whole.
    pub(crate) fn share(&self, bytes: u64) -> Option<u64> {
        let threads = self.helpers.as_ref()?.current_num_threads() as u64 + 1;
        if bytes < ALONE_BELOW {
            return None;
        }
        Some((bytes / (threads * SHARES_PER_THREAD)).clamp(LEAST_SHARE, LARGEST_SHARE))
    }

    /// Does every share, in any order. Whoever is free takes the next one, and the calling thread
    /// starts at once: while the helpers wake up it is copying.
    ///
    /// # Errors
    /// Those of `work`; the shares not begun by then are left undone.
    pub(crate) fn run<S, E, F>(&self, shares: &[S], work: F) -> Result<FlushReport, E>
    where
        S: Sync,
        E: Send,
        F: Fn(&S) -> Result<FlushReport, E> + Sync,
    {
        let next = AtomicUsize::new(0);
        let take_shares = || {
            let mut sum = FlushReport::default();
            // `Relaxed`: the shares were written before the helpers were spawned, and each index
            // is given out once whatever the ordering.
            while let Some(share) = shares.get(next.fetch_add(1, Ordering::Relaxed)) {
                match work(share) {
                    Ok(report) => sum = sum + report,
                    Err(error) => {
                        next.store(shares.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
            Ok(sum)
        };
        let Some(helpers) = &self.helpers else {
            return take_shares();
        };
        let helped = Mutex::new(Ok(FlushReport::default()));
        let own = helpers.in_place_scope(|scope| {
            for _ in 0..helpers.current_num_threads() {
                scope.spawn(|_| {
                    let result = take_shares();
                    let mut helped = helped.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Ok(sum) = &mut *helped {
                        match result {
                            Ok(report) => *sum = *sum + report,
                            Err(error) => *helped = Err(error),
                        }
                    }
                });
            }
            take_shares()
        })?;
        Ok(own
            + helped
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner)?)
    }
}

/// The threads of a [`FlushPool`] could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {threads} flush threads")]
pub struct FlushPoolError {
    /// How many were wanted.
    pub threads: usize,
    source: ThreadPoolBuildError,
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
    use super::*;

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

    #[test]
    fn every_share_is_done_once_and_an_error_is_reported() {
        for threads in [1, 3] {
            let pool = FlushPool::new(threads).unwrap();
            let shares: Vec<u64> = (0..100).collect();
            let done = pool.run(&shares, |&pages| {
                Ok::<_, ()>(FlushReport {
                    pages,
                    runs: 1,
                    bytes: pages * 4096,
                })
            });
            assert_eq!(
                done,
                Ok(FlushReport {
                    pages: 4950,
                    runs: 100,
                    bytes: 4950 * 4096
                })
            );
            let failed = pool.run(&shares, |&pages| match pages {
                40 => Err("page 40"),
                _ => Ok(FlushReport::default()),
            });
            assert_eq!(failed, Err("page 40"));
        }
    }
}
