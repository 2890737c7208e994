//! From a file into memory, in reads as long as the runs of pages.

use std::io;
use std::num::NonZeroU8;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::error::MappedRamError;
use crate::io::{CancelToken, PositionedFile};
use crate::ram::BlockId;
use crate::raw::mapped_ram::{MappedArea, MappedPages};
use crate::raw::prepare_range;
use crate::raw::ram::RamError;
use crate::raw::transport::{HeldChannels, PageBarrier};
use crate::{PAGE_SIZE, PageStore, TransportError};

/// Pages of one read at most: 4 MiB.
const RUN_PAGES: u64 = 1024;
/// How much of a bitmap is held at a time, bytes: that of 2 GiB.
const BITMAP_PIECE: usize = 64 << 10;

/// Loads the pages of a file, a [`PageBarrier`]. Its errors' source is [`MappedRamError`].
pub struct FileReader {
    file: Arc<dyn PositionedFile>,
    /// The same file, for pages.
    pages: Arc<dyn PositionedFile>,
    threads: NonZeroU8,
    /// Of several threads, since the first block.
    pool: Option<ThreadPool>,
    cancel: Option<CancelToken>,
}

impl FileReader {
    /// For the file that the stream is read from.
    #[must_use]
    pub fn new(file: Arc<dyn PositionedFile>) -> Self {
        Self {
            pages: Arc::clone(&file),
            file,
            threads: NonZeroU8::MIN,
            pool: None,
            cancel: None,
        }
    }

    /// Reads pages on a pool of so many threads, which ends with this.
    #[must_use]
    pub fn with_threads(mut self, threads: NonZeroU8) -> Self {
        self.threads = threads;
        self.pool = None;
        self
    }

    /// Starts the threads, if there are to be several.
    fn start_pool(&mut self) -> Result<(), MappedRamError> {
        if self.threads > NonZeroU8::MIN && self.pool.is_none() {
            let pool = ThreadPoolBuilder::new()
                .num_threads(self.threads.get().into())
                .thread_name(|index| format!("mapped-read-{index}"))
                .build()
                .map_err(|error| MappedRamError::Spawn(io::Error::other(error)))?;
            self.pool = Some(pool);
        }
        Ok(())
    }

    /// Reads pages from `file`, which is the same one opened otherwise (see
    /// [`open_direct`](crate::io::open_direct)).
    #[must_use]
    pub fn with_pages_from(mut self, file: Arc<dyn PositionedFile>) -> Self {
        self.pages = file;
        self
    }

    fn load(
        &self,
        block: BlockId,
        area: &MappedArea,
        store: &dyn PageStore,
    ) -> Result<MappedPages, MappedRamError> {
        let size = self.file.size().map_err(|source| MappedRamError::File {
            offset: area.bitmap(),
            source,
        })?;
        if area.end() > size {
            return Err(MappedRamError::Truncated {
                end: area.end(),
                size,
            });
        }
        let work = Mutex::new(Walk::new(area));
        let move_all = || -> Result<(), MappedRamError> {
            loop {
                if self.cancel.as_ref().is_some_and(CancelToken::is_cancelled) {
                    return Err(MappedRamError::Cancelled);
                }
                let next = lock(&work).next(self);
                match next? {
                    Some(Run {
                        offset,
                        pages,
                        is_there: true,
                    }) => {
                        self.read_run(block, area, offset, pages, store)?;
                    }
                    Some(Run { offset, pages, .. }) => store.zero(block, offset, bytes(pages))?,
                    None => return Ok(()),
                }
            }
        };
        match &self.pool {
            None => move_all()?,
            // Each thread of the pool takes runs until there are no more.
            Some(pool) => pool
                .broadcast(|_| move_all().inspect_err(|_| lock(&work).end()))
                .into_iter()
                .collect::<Result<(), _>>()?,
        }
        Ok(lock(&work).found)
    }

    fn read_run(
        &self,
        block: BlockId,
        area: &MappedArea,
        offset: u64,
        pages: u64,
        store: &dyn PageStore,
    ) -> Result<(), MappedRamError> {
        let len = bytes(pages);
        prepare_range(store, block, offset, len, |from, memory| {
            let at = area.pages() + from;
            let read = self.pages.read_guest(at, &memory);
            read.map_err(|source| MappedRamError::File { offset: at, source })
        })?;
        Ok(store.landed(block, offset, len)?)
    }

    fn read_exact(&self, mut at: u64, mut buf: &mut [u8]) -> Result<(), MappedRamError> {
        let failed = |offset, source| MappedRamError::File { offset, source };
        while !buf.is_empty() {
            match self.file.read_at(at, buf).map_err(|e| failed(at, e))? {
                0 => return Err(failed(at, io::ErrorKind::UnexpectedEof.into())),
                n => {
                    at += n as u64;
                    buf = buf.get_mut(n..).unwrap_or_default();
                }
            }
        }
        Ok(())
    }
}

impl PageBarrier for FileReader {
    /// There are no channels: it is an error, which the decoder finds first.
    fn flush(&mut self) -> Result<(), TransportError> {
        Err(TransportError::main(RamError::UnexpectedFlush))
    }

    fn has_channels(&self) -> bool {
        false
    }

    fn hold(&mut self) -> Result<HeldChannels, TransportError> {
        Ok(HeldChannels::none())
    }

    fn load_mapped(
        &mut self,
        block: BlockId,
        area: &MappedArea,
        store: &dyn PageStore,
    ) -> Result<MappedPages, TransportError> {
        self.start_pool()
            .and_then(|()| self.load(block, area, store))
            .map_err(TransportError::main)
    }

    fn set_deadline(&mut self, _deadline: Option<Instant>) {}

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }
}

impl std::fmt::Debug for FileReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileReader").finish_non_exhaustive()
    }
}

/// Pages that follow each other and are all in the file or all zero.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// In the block, bytes.
    offset: u64,
    pages: u64,
    is_there: bool,
}

/// The runs of a block, out of its bitmap, of which a piece is held.
struct Walk {
    area: MappedArea,
    total: u64,
    /// The next page.
    page: u64,
    bits: Vec<u8>,
    /// The page of the first bit that is held, and of the first behind.
    held: (u64, u64),
    found: MappedPages,
}

impl Walk {
    fn new(area: &MappedArea) -> Self {
        Self {
            area: *area,
            total: area.used_length() / PAGE_SIZE,
            page: 0,
            bits: Vec::new(),
            held: (0, 0),
            found: MappedPages::default(),
        }
    }

    /// No thread is given more.
    fn end(&mut self) {
        self.page = self.total;
    }

    fn next(&mut self, reader: &FileReader) -> Result<Option<Run>, MappedRamError> {
        if self.page >= self.total {
            return Ok(None);
        }
        if self.page >= self.held.1 {
            self.fill(reader)?;
        }
        let (first, end) = self.held;
        let at = self.page - first;
        let pages = run_at(&self.bits, at, end - first);
        let run = Run {
            offset: self.page * PAGE_SIZE,
            pages,
            is_there: is_set(&self.bits, at),
        };
        self.page += pages;
        if run.is_there {
            self.found.normal += pages;
        } else {
            self.found.zero += pages;
        }
        Ok(Some(run))
    }

    /// Reads the next piece of the bitmap.
    fn fill(&mut self, reader: &FileReader) -> Result<(), MappedRamError> {
        let first = self.held.1;
        let rest = self.area.bitmap_len() - first / 8;
        let len = BITMAP_PIECE.min(usize::try_from(rest).unwrap_or(BITMAP_PIECE));
        self.bits.resize(len, 0);
        reader.read_exact(self.area.bitmap() + first / 8, &mut self.bits)?;
        let pages = (self.total - first).min(len as u64 * 8);
        if let Some(page) = (pages..len as u64 * 8).find(|p| is_set(&self.bits, *p)) {
            return Err(MappedRamError::BeyondBlock {
                page: first + page,
                pages: self.total,
            });
        }
        self.held = (first, first + pages);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What is behind it is whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Length of at most [`RUN_PAGES`] pages.
fn bytes(pages: u64) -> usize {
    usize::try_from(pages.min(RUN_PAGES) * PAGE_SIZE).unwrap_or(usize::MAX)
}

fn is_set(bits: &[u8], page: u64) -> bool {
    let byte = usize::try_from(page / 8).ok().and_then(|i| bits.get(i));
    byte.is_some_and(|b| b >> (page % 8) & 1 == 1)
}

/// How many pages from `page` on, before `end`, are there like it or missing like it.
fn run_at(bits: &[u8], page: u64, end: u64) -> u64 {
    let set = is_set(bits, page);
    let uniform = if set { 0xff } else { 0 };
    let end = end.min(page + RUN_PAGES);
    let mut next = page + 1;
    while next < end {
        let byte = usize::try_from(next / 8).ok().and_then(|i| bits.get(i));
        if next.is_multiple_of(8) && byte == Some(&uniform) {
            next += 8;
        } else if is_set(bits, next) == set {
            next += 1;
        } else {
            break;
        }
    }
    next.min(end) - page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_every_page_once_and_are_bounded() {
        let mut bits = vec![0xff_u8; 300];
        bits[2] = 0b0001_0111;
        bits[7] = 0;
        let mut runs = Vec::new();
        let mut page = 0;
        while page < 2395 {
            let run = run_at(&bits, page, 2395);
            assert!((1..=RUN_PAGES).contains(&run));
            for p in page..page + run {
                assert_eq!(is_set(&bits, p), is_set(&bits, page), "page {p}");
            }
            runs.push(run);
            page += run;
        }
        assert_eq!(page, 2395);
        assert_eq!(runs, [19, 1, 1, 3, 32, 8, 1024, 1024, 283]);
    }
}
