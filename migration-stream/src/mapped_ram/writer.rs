//! From memory into a file: each page to its own place, as often as it is sent.

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::error::MappedRamError;
use crate::io::{CancelToken, PositionedFile};
use crate::name::put_counted;
use crate::ram::{BlockId, RamBlockTable, ZeroPageDetection};
use crate::raw::configuration::MAPPED_RAM;
use crate::raw::mapped_ram::{HEADER_LEN, MappedArea};
use crate::raw::ram::{put_total, zero_check};
use crate::raw::rate::RateLimiter;
use crate::raw::transport::SendPages;
use crate::{GuestRam, MemoryError, PAGE_SIZE, StreamWriter, TransportCounters, TransportError};

/// [`PAGE_SIZE`] as a length in memory.
const PAGE_LEN: usize = 4096;
/// Runs of pages that wait for each thread at most.
const DEPTH: usize = 2;

/// Writes pages to their places in a file, a [`SendPages`] for a stream
/// [to a file](StreamWriter::to_file). Its errors' source is [`MappedRamError`].
///
/// A page that is zero is not written: its bit is clear, whatever is in its place. The bitmaps are
/// written when RAM is complete; a file that was given up before has none.
pub struct FileWriter {
    pages: Arc<Pages>,
    /// The same file, for bitmaps.
    file: Arc<dyn PositionedFile>,
    threads: Vec<JoinHandle<()>>,
    count: NonZeroU8,
}

impl FileWriter {
    /// Writes memory of `ram` into `file`, which is the one that the stream is written to.
    #[must_use]
    pub fn new(
        ram: Arc<dyn GuestRam>,
        file: Arc<dyn PositionedFile>,
        detection: ZeroPageDetection,
    ) -> Self {
        Self {
            pages: Arc::new(Pages {
                ram,
                file: Arc::clone(&file),
                looks_for_zero: detection != ZeroPageDetection::None,
                blocks: Vec::new(),
                normal: AtomicU64::new(0),
                zero: AtomicU64::new(0),
                limiter: OnceLock::new(),
                cancel: OnceLock::new(),
                queue: Mutex::default(),
                for_threads: Condvar::new(),
                for_owner: Condvar::new(),
            }),
            file,
            threads: Vec::new(),
            count: NonZeroU8::MIN,
        }
    }

    /// Writes pages by as many threads at a time.
    #[must_use]
    pub const fn with_threads(mut self, threads: NonZeroU8) -> Self {
        self.count = threads;
        self
    }

    /// Writes pages to `file`, which is the same one opened otherwise (see
    /// [`open_direct`](crate::io::open_direct)).
    #[must_use]
    pub fn with_pages_to(mut self, file: Arc<dyn PositionedFile>) -> Self {
        // Nothing has been started: this is the only one.
        if let Some(pages) = Arc::get_mut(&mut self.pages) {
            pages.file = file;
        }
        self
    }

    fn start_threads(&mut self) -> Result<(), MappedRamError> {
        // One thread alone is the caller's.
        for _ in 1..self.count.get() {
            let pages = Arc::clone(&self.pages);
            let thread = thread::Builder::new().name("mapped-write".to_owned());
            self.threads.push(
                thread
                    .spawn(move || pages.work())
                    .map_err(MappedRamError::Spawn)?,
            );
        }
        Ok(())
    }

    /// Gives each block its place, and returns the list.
    fn place(&mut self, main: &mut StreamWriter) -> Result<(), MappedRamError> {
        let ram = Arc::clone(&self.pages.ram);
        let table = ram.blocks();
        let mut blocks = Vec::with_capacity(table.len());
        let mut bytes = Vec::new();
        put_total(table, &mut bytes);
        for (id, block) in table.iter() {
            put_counted(&mut bytes, block.name());
            bytes.extend(block.used_length().to_be_bytes());
            if table.ignores_shared() {
                bytes.extend(block.address().to_be_bytes());
            }
            if table.is_ignored(id) {
                MappedArea::encode_none(&mut bytes);
                blocks.push(None);
                continue;
            }
            let header_end = main.position() + (bytes.len() + HEADER_LEN) as u64;
            let area = MappedArea::place(header_end, block.used_length()).map_err(|source| {
                MappedRamError::Layout {
                    name: block.name().to_owned(),
                    source,
                }
            })?;
            area.encode(&mut bytes);
            blocks.push(Some(Block {
                area,
                bitmap: (0..area.bitmap_len() / 8)
                    .map(|_| AtomicU64::new(0))
                    .collect(),
            }));
            let failed = |source| MappedRamError::File {
                offset: header_end,
                source,
            };
            main.write_bytes(&bytes).map_err(failed)?;
            main.seek(area.end()).map_err(failed)?;
            bytes.clear();
        }
        main.write_bytes(&bytes)
            .map_err(|source| MappedRamError::File {
                offset: main.position(),
                source,
            })?;
        if let Some(pages) = Arc::get_mut(&mut self.pages) {
            pages.blocks = blocks;
        }
        Ok(())
    }
}

impl SendPages for FileWriter {
    fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.pages.ram
    }

    fn send(
        &mut self,
        _main: &mut StreamWriter,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError> {
        let run = Run {
            block,
            offset,
            pages,
        };
        if self.threads.is_empty() {
            return self.pages.write(run).map_err(TransportError::main);
        }
        let depth = self.threads.len() * DEPTH;
        let mut queue = self.pages.queue();
        loop {
            queue.check()?;
            if queue.runs.len() < depth {
                queue.runs.push(run);
                self.pages.for_threads.notify_one();
                return Ok(());
            }
            queue = wait(&self.pages.for_owner, queue);
        }
    }

    /// All pages are in the file, as far as other readers of it can tell.
    fn sync(&mut self, _main: &mut StreamWriter) -> Result<(), TransportError> {
        let mut queue = self.pages.queue();
        while !queue.runs.is_empty() || queue.busy > 0 {
            queue.check()?;
            queue = wait(&self.pages.for_owner, queue);
        }
        queue.check()
    }

    fn capability(&self) -> Option<&'static str> {
        Some(MAPPED_RAM)
    }

    fn announce(
        &mut self,
        main: &mut StreamWriter,
        _blocks: &RamBlockTable,
    ) -> Result<(), TransportError> {
        self.place(main)
            .and_then(|()| self.start_threads())
            .map_err(TransportError::main)
    }

    fn complete(&mut self) -> Result<(), TransportError> {
        for block in self.pages.blocks.iter().flatten() {
            let words = block.bitmap.iter().map(|w| w.load(Ordering::Relaxed));
            let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            let offset = block.area.bitmap();
            self.file
                .write_at(offset, &bytes)
                .map_err(|source| MappedRamError::File { offset, source })
                .map_err(TransportError::main)?;
        }
        Ok(())
    }

    /// The kernel has no deadlines for files.
    fn set_deadline(&mut self, _deadline: Option<Instant>) {}

    fn set_limiter(&mut self, limiter: &Arc<RateLimiter>) {
        // Called again it is the limiter that is there already.
        self.pages.limiter.get_or_init(|| Arc::clone(limiter));
    }

    /// A write to the file that has begun ends by itself.
    fn set_cancel(&mut self, token: &CancelToken) {
        self.pages.cancel.get_or_init(|| token.clone());
    }

    fn counters(&self) -> TransportCounters {
        let normal_pages = self.pages.normal.load(Ordering::Relaxed);
        TransportCounters {
            normal_pages,
            zero_pages: self.pages.zero.load(Ordering::Relaxed),
            channel_bytes: normal_pages * PAGE_SIZE,
            ..TransportCounters::default()
        }
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        self.pages.queue().is_ended = true;
        self.pages.for_threads.notify_all();
        for thread in self.threads.drain(..) {
            // It has reported an error, if there was one.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWriter")
            .field("threads", &self.count)
            .finish_non_exhaustive()
    }
}

/// A block's place, and which of its pages are there.
struct Block {
    area: MappedArea,
    bitmap: Vec<AtomicU64>,
}

/// What the threads share.
struct Pages {
    ram: Arc<dyn GuestRam>,
    file: Arc<dyn PositionedFile>,
    looks_for_zero: bool,
    /// `None` for a block that is not in the file.
    blocks: Vec<Option<Block>>,
    normal: AtomicU64,
    zero: AtomicU64,
    limiter: OnceLock<Arc<RateLimiter>>,
    cancel: OnceLock<CancelToken>,
    queue: Mutex<Queue>,
    for_threads: Condvar,
    for_owner: Condvar,
}

/// Pages of a block.
#[derive(Clone, Copy, Debug)]
struct Run {
    block: BlockId,
    offset: u64,
    pages: u64,
}

#[derive(Default)]
struct Queue {
    /// In any order: between two synchronisations no page is there twice.
    runs: Vec<Run>,
    busy: usize,
    is_ended: bool,
    /// The first error, and whether it was told.
    failure: Option<MappedRamError>,
    has_failed: bool,
}

impl Queue {
    fn check(&mut self) -> Result<(), TransportError> {
        match self.failure.take() {
            Some(error) => Err(TransportError::main(error)),
            None if self.has_failed => Err(TransportError::main(MappedRamError::Thread)),
            None => Ok(()),
        }
    }
}

impl Pages {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // A thread that panicked in memory or file that was plugged in has left it whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread does.
    fn work(&self) {
        let mut queue = self.queue();
        while !queue.is_ended && !queue.has_failed {
            let Some(run) = queue.runs.pop() else {
                queue = wait(&self.for_threads, queue);
                continue;
            };
            queue.busy += 1;
            drop(queue);
            // Whatever becomes of this thread, nobody waits for it in vain.
            let mut done = Done {
                pages: self,
                result: Err(MappedRamError::Thread),
            };
            done.result = self.write(run);
            drop(done);
            queue = self.queue();
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.get().is_some_and(CancelToken::is_cancelled)
    }

    /// Writes the pages that are not zero.
    fn write(&self, run: Run) -> Result<(), MappedRamError> {
        let place = self.blocks.get(run.block.index()).and_then(Option::as_ref);
        let block = place.ok_or(MappedRamError::NoArea(run.block))?;
        let len = run
            .pages
            .checked_mul(PAGE_SIZE)
            .and_then(|len| usize::try_from(len).ok())
            .unwrap_or(usize::MAX);
        let memory = self.ram.slice(run.block, run.offset, len)?;
        let piece = |from: usize, to: usize| {
            memory
                .subslice(from, to - from)
                .map_err(|source| MemoryError::Backend {
                    what: "taking pages out of a run",
                    source: Box::new(source),
                })
        };
        let mut work = self.limiter.get().map(|limiter| limiter.work());
        // Where the pages begin that are to be written with the next one.
        let mut from = 0;
        for at in (0..=len).step_by(PAGE_LEN) {
            let is_zero = at < len && self.looks_for_zero && zero_check(&piece(at, at + PAGE_LEN)?);
            if at < len {
                block.mark((run.offset + at as u64) / PAGE_SIZE, !is_zero);
            }
            if from < at && (is_zero || at == len) {
                let offset = block.area.pages() + run.offset + from as u64;
                let bytes = (at - from) as u64;
                if work
                    .as_mut()
                    .is_some_and(|w| !w.pay(bytes, || !self.is_cancelled()))
                {
                    return Err(MappedRamError::Cancelled);
                }
                self.file
                    .write_guest(offset, &piece(from, at)?)
                    .map_err(|source| MappedRamError::File { offset, source })?;
                self.normal
                    .fetch_add(((at - from) / PAGE_LEN) as u64, Ordering::Relaxed);
            }
            if is_zero {
                self.zero.fetch_add(1, Ordering::Relaxed);
                from = at + PAGE_LEN;
            }
        }
        Ok(())
    }
}

impl Block {
    fn mark(&self, page: u64, is_there: bool) {
        let word = usize::try_from(page / 64)
            .ok()
            .and_then(|i| self.bitmap.get(i));
        let (Some(word), bit) = (word, 1 << (page % 64)) else {
            return;
        };
        if is_there {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// Tells the owner what has come of a run.
struct Done<'a> {
    pages: &'a Pages,
    result: Result<(), MappedRamError>,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        let mut queue = self.pages.queue();
        queue.busy -= 1;
        if let Err(error) = std::mem::replace(&mut self.result, Ok(()))
            && !queue.has_failed
        {
            queue.has_failed = true;
            queue.failure = Some(error);
            self.pages.for_threads.notify_all();
        }
        self.pages.for_owner.notify_all();
    }
}

fn wait<'a>(condition: &Condvar, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
    condition
        .wait(queue)
        .unwrap_or_else(PoisonError::into_inner)
}

const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);
