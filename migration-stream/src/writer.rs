//! The writing side of a main stream: a sink, the offset reached in it, and pages that wait for
//! company.

use std::sync::Arc;
use std::time::Instant;
use std::{fmt, io};

use crate::io::{ByteSink, CancelToken, Chunk, FileChannel, PositionedFile, SendMode};
use crate::raw::ram::PageAddress;
use crate::raw::rate::RateLimiter;
use crate::{GuestRam, PAGE_SIZE};

/// [`PAGE_SIZE`] as a length in memory.
const PAGE_LEN: usize = 4096;
/// Pages that leave in one gather write: with a header each, 512 pieces and 1 MiB.
const MAX_HELD_PAGES: usize = 256;
/// Headers that leave in one gather write, bytes: some 28,000 zero pages, or 63 pages that were copied.
const MAX_HELD_HEADERS: usize = 256 << 10;

/// The writer of a main stream.
///
/// Guest pages are held back until there are enough of them for one gather write, so that
/// scattered pages do not cost a system call each. They keep their place: whatever is written
/// next goes behind them, in the same gather write.
pub struct StreamWriter {
    sink: Box<dyn ByteSink>,
    offset: u64,
    /// Where in the file byte 0 of the stream would be, if nothing had been left out since.
    base: u64,
    held: Held,
    limiter: Option<Arc<RateLimiter>>,
    cancel: Option<CancelToken>,
}

/// Records of guest pages: all headers one after the other, and which pages go in between.
#[derive(Default)]
struct Held {
    ram: Option<Arc<dyn GuestRam>>,
    headers: Vec<u8>,
    pages: Vec<HeldPage>,
}

struct HeldPage {
    /// How much of the headers goes before the page.
    headers_before: usize,
    page: PageAddress,
}

impl StreamWriter {
    /// A stream that begins here.
    #[must_use]
    pub fn new(sink: impl ByteSink + 'static) -> Self {
        Self {
            sink: Box::new(sink),
            offset: 0,
            base: 0,
            held: Held::default(),
            limiter: None,
            cancel: None,
        }
    }

    /// A stream that begins at byte `offset` of a file.
    #[must_use]
    pub fn to_file(file: Arc<dyn PositionedFile>, offset: u64) -> Self {
        Self {
            base: offset,
            ..Self::new(FileChannel::new(file, offset))
        }
    }

    /// Goes on at byte `position` of the file that the stream is written to, which is not before
    /// [`StreamWriter::position`].
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where it is no file; the sink's.
    pub fn seek(&mut self, position: u64) -> io::Result<()> {
        self.flush()?;
        self.sink.seek(position)?;
        self.base = position
            .checked_sub(self.offset)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(())
    }

    /// Returns whether the stream is written to a file, which no peer reads meanwhile.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.sink.is_file()
    }

    /// See [`ByteSink::taken`].
    pub(crate) fn taken(&self) -> Option<u64> {
        self.sink.taken()
    }

    /// Where in the file the next byte goes; the bytes of the stream where it is none.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.base.saturating_add(self.offset)
    }

    /// Writes all chunks in order, behind what is held back.
    ///
    /// # Errors
    /// The sink's.
    pub fn write(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        self.offset += chunks.iter().map(|c| c.len() as u64).sum::<u64>();
        let bytes = self.held.len() + chunks.iter().map(Chunk::len).sum::<usize>();
        self.pay(bytes as u64)?;
        self.held.write_with(chunks, &mut self.sink)
    }

    /// Writes our own bytes, behind what is held back.
    ///
    /// # Errors
    /// The sink's.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write(&[Chunk::Bytes(bytes)])
    }

    /// Writes what is held back.
    ///
    /// # Errors
    /// The sink's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.write(&[])
    }

    /// Appends the header of a record, and the page of `ram` that goes after it if there is one.
    /// It may be held back; every write that follows takes it along.
    ///
    /// # Errors
    /// The sink's.
    pub fn hold(
        &mut self,
        header: &[u8],
        page: Option<(&Arc<dyn GuestRam>, PageAddress)>,
    ) -> io::Result<()> {
        self.offset += header.len() as u64;
        self.held.headers.extend_from_slice(header);
        if let Some((ram, page)) = page {
            self.offset += PAGE_SIZE;
            if !self.held.ram.as_ref().is_some_and(|r| Arc::ptr_eq(r, ram)) {
                if !self.held.pages.is_empty() {
                    let header = self
                        .held
                        .headers
                        .split_off(self.held.headers.len() - header.len());
                    self.flush()?;
                    self.held.headers = header;
                }
                self.held.ram = Some(Arc::clone(ram));
            }
            self.held.pages.push(HeldPage {
                headers_before: self.held.headers.len(),
                page,
            });
        }
        let is_full =
            self.held.pages.len() >= MAX_HELD_PAGES || self.held.headers.len() >= MAX_HELD_HEADERS;
        if is_full || self.held.len() as u64 >= self.most_at_once() {
            self.flush()?;
        }
        Ok(())
    }

    /// Bytes since the stream began, those held back included.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Chooses how pages are sent. With a mode that does not copy, what is sent of a page is what it holds later, at
    /// the latest before [`StreamWriter::wait_until_released`] returns.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: the sink cannot, and sends copies as before.
    pub fn set_send_mode(&mut self, mode: SendMode) -> io::Result<()> {
        self.sink.set_send_mode(mode)
    }

    /// Writes what is held back, and waits until nobody reads guest memory for the stream any more.
    ///
    /// # Errors
    /// The sink's; [`io::ErrorKind::TimedOut`] when the deadline passes.
    pub fn wait_until_released(&mut self) -> io::Result<()> {
        self.flush()?;
        self.sink.wait_until_released().map(drop)
    }

    /// Has every byte paid for before it is written.
    pub fn set_limiter(&mut self, limiter: &Arc<RateLimiter>) {
        self.limiter = Some(Arc::clone(limiter));
    }

    /// Lets `token` end every write that waits.
    pub fn set_cancel(&mut self, token: &CancelToken) {
        self.sink.set_cancel(token);
        self.cancel = Some(token.clone());
    }

    /// The token that was set last.
    #[must_use]
    pub const fn cancel_token(&self) -> Option<&CancelToken> {
        self.cancel.as_ref()
    }

    fn pay(&self, bytes: u64) -> io::Result<()> {
        let Some(limiter) = self.limiter.as_ref().filter(|_| bytes > 0) else {
            return Ok(());
        };
        let is_cancelled = || self.cancel.as_ref().is_some_and(CancelToken::is_cancelled);
        if limiter.pay(bytes, || !is_cancelled()) {
            return Ok(());
        }
        self.cancel.as_ref().map_or(Ok(()), CancelToken::check)
    }

    /// Under a limit pages are written often enough that no single write takes up much of a second.
    fn most_at_once(&self) -> u64 {
        match self.limiter.as_ref().map_or(0, |limiter| limiter.rate()) {
            0 => u64::MAX,
            rate => rate / 50,
        }
    }

    /// See [`ByteSink::set_write_deadline`].
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.sink.set_write_deadline(deadline);
    }
}

impl Held {
    /// Bytes held back.
    fn len(&self) -> usize {
        self.headers.len() + self.pages.len() * PAGE_LEN
    }

    /// Writes everything held, and `chunks` behind it.
    fn write_with(&mut self, chunks: &[Chunk<'_>], sink: &mut dyn ByteSink) -> io::Result<()> {
        if self.headers.is_empty() {
            return if chunks.is_empty() {
                Ok(())
            } else {
                sink.write_all(chunks)
            };
        }
        let mut all = Vec::with_capacity(self.pages.len() * 2 + 1 + chunks.len());
        let mut start = 0;
        if let Some(ram) = &self.ram {
            for HeldPage {
                headers_before,
                page,
            } in &self.pages
            {
                all.push(Chunk::Bytes(
                    self.headers.get(start..*headers_before).unwrap_or_default(),
                ));
                #[allow(clippy::cast_possible_truncation)] // a page's size
                let data = ram
                    .slice(page.block, page.offset, PAGE_SIZE as usize)
                    .map_err(io::Error::other)?;
                all.push(Chunk::Guest(data));
                start = *headers_before;
            }
        }
        all.push(Chunk::Bytes(self.headers.get(start..).unwrap_or_default()));
        all.extend_from_slice(chunks);
        sink.write_all(&all)?;
        self.headers.clear();
        self.pages.clear();
        Ok(())
    }
}

impl fmt::Debug for StreamWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamWriter")
            .field("offset", &self.offset)
            .field("held_pages", &self.held.pages.len())
            .finish_non_exhaustive()
    }
}
