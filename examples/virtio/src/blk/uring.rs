//! A disk whose requests the kernel does by io_uring.
//!
//! Ranges to discard or zero, and transfers that direct I/O cannot do as they are, go to a thread. A
//! direct write of less than a block, which changes sectors beside its own, is alone under way.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use super::backend::{BlockBackend, Buffer, Completion, Geometry, Operation, RequestId};
use super::file::DiskFile;
use super::pool::{Done, ThreadPool};

/// Requests that the ring holds; more wait here.
const ENTRIES: u32 = 256;

/// Why io_uring cannot be used here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UringError {
    /// The kernel refused a ring.
    #[error("the kernel gives no io_uring")]
    Setup(#[source] io::Error),
    /// The kernel's io_uring cannot do one of the requests.
    #[error("the kernel's io_uring has no {0}")]
    Opcode(&'static str),
}

/// A disk and a ring.
///
/// Dropping it does not wait: the memory of requests under way is never freed then. Pause the device
/// before.
pub struct IoUring {
    disk: Arc<DiskFile>,
    ring: io_uring::IoUring,
    in_ring: HashMap<u64, Entry>,
    next_key: u64,
    waiting: VecDeque<(RequestId, Operation)>,
    pool: ThreadPool,
    in_pool: usize,
    /// A write that is with the thread, and must be alone.
    alone: Option<RequestId>,
    done: Arc<Done>,
}

impl std::fmt::Debug for IoUring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoUring")
            .field("disk", &self.disk)
            .field("in_ring", &self.in_ring.len())
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

/// A request that the kernel has. Its memory stays where it is until the kernel gives it back.
#[derive(Debug)]
struct Entry {
    id: RequestId,
    task: Task,
}

#[derive(Debug)]
enum Task {
    Read {
        offset: u64,
        buffer: Buffer,
        done: usize,
    },
    Write {
        offset: u64,
        data: Arc<Buffer>,
        done: usize,
        fua: bool,
    },
    Flush,
}

impl IoUring {
    /// Sets up a ring for a disk.
    ///
    /// # Errors
    /// See [`UringError`].
    pub fn new(disk: Arc<DiskFile>) -> Result<Self, UringError> {
        let ring = io_uring::IoUring::new(ENTRIES).map_err(UringError::Setup)?;
        let submitter = ring.submitter();
        let mut probe = io_uring::Probe::new();
        submitter
            .register_probe(&mut probe)
            .map_err(UringError::Setup)?;
        for (code, name) in [
            (opcode::Read::CODE, "reads"),
            (opcode::Write::CODE, "writes"),
            (opcode::Fsync::CODE, "flushes"),
        ] {
            if !probe.is_supported(code) {
                return Err(UringError::Opcode(name));
            }
        }
        let done = Arc::new(Done::new().map_err(UringError::Setup)?);
        submitter
            .register_eventfd(done.event().as_raw_fd())
            .map_err(UringError::Setup)?;
        let pool = ThreadPool::with(Arc::clone(&disk), NonZeroUsize::MIN, Arc::clone(&done))
            .map_err(UringError::Setup)?;
        Ok(Self {
            disk,
            ring,
            in_ring: HashMap::new(),
            next_key: 0,
            waiting: VecDeque::new(),
            pool,
            in_pool: 0,
            alone: None,
            done,
        })
    }

    /// Begins what waits, as far as there is room.
    fn pump(&mut self) {
        while self.alone.is_none()
            && self.in_ring.len() < ENTRIES as usize
            && let Some((id, operation)) = self.waiting.pop_front()
        {
            match operation {
                operation if self.must_be_alone(&operation) => {
                    if !self.in_ring.is_empty() || self.in_pool > 0 {
                        self.waiting.push_front((id, operation));
                        break;
                    }
                    self.alone = Some(id);
                    self.give_to_pool(id, operation);
                }
                Operation::Read { offset, buffer }
                    if self.disk.is_aligned(offset, buffer.len()) =>
                {
                    let done = 0;
                    self.enter(
                        id,
                        Task::Read {
                            offset,
                            buffer,
                            done,
                        },
                    );
                }
                Operation::Write { offset, data, fua } => {
                    let done = 0;
                    let write = Task::Write {
                        offset,
                        data,
                        done,
                        fua,
                    };
                    self.enter(id, write);
                }
                Operation::Flush => self.enter(id, Task::Flush),
                other => self.give_to_pool(id, other),
            }
        }
        self.submit_ring();
    }

    /// Whether a request changes whole blocks that it does not cover.
    fn must_be_alone(&self, operation: &Operation) -> bool {
        match operation {
            Operation::Write { offset, data, .. } => !self.disk.is_aligned(*offset, data.len()),
            // Zeroes may have to be written.
            Operation::Zero { offset, len, .. } => {
                !self.disk.is_aligned(*offset, 0)
                    || !self.disk.is_aligned(offset.wrapping_add(*len), 0)
            }
            _ => false,
        }
    }

    fn give_to_pool(&mut self, id: RequestId, operation: Operation) {
        self.in_pool += 1;
        self.pool.submit(id, operation);
    }

    fn submit_ring(&mut self) {
        match self.ring.submit() {
            Ok(_) => {}
            Err(error) => {
                // The entries stay in the ring, and are offered again at the next event.
                tracing::debug!(%error, "io_uring does not take requests now");
                self.done.wake();
            }
        }
    }

    /// Puts a task, or what is left of it, into the ring.
    fn enter(&mut self, id: RequestId, task: Task) {
        let fd = types::Fd(self.disk.file().as_raw_fd());
        let key = self.next_key;
        self.next_key = self.next_key.wrapping_add(1);
        // The entry is kept before the kernel sees it. Moving it does not move its memory, which is
        // on the heap.
        let entry = self.in_ring.entry(key).or_insert(Entry { id, task });
        let request = match &mut entry.task {
            Task::Read {
                offset,
                buffer,
                done,
            } => {
                let rest = &mut buffer.bytes_mut()[*done..];
                let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
                opcode::Read::new(fd, rest.as_mut_ptr(), len)
                    .offset(*offset + *done as u64)
                    .build()
            }
            Task::Write {
                offset, data, done, ..
            } => {
                let rest = &data.bytes()[*done..];
                let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
                opcode::Write::new(fd, rest.as_ptr(), len)
                    .offset(*offset + *done as u64)
                    .build()
            }
            Task::Flush => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        if !self.push(&request.user_data(key))
            && let Some(Entry { id, task }) = self.in_ring.remove(&key)
        {
            let buffer = task.buffer();
            let result = Err(io::Error::other("the ring is full"));
            // Counted as one that came from the thread, as its completion will be.
            self.in_pool += 1;
            self.done.add(Completion { id, buffer, result });
        }
    }

    /// Whether the ring had room. It has: no more requests are in it than it has entries.
    fn push(&mut self, request: &squeue::Entry) -> bool {
        // SAFETY: the memory of the request belongs to an entry of `in_ring`, which is dropped when
        // the kernel has given it back, and never if this is dropped before. The file is open as
        // long as this is.
        unsafe { self.ring.submission().push(request) }.is_ok()
    }

    /// Takes what the kernel has ended.
    fn reap(&mut self, done: &mut Vec<Completion>) {
        let ended: Vec<(u64, i32)> = (self.ring.completion())
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (key, result) in ended {
            let Some(Entry { id, task }) = self.in_ring.remove(&key) else {
                continue;
            };
            let result = match usize::try_from(result) {
                Ok(count) => Ok(count),
                Err(_) => Err(io::Error::from_raw_os_error(result.wrapping_neg())),
            };
            match self.go_on(id, task, result) {
                Ok(()) => {}
                Err((buffer, result)) => done.push(Completion { id, buffer, result }),
            }
        }
    }

    /// Goes on with a task of which a part was done. As an error it gives what the task ended with.
    fn go_on(
        &mut self,
        id: RequestId,
        mut task: Task,
        result: io::Result<usize>,
    ) -> Result<(), (Option<Buffer>, io::Result<()>)> {
        let count = match result {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                self.enter(id, task);
                return Ok(());
            }
            Err(error) => return Err((task.buffer(), Err(error))),
        };
        match &mut task {
            Task::Flush => return Err((None, Ok(()))),
            Task::Read { buffer, done, .. } => {
                *done += count;
                if *done >= buffer.len() {
                    return Err((task.buffer(), Ok(())));
                }
            }
            Task::Write {
                data, done, fua, ..
            } => {
                *done += count;
                if *done >= data.len() {
                    if *fua {
                        self.enter(id, Task::Flush);
                        return Ok(());
                    }
                    return Err((None, Ok(())));
                }
            }
        }
        if count == 0 {
            return Err((task.buffer(), Err(io::ErrorKind::UnexpectedEof.into())));
        }
        self.enter(id, task);
        Ok(())
    }
}

impl Task {
    fn buffer(self) -> Option<Buffer> {
        match self {
            Self::Read { buffer, .. } => Some(buffer),
            _ => None,
        }
    }
}

impl BlockBackend for IoUring {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn submit(&mut self, id: RequestId, operation: Operation) {
        self.waiting.push_back((id, operation));
        self.pump();
    }

    fn event(&self) -> Arc<OwnedFd> {
        self.done.event()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        let before = done.len();
        // Clears the event, so it comes before the ring is looked at.
        self.done.take(done);
        for completion in &done[before..] {
            self.in_pool = self.in_pool.saturating_sub(1);
            if self.alone == Some(completion.id) {
                self.alone = None;
            }
        }
        self.reap(done);
        self.pump();
    }
}

impl Drop for IoUring {
    fn drop(&mut self) {
        // The kernel may still write into it.
        std::mem::forget(std::mem::take(&mut self.in_ring));
    }
}
