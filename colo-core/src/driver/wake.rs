//! How other threads wake a driver that waits.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering};

/// A pipe that holds one byte at most, so that it never fills and can be polled beside a connection.
#[derive(Debug)]
pub(super) struct Wake {
    writer: Mutex<PipeWriter>,
    reader: PipeReader,
    raised: Raised,
}

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Self {
            writer: Mutex::new(writer),
            reader,
            raised: Raised::new(),
        })
    }

    /// Wakes the driver. Whatever the caller has stored before, the driver sees when it looks next.
    pub(super) fn wake(&self) {
        if self.raised.raise() {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            // The reader lives as long as the writer, and the pipe is empty: this does not fail.
            // If it does, the next request wakes.
            if writer.write_all(&[1]).is_err() {
                self.raised.lower();
            }
        }
    }

    /// Readable when somebody asks for something, to be followed by [`Self::wait`].
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// Blocks until somebody has called [`Self::wake`]. What was stored before that is seen by the
    /// caller afterwards.
    pub(super) fn wait(&self) -> io::Result<()> {
        (&self.reader).read_exact(&mut [0])?;
        self.raised.lower();
        Ok(())
    }
}

/// Whether the byte is in the pipe, or about to be.
///
/// Both sides use a read-modify-write. A requester stores its request and then raises; the driver
/// lowers and then looks for requests. Of two such operations on one flag one sees the other's
/// result: either the driver lowers after the requester has raised, and sees the request; or the
/// requester finds the flag low, and writes a byte. With a plain store in [`Raised::lower`] the
/// driver could look for requests before its store is visible: it would miss the request, and the
/// requester, which still finds the flag up, would write nothing.
#[derive(Debug)]
struct Raised(AtomicBool);

impl Raised {
    fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Returns whether the caller has to write the byte.
    fn raise(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    fn lower(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    #[test]
    fn no_request_of_many_threads_is_slept_through() {
        let wake = Arc::new(Wake::new().unwrap());
        let asked = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (wake, asked) = (Arc::clone(&wake), Arc::clone(&asked));
                thread::spawn(move || {
                    for _ in 0..1000 {
                        asked.fetch_add(1, Ordering::Release);
                        wake.wake();
                    }
                })
            })
            .collect();
        // Hangs if a wake-up is lost.
        while asked.load(Ordering::Acquire) < 4000 {
            wake.wait().unwrap();
        }
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(asked.load(Ordering::Acquire), 4000);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test --release -p colo-core --lib loom`.
#[cfg(loom)]
#[cfg(test)]
mod loom_tests {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;

    /// Two requests, while the driver takes the byte of an earlier wake-up: what the driver does not
    /// see has left a byte behind.
    #[test]
    fn loom_a_request_is_seen_or_a_byte_is_in_the_pipe() {
        loom::model(|| {
            let raised = Arc::new(Raised::new());
            let bytes = Arc::new(AtomicUsize::new(0));
            assert!(raised.raise());
            bytes.fetch_add(1, Ordering::Relaxed);
            let requests: Vec<_> = (0..2)
                .map(|_| {
                    let (raised, bytes) = (raised.clone(), bytes.clone());
                    let request = Arc::new(AtomicBool::new(false));
                    let stored = request.clone();
                    let thread = thread::spawn(move || {
                        stored.store(true, Ordering::Release);
                        if raised.raise() {
                            bytes.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    (request, thread)
                })
                .collect();
            // The driver: the byte that is there, then a look at the requests.
            bytes.fetch_sub(1, Ordering::Relaxed);
            raised.lower();
            let seen: Vec<bool> = requests
                .iter()
                .map(|(request, _)| request.load(Ordering::Acquire))
                .collect();
            for (_, thread) in requests {
                thread.join().unwrap();
            }
            let left = bytes.load(Ordering::Relaxed);
            assert!(left <= 1, "{left} bytes in the pipe");
            assert!(left == 1 || seen.iter().all(|seen| *seen), "{seen:?}");
        });
    }
}
