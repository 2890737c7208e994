//! From a file into memory, in reads as long as the runs of pages.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::layout::MappedArea;
use crate::io::PositionedFile;
use crate::ram::{BlockId, RamError};
use crate::{MemoryError, PAGE_SIZE, PageBarrier, PageStore, TransportError};

/// Pages of one read at most: 4 MiB.
const RUN_PAGES: u64 = 1024;
/// How much of a bitmap is held at a time, bytes: that of 2 GiB.
const BITMAP_PIECE: usize = 64 << 10;

/// How many pages a block had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedPages {
    /// In the file.
    pub normal: u64,
    /// Zero, which the file has not.
    pub zero: u64,
}

/// Loads the pages of a file, a [`PageBarrier`]. Its errors' source is [`MappedRamError`].
pub struct FileReader {
    file: Arc<dyn PositionedFile>,
}

impl FileReader {
    /// For the file that the stream is read from.
    #[must_use]
    pub fn new(file: Arc<dyn PositionedFile>) -> Self {
        Self { file }
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
        let mut loaded = MappedPages::default();
        let mut piece =
            vec![0; BITMAP_PIECE.min(usize::try_from(area.bitmap_len()).unwrap_or(BITMAP_PIECE))];
        let total = area.used_length() / PAGE_SIZE;
        let mut first = 0;
        while first < total {
            let at = area.bitmap() + first / 8;
            let rest = area.bitmap_len() - first / 8;
            let len = piece.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            let bits = piece.get_mut(..len).unwrap_or_default();
            self.read_exact(at, bits)?;
            let pages = (total - first).min(len as u64 * 8);
            if let Some(page) = (pages..len as u64 * 8).find(|p| is_set(bits, *p)) {
                return Err(MappedRamError::BeyondBlock {
                    page: first + page,
                    pages: total,
                });
            }
            let mut page = 0;
            while page < pages {
                let run = run_at(bits, page, pages);
                let offset = (first + page) * PAGE_SIZE;
                if is_set(bits, page) {
                    self.read_run(block, area, offset, run, store)?;
                    loaded.normal += run;
                } else {
                    store.zero(block, offset, bytes(run))?;
                    loaded.zero += run;
                }
                page += run;
            }
            first += pages;
        }
        Ok(loaded)
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
        let memory = store.prepare(block, offset, len)?;
        let at = area.pages() + offset;
        self.file
            .read_guest(at, &memory)
            .map_err(|source| MappedRamError::File { offset: at, source })?;
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

    fn load_mapped(
        &mut self,
        block: BlockId,
        area: &MappedArea,
        store: &dyn PageStore,
    ) -> Result<MappedPages, TransportError> {
        self.load(block, area, store).map_err(TransportError::main)
    }

    fn set_deadline(&mut self, _deadline: Option<Instant>) {}
}

impl std::fmt::Debug for FileReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileReader").finish_non_exhaustive()
    }
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

/// Why pages could not be read from a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappedRamError {
    /// The file could not be read.
    #[error("byte {offset:#x} of the file")]
    File {
        /// Where in the file.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file ends before the block's pages do.
    #[error("the file has {size:#x} bytes, but the block's pages end at {end:#x}")]
    Truncated {
        /// Where the pages end in the file.
        end: u64,
        /// Length of the file, bytes.
        size: u64,
    },
    /// The bitmap has a page that the block has not.
    #[error("page {page} in the bitmap of a block of {pages} pages")]
    BeyondBlock {
        /// Index of the page.
        page: u64,
        /// Length of the block, pages.
        pages: u64,
    },
    /// The store refused a range.
    #[error(transparent)]
    Memory(#[from] MemoryError),
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
