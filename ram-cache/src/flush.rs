//! How a flush is spread over cores, what it reports, and when it may run.

use std::marker::PhantomData;
use std::ops::Add;

use rayon::iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// Below this a flush stays on the calling thread: waking the pool costs more than the copy, bytes.
const ALONE_BELOW: u64 = 256 << 10;
/// The least work worth handing to another core, bytes.
const LEAST_SHARE: u64 = 128 << 10;
/// The most work taken at once: bounds how long the last core works on alone, bytes.
const LARGEST_SHARE: u64 = 2 << 20;
/// Shares per core, so that a core that was busy elsewhere does not hold up the others.
const SHARES_PER_THREAD: u64 = 4;

/// The threads that copy a flush into the guest. One pool serves any number of caches; its threads
/// sleep between flushes.
#[derive(Debug)]
pub struct FlushPool {
    /// `None`: the calling thread does it all.
    threads: Option<ThreadPool>,
}

impl FlushPool {
    /// The most threads [`FlushPool::for_this_host`] takes: copying is bound by memory bandwidth,
    /// which a few cores use up.
    pub const MAX_DEFAULT_THREADS: usize = 8;

    /// A pool of `threads` threads; 0 or 1 is none, flushes then run on the calling thread.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, FlushPoolError> {
        if threads <= 1 {
            return Ok(Self { threads: None });
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("flush-{index}"))
            .build()
            .map_err(|source| FlushPoolError { threads, source })?;
        Ok(Self {
            threads: Some(pool),
        })
    }

    /// A pool with a thread for each core this process may use, at most
    /// [`FlushPool::MAX_DEFAULT_THREADS`].
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn for_this_host() -> Result<Self, FlushPoolError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new(cores.min(Self::MAX_DEFAULT_THREADS))
    }

    /// The number of shares' bytes to split a flush of `bytes` into, `None` if it is to stay whole.
    pub(crate) fn share(&self, bytes: u64) -> Option<u64> {
        let threads = self.threads.as_ref()?.current_num_threads() as u64;
        if bytes < ALONE_BELOW {
            return None;
        }
        Some((bytes / (threads * SHARES_PER_THREAD)).clamp(LEAST_SHARE, LARGEST_SHARE))
    }

    /// Does every share, in any order, on the threads of the pool.
    pub(crate) fn run<S, E, F>(&self, shares: &[S], work: F) -> Result<FlushReport, E>
    where
        S: Sync,
        E: Send,
        F: Fn(&S) -> Result<FlushReport, E> + Sync + Send,
    {
        let Some(pool) = &self.threads else {
            return shares
                .iter()
                .try_fold(FlushReport::default(), |sum, share| Ok(sum + work(share)?));
        };
        pool.install(|| {
            shares
                .par_iter()
                .with_max_len(1)
                .map(work)
                .try_reduce(FlushReport::default, |a, b| Ok(a + b))
        })
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
        assert_eq!(two.share(ALONE_BELOW), Some(LEAST_SHARE));
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
