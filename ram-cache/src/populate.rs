//! Guest memory that is there before it is written.

use std::io;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use rustix::io::Errno;
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

use crate::mapping::{self, GuestMapping};

/// What is populated between two looks at whether to go on, bytes: some milliseconds' worth.
const PIECE: usize = 8 << 20;

/// Asks for huge pages behind a mapping (`MADV_HUGEPAGE`), which are taken from the system by one fault
/// for every 2 MiB instead of one for every 4 KiB, and cost a guest fewer misses of the TLB.
///
/// It is a wish: memory that is not anonymous has huge pages only where
/// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` says `advise` or more. A fault may take long
/// where the system has to make room for a huge page first. The price is memory: one byte written takes
/// up 2 MiB, so a guest whose zero pages lie scattered takes up all of its RAM. A
/// [`CowCache`](crate::CowCache) puts a mapping of a file in the place of guest memory, which is then
/// backed by small pages whatever was asked for.
///
/// # Errors
/// [`PopulateError::HugePages`]: the kernel was built without them.
pub fn advise_huge_pages<B: Bitmap + Send + Sync>(
    region: &MmapRegion<B>,
) -> Result<(), PopulateError> {
    mapping::advise_huge(region).map_err(PopulateError::HugePages)
}

/// Takes the memory of mappings from the system on a pool of threads of its own (`MADV_POPULATE_WRITE`, Linux
/// 5.14), which leaves their content as it is: others may write there meanwhile.
///
/// It is for a destination that waits for its source: the work is the same as that of the page faults
/// that it spares the receiving threads, so it pays where it is done before the first page comes, or
/// by cores that have nothing else to do. All of the memory is taken up then, that of pages that will
/// be zero too. It is not for a guest under a [`CowCache`](crate::CowCache), which replaces the
/// mapping: what was populated would be thrown away.
///
/// Dropping it ends it.
#[derive(Debug)]
pub struct Populate {
    work: Arc<Work>,
    /// It waits for the pool, which ends with it.
    thread: Option<JoinHandle<Result<Populated, PopulateError>>>,
}

/// How it ended, if not in an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Populated {
    /// All of the memory is there.
    Whole,
    /// It was cancelled before that.
    Cancelled,
    /// The kernel cannot do it: memory is taken when it is first written, as ever.
    Unsupported,
}

/// Why memory is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PopulateError {
    /// The system has no more. Where it overcommits it may kill a process instead, unless memory is
    /// bounded for this one (cgroup, hugetlb).
    #[error("no memory for {len:#x} bytes of guest ram at {offset:#x} of their mapping")]
    NoMemory {
        /// Where in the mapping, bytes.
        offset: usize,
        /// How much was asked for at once, bytes.
        len: usize,
    },
    /// Another reason.
    #[error("cannot populate {len:#x} bytes of guest ram at {offset:#x} of their mapping")]
    Host {
        /// Where in the mapping, bytes.
        offset: usize,
        /// How much was asked for at once, bytes.
        len: usize,
        /// The system's.
        source: io::Error,
    },
    /// No huge pages can be asked for.
    #[error("cannot ask for huge pages")]
    HugePages(#[source] io::Error),
    /// A thread cannot be started.
    #[error("cannot start a thread to populate guest ram")]
    Spawn(#[source] io::Error),
    /// A thread panicked.
    #[error("a thread that populates guest ram panicked")]
    Panicked,
}

#[derive(Debug)]
struct Work {
    regions: Vec<GuestMapping>,
    /// Region, offset, and length of each piece.
    pieces: Vec<(usize, usize, usize)>,
    is_over: AtomicBool,
}

impl Populate {
    /// Begins, on `threads` threads. The memory is not unmapped before they have ended.
    ///
    /// # Errors
    /// [`PopulateError::Spawn`].
    pub fn start<M: Into<GuestMapping>>(
        regions: impl IntoIterator<Item = M>,
        threads: NonZeroUsize,
    ) -> Result<Self, PopulateError> {
        let work = Arc::new(Work::new(regions.into_iter().map(Into::into).collect()));
        let count = threads.get().min(work.pieces.len().max(1));
        let pool = ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("populate-{index}"))
            .build()
            .map_err(|error| PopulateError::Spawn(io::Error::other(error)))?;
        let in_thread = Arc::clone(&work);
        let thread = thread::Builder::new()
            .name("populate".to_owned())
            .spawn(move || pool.install(|| in_thread.run()))
            .map_err(PopulateError::Spawn)?;
        Ok(Self {
            work,
            thread: Some(thread),
        })
    }

    /// Ends it soon, whatever is left.
    pub fn cancel(&self) {
        self.work.is_over.store(true, Ordering::Relaxed);
    }

    /// Returns whether it has ended, so that [`Populate::join`] does not wait.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// [`PopulateError`]; some of the memory is there then.
    pub fn join(mut self) -> Result<Populated, PopulateError> {
        self.wait()
    }

    fn wait(&mut self) -> Result<Populated, PopulateError> {
        match self.thread.take() {
            Some(thread) => thread.join().unwrap_or(Err(PopulateError::Panicked)),
            None => Ok(Populated::Cancelled),
        }
    }
}

impl Drop for Populate {
    fn drop(&mut self) {
        self.cancel();
        // Nobody asks any more.
        let _ = self.wait();
    }
}

impl Work {
    fn new(regions: Vec<GuestMapping>) -> Self {
        let pieces = regions.iter().enumerate().flat_map(|(index, region)| {
            let len = region.size();
            let offsets = (0..len).step_by(PIECE);
            offsets.map(move |offset| (index, offset, PIECE.min(len - offset)))
        });
        Self {
            pieces: pieces.collect(),
            regions,
            is_over: AtomicBool::new(false),
        }
    }

    /// Populates the pieces on the threads of the pool that this runs in.
    fn run(&self) -> Result<Populated, PopulateError> {
        let pieces = self.pieces.par_iter().with_max_len(1);
        let ended = pieces.try_for_each(|&(region, offset, len)| {
            // `Relaxed`: what is in the memory is not this crate's to order.
            if self.is_over.load(Ordering::Relaxed) {
                return ControlFlow::Break(Ok(Populated::Cancelled));
            }
            let Some(region) = self.regions.get(region) else {
                return ControlFlow::Continue(());
            };
            match mapping::populate(region.as_mapping(), offset, len) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => ControlFlow::Break(ended(error, offset, len)),
            }
        });
        match ended {
            ControlFlow::Continue(()) => Ok(Populated::Whole),
            ControlFlow::Break(ended) => ended,
        }
    }
}

/// What an answer of the kernel's means.
fn ended(source: io::Error, offset: usize, len: usize) -> Result<Populated, PopulateError> {
    match Errno::from_io_error(&source) {
        Some(Errno::INVAL) => Ok(Populated::Unsupported),
        Some(Errno::NOMEM) => Err(PopulateError::NoMemory { offset, len }),
        _ => Err(PopulateError::Host {
            offset,
            len,
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;

    const THREADS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);

    fn region(len: usize) -> Arc<MmapRegion> {
        Arc::new(MmapRegion::new(len).unwrap())
    }

    fn resident(region: &MmapRegion) -> usize {
        mapping::resident_pages(region).unwrap()
    }

    #[test]
    fn all_of_the_memory_is_there_and_holds_what_it_held() {
        let regions = vec![region(3 * PIECE + 4096), region(4096), region(PIECE)];
        let written = regions[0].as_volatile_slice();
        written.write_obj(7_u64, PIECE + 8).unwrap();
        assert!(resident(&regions[0]) < 1024);
        let populate = Populate::start(regions.clone(), THREADS).unwrap();
        while !populate.has_ended() {
            thread::yield_now();
        }
        match populate.join().unwrap() {
            Populated::Whole => {
                for region in &regions {
                    assert_eq!(resident(region), region.size() / 4096);
                }
            }
            // Before Linux 5.14.
            other => assert_eq!(other, Populated::Unsupported),
        }
        assert_eq!(written.read_obj::<u64>(PIECE + 8).unwrap(), 7);
        assert_eq!(written.read_obj::<u64>(PIECE).unwrap(), 0);
    }

    #[test]
    fn what_is_cancelled_takes_no_more() {
        let memory = region(64 * PIECE);
        let work = Work::new(vec![Arc::clone(&memory).into()]);
        work.is_over.store(true, Ordering::Relaxed);
        assert_eq!(work.run().unwrap(), Populated::Cancelled);
        assert_eq!(resident(&memory), 0);
    }

    #[test]
    fn dropped_it_is_over_and_the_memory_can_go() {
        let memory = region(64 * PIECE);
        drop(Populate::start([Arc::clone(&memory)], THREADS).unwrap());
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn the_kernels_answers_are_told_apart() {
        let ended = |errno| ended(io::Error::from_raw_os_error(errno), PIECE, 4096);
        assert_eq!(ended(libc::EINVAL).unwrap(), Populated::Unsupported);
        assert!(matches!(
            ended(libc::ENOMEM),
            Err(PopulateError::NoMemory {
                offset: PIECE,
                len: 4096
            })
        ));
        assert!(matches!(
            ended(libc::EFAULT),
            Err(PopulateError::Host { offset: PIECE, .. })
        ));
    }

    #[test]
    fn memory_that_is_not_to_be_had_is_told_with_its_place() {
        let file = mapping::memory_file(2 * PIECE).unwrap();
        let shorter = file.try_clone().unwrap();
        let region = mapping::shared(file, 2 * PIECE).unwrap();
        shorter.set_len(PIECE as u64 + 4096).unwrap();
        let populate = Populate::start([Arc::new(region)], NonZeroUsize::MIN).unwrap();
        match populate.join() {
            Err(PopulateError::Host {
                offset: PIECE,
                len: PIECE,
                source,
            }) => {
                assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
            }
            // Before Linux 5.14.
            other => assert!(matches!(other, Ok(Populated::Unsupported)), "{other:?}"),
        }
    }

    #[test]
    fn huge_pages_change_nothing_of_what_is_there() {
        let region = region(2 * PIECE);
        let slice = region.as_volatile_slice();
        slice.write_obj(9_u64, 4096).unwrap();
        if let Err(error) = advise_huge_pages(&region) {
            // A kernel without them.
            assert!(matches!(error, PopulateError::HugePages(_)), "{error}");
        }
        assert_eq!(slice.read_obj::<u64>(4096).unwrap(), 9);
        assert_eq!(slice.read_obj::<u64>(PIECE).unwrap(), 0);
    }
}
