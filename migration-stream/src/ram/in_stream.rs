//! Pages as records of the main stream: the transport of a migration without multifd.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::BlockId;
use crate::raw::ram::{PageAddress, RamError, RecordEncoder, zero_check};
use crate::raw::transport::{HeldChannels, PageBarrier, SendPages};
use crate::raw::unchanged::{ChangedPages, Sent, Unchanged};
use crate::raw::xbzrle::{Encoded, Lookup, PAGE, PageBytes, PageCache, encode};
use crate::{
    CacheSizeError, GuestRam, PAGE_SIZE, StreamWriter, TransportCounters, TransportError,
    WhenToCompare,
};

/// Whether pages are looked at before they are sent (QEMU's parameter `zero-page-detection`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroPageDetection {
    /// Every page goes with its bytes.
    None,
    /// A page that is all zero goes as a record of 9 bytes on the main stream, with multifd too.
    Legacy,
    /// It goes on the channel that would carry its bytes: the main stream, or with multifd one of
    /// the channels.
    #[default]
    Multifd,
}

/// Sends pages as records of the main stream, straight out of guest memory. The stream's writer
/// [holds them](StreamWriter::hold) until there are enough for a gather write.
///
/// It lives as long as the connection, precopy and all COLO checkpoints: a record names its block
/// only where the one before it, in whichever section, was of another. The errors' sources are
/// [`std::io::Error`], [`MemoryError`](crate::MemoryError) and [`RamError`].
pub struct InStream {
    ram: Arc<dyn GuestRam>,
    detection: ZeroPageDetection,
    records: RecordEncoder,
    header: Vec<u8>,
    counters: TransportCounters,
    xbzrle: Option<Box<Xbzrle>>,
    comparing: Option<Box<Comparing>>,
}

/// Pages that are copied at a time, to be compared and sent.
const COPIED_PAGES: u64 = 64;

/// What leaving out unchanged pages needs.
struct Comparing {
    unchanged: Unchanged,
    changed: ChangedPages,
}

/// What sending differences needs.
struct Xbzrle {
    cache: PageCache,
    /// The first round is over: pages that come now were sent before.
    started: bool,
    /// The page as it is sent; the guest goes on writing its own.
    now: PageBytes,
    encoded: Vec<u8>,
}

impl InStream {
    /// A transport for a connection on which no page was sent yet.
    #[must_use]
    pub fn new(ram: Arc<dyn GuestRam>, detection: ZeroPageDetection) -> Self {
        Self {
            ram,
            detection,
            records: RecordEncoder::new(),
            header: Vec::with_capacity(RecordEncoder::MAX_LEN),
            counters: TransportCounters::default(),
            xbzrle: None,
            comparing: None,
        }
    }

    /// The size of the cache of pages that QEMU has by default, bytes.
    pub const DEFAULT_CACHE: u64 = PageCache::DEFAULT_SIZE;

    /// Sends pages from the second round on as differences to their last content (the capability `xbzrle`,
    /// which the target needs too). A cache of `cache_size` bytes keeps that content: pages that have no
    /// place in it are sent whole. No checkpoint can follow such a migration.
    ///
    /// # Errors
    /// The size is no power of two, or less than a page.
    pub fn with_xbzrle(mut self, cache_size: u64) -> Result<Self, CacheSizeError> {
        let cache = PageCache::new(cache_size)?;
        self.counters.xbzrle.cache_size = cache.size();
        self.xbzrle = Some(Box::new(Xbzrle {
            cache,
            started: false,
            now: [0; PAGE],
            encoded: Vec::with_capacity(2 * PAGE),
        }));
        Ok(self)
    }

    /// Sends copies of those pages that the receiver has not.
    fn send_changed(
        &mut self,
        main: &mut StreamWriter,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError> {
        let Some(comparing) = &mut self.comparing else {
            return Ok(());
        };
        let Comparing { unchanged, changed } = &mut **comparing;
        let blocks = self.ram.blocks();
        let finds_zero = self.detection != ZeroPageDetection::None;
        let mut next = 0;
        while next < pages {
            let part = next..pages.min(next + COPIED_PAGES);
            next = part.end;
            let offsets = part.map(|page| offset + page * PAGE_SIZE);
            let mut sent = changed
                .copy(&*self.ram, unchanged, block, offsets, finds_zero)
                .map_err(TransportError::main)?;
            let began = Instant::now();
            for offset in changed.zero().iter().copied() {
                self.header.clear();
                self.records
                    .zero(PageAddress { block, offset }, blocks, &mut self.header)
                    .map_err(TransportError::main)?;
                main.hold(&self.header, None)
                    .map_err(TransportError::main)?;
            }
            let copies = changed.content().chunks_exact(PAGE);
            for (offset, copy) in changed.normal().iter().copied().zip(copies) {
                self.header.clear();
                self.records
                    .page(PageAddress { block, offset }, blocks, &mut self.header)
                    .map_err(TransportError::main)?;
                self.header.extend_from_slice(copy);
                main.hold(&self.header, None)
                    .map_err(TransportError::main)?;
            }
            self.counters.zero_pages += changed.zero().len() as u64;
            self.counters.normal_pages += sent.sent;
            sent.send_time = began.elapsed();
            unchanged.note(sent);
        }
        Ok(())
    }

    /// Sends a copy of `data`, or its difference to the copy that was sent before.
    fn send_difference(
        &mut self,
        main: &mut StreamWriter,
        page: PageAddress,
        data: &VolatileSlice<'_>,
    ) -> Result<(), TransportError> {
        let Some(xbzrle) = &mut self.xbzrle else {
            return Ok(());
        };
        let counters = &mut self.counters;
        data.copy_to(&mut xbzrle.now[..]);
        xbzrle.encoded.clear();
        let encoded = match xbzrle.cache.lookup(page, &xbzrle.now) {
            Lookup::Hit(before) => {
                let encoded = encode(before, &xbzrle.now, &mut xbzrle.encoded);
                *before = xbzrle.now;
                Some(encoded)
            }
            Lookup::Miss { inserted: _ } => None,
        };
        let blocks = self.ram.blocks();
        self.header.clear();
        let is_zero = self.detection != ZeroPageDetection::None && xbzrle.now == [0; PAGE];
        match encoded {
            Some(Encoded::Unchanged) => {
                counters.xbzrle.unchanged += 1;
                return Ok(());
            }
            _ if is_zero => {
                self.records
                    .zero(page, blocks, &mut self.header)
                    .map_err(TransportError::main)?;
                counters.zero_pages += 1;
            }
            Some(Encoded::Bytes(len)) => {
                #[allow(clippy::cast_possible_truncation)] // shorter than a page
                self.records
                    .xbzrle(page, len as u16, blocks, &mut self.header)
                    .map_err(TransportError::main)?;
                self.header.extend_from_slice(&xbzrle.encoded);
                counters.xbzrle.pages += 1;
                counters.xbzrle.bytes += self.header.len() as u64;
            }
            overflow_or_miss => {
                self.records
                    .page(page, blocks, &mut self.header)
                    .map_err(TransportError::main)?;
                self.header.extend_from_slice(&xbzrle.now);
                counters.normal_pages += 1;
                match overflow_or_miss {
                    Some(_) => counters.xbzrle.overflow += 1,
                    None => counters.xbzrle.cache_miss += 1,
                }
            }
        }
        main.hold(&self.header, None).map_err(TransportError::main)
    }
}

impl SendPages for InStream {
    fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.ram
    }

    fn send(
        &mut self,
        main: &mut StreamWriter,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError> {
        let len = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|len| usize::try_from(len).ok())
            .unwrap_or(usize::MAX);
        let ram = Arc::clone(&self.ram);
        let run = ram
            .slice(block, offset, len)
            .map_err(TransportError::main)?;
        let unchanged = self.comparing.as_ref().map(|c| &c.unchanged);
        if unchanged.is_some_and(Unchanged::compares) {
            return self.send_changed(main, block, offset, pages);
        }
        let (began, sent_before) = (Instant::now(), self.counters.normal_pages);
        for i in 0..pages {
            #[allow(clippy::cast_possible_truncation)] // inside a slice
            let data = run
                .subslice((i * PAGE_SIZE) as usize, PAGE_SIZE as usize)
                .map_err(TransportError::main)?;
            let page = PageAddress {
                block,
                offset: offset + i * PAGE_SIZE,
            };
            if self.xbzrle.as_ref().is_some_and(|x| x.started) {
                self.send_difference(main, page, &data)?;
                continue;
            }
            if let Some(comparing) = &self.comparing {
                comparing.unchanged.sent_unseen(page);
            }
            self.header.clear();
            if self.detection != ZeroPageDetection::None && zero_check(&data) {
                self.records
                    .zero(page, ram.blocks(), &mut self.header)
                    .map_err(TransportError::main)?;
                main.hold(&self.header, None)
                    .map_err(TransportError::main)?;
                self.counters.zero_pages += 1;
            } else {
                self.records
                    .page(page, ram.blocks(), &mut self.header)
                    .map_err(TransportError::main)?;
                main.hold(&self.header, Some((&ram, page)))
                    .map_err(TransportError::main)?;
                self.counters.normal_pages += 1;
            }
        }
        if let Some(comparing) = &self.comparing {
            comparing.unchanged.note(Sent {
                sent: self.counters.normal_pages - sent_before,
                send_time: began.elapsed(),
                ..Sent::default()
            });
        }
        Ok(())
    }

    /// The records are in order with everything else in the stream. Pages that were not copied are waited for.
    fn sync(&mut self, main: &mut StreamWriter) -> Result<(), TransportError> {
        main.wait_until_released().map_err(TransportError::main)
    }

    fn begin_round(&mut self) {
        if let Some(xbzrle) = &mut self.xbzrle {
            xbzrle.started = true;
            xbzrle.cache.begin_round();
        }
        if let Some(comparing) = &self.comparing {
            comparing.unchanged.begin_round();
        }
    }

    /// None are left out where differences are sent.
    fn leave_out_unchanged(&mut self, when: WhenToCompare) -> Result<bool, TransportError> {
        if self.sends_differences() {
            return Ok(false);
        }
        let unchanged = Unchanged::new(self.ram.blocks(), when).map_err(TransportError::main)?;
        self.comparing = Some(Box::new(Comparing {
            unchanged,
            changed: ChangedPages::new(),
        }));
        Ok(true)
    }

    fn sends_differences(&self) -> bool {
        self.xbzrle.is_some()
    }

    /// There are no channels beside the main stream, which has its own deadline.
    fn set_deadline(&mut self, _deadline: Option<Instant>) {}

    fn counters(&self) -> TransportCounters {
        let mut counters = self.counters;
        if let Some(comparing) = &self.comparing {
            (counters.compared_pages, counters.unchanged_pages) = comparing.unchanged.counts();
        }
        counters
    }
}

impl fmt::Debug for InStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InStream")
            .field("detection", &self.detection)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// The receiving side of a stream without multifd: there is nothing to wait for, and a record that
/// asks to is [`RamError::UnexpectedFlush`].
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMultifd;

impl PageBarrier for NoMultifd {
    fn flush(&mut self) -> Result<(), TransportError> {
        Err(TransportError::main(RamError::UnexpectedFlush))
    }

    fn has_channels(&self) -> bool {
        false
    }

    fn hold(&mut self) -> Result<HeldChannels, TransportError> {
        Ok(HeldChannels::none())
    }

    fn set_deadline(&mut self, _deadline: Option<Instant>) {}
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Mutex, PoisonError};

    use super::*;
    use crate::io::{ByteSink, Chunk};
    use crate::ram::{RamBlock, RamBlockTable};
    use crate::raw::codec::Reader;
    use crate::raw::ram::{Record, RecordDecoder, encode_end_of_section};
    use crate::{GuestRamMmap, MemoryError};

    const PAGES: u64 = 300;
    const PAGE: usize = 4096;

    /// A block of 300 pages: of page `i` all bytes are `i % 3`.
    fn ram() -> Arc<GuestRamMmap> {
        let blocks = RamBlockTable::new(vec![RamBlock::new("pc.ram", PAGES * PAGE_SIZE).unwrap()]);
        let ram = GuestRamMmap::anonymous(blocks.unwrap()).unwrap();
        for i in 0..PAGES {
            let page = ram.slice(BlockId::new(0), i * PAGE_SIZE, PAGE).unwrap();
            page.copy_from(&[i.to_le_bytes()[0] % 3; PAGE]);
        }
        Arc::new(ram)
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, usize)>>);

    impl ByteSink for Sink {
        fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
            let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            sink.1 = sink.1.max(chunks.len());
            for chunk in chunks {
                match chunk {
                    Chunk::Bytes(bytes) => sink.0.extend_from_slice(bytes),
                    Chunk::Guest(guest) => {
                        let mut bytes = vec![0; guest.len()];
                        guest.copy_to(&mut bytes);
                        sink.0.extend(bytes);
                    }
                }
            }
            Ok(())
        }

        fn set_write_deadline(&mut self, _: Option<Instant>) {}
    }

    /// The pages in a body, with their first byte; zero pages as `None`.
    fn decode(r: &mut Reader<'_>, blocks: &RamBlockTable) -> Vec<(u64, Option<u8>)> {
        let mut decoder = RecordDecoder::new();
        let mut pages = Vec::new();
        while !r.rest().is_empty() {
            match decoder.decode(r, blocks).unwrap() {
                Record::Page(page) => {
                    let data = r.take(PAGE).unwrap();
                    assert!(data.iter().all(|b| *b == data[0]));
                    pages.push((page.offset, Some(data[0])));
                }
                Record::Zero(page) => pages.push((page.offset, None)),
                Record::EndOfSection => {}
                other => panic!("{other:?}"),
            }
        }
        pages
    }

    #[test]
    fn every_page_arrives_once_in_order_and_the_block_is_named_once() {
        let ram = ram();
        let sink = Sink::default();
        let mut main = StreamWriter::new(sink.clone());
        let mut transport = InStream::new(ram.clone(), ZeroPageDetection::Multifd);
        let block = BlockId::new(0);
        transport.send(&mut main, block, 0, 299).unwrap();
        transport.sync(&mut main).unwrap();
        let mut eos = Vec::new();
        encode_end_of_section(&mut eos);
        main.write_bytes(&eos).unwrap();
        // The next section goes on with the block of the one before.
        transport
            .send(&mut main, block, 299 * PAGE_SIZE, 1)
            .unwrap();
        main.flush().unwrap();
        let (bytes, most_chunks) = sink.0.lock().unwrap().clone();
        assert_eq!(main.offset(), bytes.len() as u64);
        assert!(most_chunks <= 513);
        let count = |needle: &[u8]| bytes.windows(needle.len()).filter(|w| *w == needle).count();
        assert_eq!(count(b"pc.ram"), 1);
        let pages = decode(&mut Reader::new(&bytes, 0), ram.blocks());
        let expected: Vec<_> = (0..300u64)
            .map(|i| {
                let fill = i.to_le_bytes()[0] % 3;
                (i * PAGE_SIZE, (fill != 0).then_some(fill))
            })
            .collect();
        assert_eq!(pages, expected);
        let counters = transport.counters();
        assert_eq!(counters.zero_pages + counters.normal_pages, 300);
        assert_eq!(
            counters.zero_pages,
            expected.iter().filter(|p| p.1.is_none()).count() as u64
        );
        assert_eq!(counters.channel_bytes, 0);
    }

    #[test]
    fn scattered_pages_leave_in_one_write_with_what_follows_them() {
        let sink = Sink::default();
        let mut main = StreamWriter::new(sink.clone());
        let mut transport = InStream::new(ram(), ZeroPageDetection::Multifd);
        for page in [1, 3, 4, 7, 9] {
            transport
                .send(&mut main, BlockId::new(0), page * PAGE_SIZE, 1)
                .unwrap();
        }
        assert!(sink.0.lock().unwrap().0.is_empty());
        main.write_bytes(b"end").unwrap();
        let (bytes, most_chunks) = sink.0.lock().unwrap().clone();
        assert_eq!(main.offset(), bytes.len() as u64);
        assert!(bytes.ends_with(b"\0\0\0\0\0\0\x90\x22\0end"));
        // Three pages with their headers, the headers of two zero pages, and the end.
        assert_eq!(most_chunks, 3 * 2 + 2);
    }

    #[test]
    fn zero_pages_go_with_their_bytes_when_nobody_looks() {
        let ram = ram();
        let sink = Sink::default();
        let mut main = StreamWriter::new(sink.clone());
        let mut transport = InStream::new(ram.clone(), ZeroPageDetection::None);
        transport.send(&mut main, BlockId::new(0), 0, 2).unwrap();
        main.flush().unwrap();
        let bytes = sink.0.lock().unwrap().0.clone();
        assert_eq!(
            decode(&mut Reader::new(&bytes, 0), ram.blocks()),
            [(0, Some(0)), (PAGE_SIZE, Some(1))]
        );
    }

    #[test]
    fn pages_outside_of_memory_are_an_error_and_nothing_is_sent() {
        let sink = Sink::default();
        let mut main = StreamWriter::new(sink.clone());
        let mut transport = InStream::new(ram(), ZeroPageDetection::Multifd);
        for (block, offset) in [(0, PAGES * PAGE_SIZE), (0, u64::MAX - 4095), (1, 0)] {
            let e = transport
                .send(&mut main, BlockId::new(block), offset, 1)
                .unwrap_err();
            assert!(e.source.downcast_ref::<MemoryError>().is_some());
        }
        main.flush().unwrap();
        assert!(sink.0.lock().unwrap().0.is_empty());
    }

    #[test]
    fn a_flush_record_without_multifd_is_an_error() {
        let e = NoMultifd.flush().unwrap_err();
        assert_eq!(
            e.source.downcast_ref::<RamError>(),
            Some(&RamError::UnexpectedFlush)
        );
    }

    /// Until then the guest must not change them.
    #[cfg(feature = "fd")]
    #[test]
    fn a_synchronisation_waits_until_the_peer_has_read_the_spliced_pages() {
        use std::os::unix::net::UnixStream;
        use std::time::Duration;

        use crate::io::{ByteSource, FdChannel, SendMode};

        let limit = Duration::from_millis(20);
        let (a, b) = UnixStream::pair().unwrap();
        let mut main = StreamWriter::new(FdChannel::new(a, limit).unwrap());
        main.set_send_mode(SendMode::Splice).unwrap();
        let ram = ram();
        let mut pages = InStream::new(Arc::clone(&ram) as _, ZeroPageDetection::None);
        pages
            .send(&mut main, BlockId::new(0), PAGE_SIZE, 2)
            .unwrap();
        let late = pages.sync(&mut main).unwrap_err();
        let source = std::error::Error::source(&late).unwrap();
        let source = source.downcast_ref::<io::Error>().unwrap();
        assert_eq!(source.kind(), io::ErrorKind::TimedOut, "{source}");
        let second = ram.slice(BlockId::new(0), 2 * PAGE_SIZE, PAGE).unwrap();
        second.copy_from(&[9u8; PAGE]);
        let mut landed = [0; 3 * PAGE];
        let mut b = FdChannel::new(b, Duration::from_secs(60)).unwrap();
        let n = b.read_scatter(&[], &mut landed).unwrap();
        pages.sync(&mut main).unwrap();
        assert_eq!(landed[n - PAGE..n], [9; PAGE]);
        assert_eq!(landed[n - 8 - 2 * PAGE..n - 8 - PAGE], [1; PAGE]);
    }
}
