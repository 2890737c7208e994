//! One channel's thread: finds the zero pages of a packet, and those that need not be sent, and writes it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSink, Chunk};
use migration_stream::ram::BlockId;
use migration_stream::raw::ram::{PageAddress, fetch_for_zero_check, zero_check};
use migration_stream::raw::rate::{RateLimiter, Work as Busy};
use migration_stream::raw::unchanged::{ChangedPages, Sent, Unchanged};
use migration_stream::{GuestRam, MemoryError, PAGE_SIZE, TransportCounters};
use vm_memory::VolatileSlice;

use super::level::{LevelWatch, Pace};
use super::queue::{Batch, DeviceState, Due, Job, Queue};
use crate::channel::IsClosed;
use crate::compression::Encoder;
use crate::crew::Crew;
use crate::error::{ChannelError, Part};
use crate::packet::{HEADER_LEN, Method, PAGES_PER_PACKET, PacketFlags, PacketHeader};
use crate::runs::runs;

const PAGE_LEN: usize = 4096;

/// What all channels together have sent.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// What was sent of each page last, if pages are left out by it.
    pub(super) unchanged: OnceLock<Unchanged>,
    /// Where each packet is paid for before it is written.
    pub(super) limiter: OnceLock<Arc<RateLimiter>>,
    /// Packets, SYNC packets included: the number of the next packet. The receiver does not rely
    /// on any order of it, and neither do we.
    pub(super) packets: AtomicU64,
    normal_pages: AtomicU64,
    zero_pages: AtomicU64,
    bytes: AtomicU64,
    missed_zero_copy: AtomicU64,
}

impl Totals {
    pub(super) fn counters(&self) -> TransportCounters {
        let unchanged = self.unchanged.get();
        let (compared_pages, unchanged_pages) = unchanged.map_or((0, 0), Unchanged::counts);
        TransportCounters {
            compared_pages,
            unchanged_pages,
            normal_pages: self.normal_pages.load(Ordering::Relaxed),
            zero_pages: self.zero_pages.load(Ordering::Relaxed),
            channel_bytes: self.bytes.load(Ordering::Relaxed),
            missed_zero_copy: self.missed_zero_copy.load(Ordering::Relaxed),
            ..TransportCounters::default()
        }
    }
}

/// What is known of the other end of a channel.
pub(super) struct Peer {
    pub(super) is_closed: Option<IsClosed>,
    /// Channels of this side.
    pub(super) channels: u8,
    pub(super) method: Method,
}

impl Peer {
    /// The error of a channel that the peer has closed.
    pub(super) fn closed(&self, packets: Option<u64>, source: io::Error) -> ChannelError {
        ChannelError::PeerClosed {
            packets,
            channels: self.channels,
            method: self.method,
            source: Arc::new(source),
        }
    }

    /// Whether it has closed the channel, as far as that is known here.
    pub(super) fn has_closed(&self) -> bool {
        self.is_closed.as_ref().is_some_and(|is_closed| is_closed())
    }
}

pub(super) struct Writer<'a> {
    ram: &'a dyn GuestRam,
    sink: Box<dyn ByteSink>,
    encoder: Option<Box<dyn Encoder>>,
    /// Where the level of the encoder adapts.
    pace: Option<Pace>,
    peer: Peer,
    zero_page: bool,
    totals: &'a Totals,
    /// Packets written on this channel.
    index: u64,
    header: [u8; HEADER_LEN],
    /// The pages of the batch, one slice for those that follow each other, and where each begins.
    runs: Vec<(u64, VolatileSlice<'a>)>,
    normal: Vec<u64>,
    zero: Vec<u64>,
    /// The pages with data, one slice for those that follow each other.
    data: Vec<VolatileSlice<'a>>,
    /// Copies of pages, in the place of those three while pages are compared.
    changed: ChangedPages,
    /// Where there is a limit: this thread's part in it, while it has a job.
    busy: Option<Busy<'a>>,
    crew: Option<&'a Crew<Queue>>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        ram: &'a dyn GuestRam,
        sink: Box<dyn ByteSink>,
        encoder: Option<Box<dyn Encoder>>,
        peer: Peer,
        zero_page: bool,
        totals: &'a Totals,
    ) -> Self {
        Self {
            ram,
            sink,
            encoder,
            pace: None,
            peer,
            zero_page,
            totals,
            index: 0,
            header: [0; HEADER_LEN],
            runs: Vec::with_capacity(PAGES_PER_PACKET),
            normal: Vec::with_capacity(PAGES_PER_PACKET),
            zero: Vec::with_capacity(PAGES_PER_PACKET),
            data: Vec::with_capacity(PAGES_PER_PACKET),
            changed: ChangedPages::new(),
            busy: None,
            crew: None,
        }
    }

    /// The same, at a level that adapts.
    pub(super) fn at(self, level: Option<LevelWatch>) -> Self {
        let pace = level.map(Pace::new);
        Self { pace, ..self }
    }

    pub(super) fn run(mut self, channel: u8, crew: &'a Crew<Queue>) -> Result<(), ChannelError> {
        let mut points = 0;
        self.crew = Some(crew);
        loop {
            self.busy = None;
            let (job, deadline) = crew.next_job(usize::from(channel), points);
            self.busy = self.totals.limiter.get().map(|limiter| limiter.work());
            self.sink.set_write_deadline(deadline);
            // A target that wants fewer channels has closed this one when it was introduced; the
            // system would take the first packet all the same.
            if self.index == 0 && !matches!(job, Job::End) && self.peer.has_closed() {
                return Err(self
                    .peer
                    .closed(Some(0), io::ErrorKind::UnexpectedEof.into()));
            }
            match job {
                Job::Pages(batch) => {
                    self.write_pages(&batch)?;
                    crew.wrote_pages(batch);
                }
                Job::DeviceState(state) => {
                    self.write_device_state(&state)?;
                    crew.wrote_device_state();
                }
                Job::Due(due) => {
                    if due == Due::Sync {
                        self.write_sync()?;
                    }
                    self.wait_until_released()?;
                    points += 1;
                    crew.settled();
                }
                Job::End => return Ok(()),
            }
        }
    }

    fn pay(&mut self, bytes: usize) -> Result<(), ChannelError> {
        pay(&mut self.busy, self.crew, bytes).map(drop)
    }

    fn write_pages(&mut self, batch: &Batch) -> Result<(), ChannelError> {
        let Some(unchanged) = self.totals.unchanged.get() else {
            self.sort(batch)?;
            return self.write_sorted(batch.block());
        };
        let mut sent = if unchanged.compares() {
            self.compare(batch, unchanged)?
        } else {
            self.sort(batch)?;
            let (block, offsets) = (batch.block(), batch.offsets().iter());
            offsets.for_each(|&offset| unchanged.sent_unseen(PageAddress { block, offset }));
            Sent {
                sent: self.normal.len() as u64,
                ..Sent::default()
            }
        };
        let began = Instant::now();
        if !(self.normal.is_empty() && self.zero.is_empty()) {
            self.write_sorted(batch.block())?;
        }
        sent.send_time = began.elapsed();
        unchanged.note(sent);
        Ok(())
    }

    /// Writes the packet of the pages that were sorted or copied.
    fn write_sorted(&mut self, block: BlockId) -> Result<(), ChannelError> {
        let name = self
            .ram
            .blocks()
            .get(block)
            .ok_or_else(|| refused(MemoryError::NoBlock(block)))?
            .name();
        let index = self.index;
        let begun = Instant::now();
        // A packet of zero pages alone has no payload, whatever the method.
        let payload = match &mut self.encoder {
            Some(encoder) if !self.normal.is_empty() => Some(
                match self.data.is_empty() {
                    true => encoder.encode(&[self.changed.volatile_content()]),
                    false => encoder.encode(&self.data),
                }
                .map_err(|source| ChannelError::Compression { index, source })?,
            ),
            _ => None,
        };
        let compressed = payload.is_some().then(Instant::now);
        let payload_len = payload.map_or(self.normal.len() * PAGE_LEN, <[u8]>::len);
        PacketHeader {
            flags: PacketFlags {
                sync: false,
                method: self.peer.method,
            },
            number: self.totals.packets.fetch_add(1, Ordering::Relaxed),
            block: name.as_bytes(),
            normal: &self.normal,
            zero: &self.zero,
            // A payload is at most a packet's pages and what a codec adds to them.
            payload_len: u32::try_from(payload_len).unwrap_or(u32::MAX),
        }
        .fill(&mut self.header)
        .map_err(|source| ChannelError::Packet { index, source })?;

        let waited = pay(&mut self.busy, self.crew, HEADER_LEN + payload_len)?;
        let mut chunks = [Chunk::Bytes(&[]); 1 + PAGES_PER_PACKET];
        chunks[0] = Chunk::Bytes(&self.header);
        let used = match payload {
            Some(bytes) => {
                chunks[1] = Chunk::Bytes(bytes);
                2
            }
            // Copies are our own bytes, which the kernel takes before the write returns, zero-copy
            // or not.
            None if self.data.is_empty() => {
                chunks[1] = Chunk::Bytes(self.changed.content());
                2
            }
            None => {
                for (chunk, slice) in chunks[1..].iter_mut().zip(&self.data) {
                    *chunk = Chunk::Guest(*slice);
                }
                1 + self.data.len()
            }
        };
        self.sink
            .write_all(&chunks[..used])
            .map_err(|e| write_failed(&self.peer, index, Part::Payload, e))?;
        if let (Some(pace), Some(compressed), Some(encoder)) =
            (&mut self.pace, compressed, &mut self.encoder)
        {
            let pages = self.normal.len() * PAGE_LEN;
            let level = pace.written(begun..compressed, waited, pages, HEADER_LEN + payload_len);
            encoder
                .change_level(level)
                .map_err(|source| ChannelError::Compression { index, source })?;
        }
        self.index += 1;
        let add = |counter: &AtomicU64, n: usize| counter.fetch_add(n as u64, Ordering::Relaxed);
        add(&self.totals.normal_pages, self.normal.len());
        add(&self.totals.zero_pages, self.zero.len());
        add(&self.totals.bytes, HEADER_LEN + payload_len);
        Ok(())
    }

    /// Copies the pages of the batch that the receiver has not, and parts them as
    /// [`Writer::sort`] does.
    fn compare(&mut self, batch: &Batch, unchanged: &Unchanged) -> Result<Sent, ChannelError> {
        let offsets = batch.offsets().iter().copied();
        let sent = self
            .changed
            .copy(self.ram, unchanged, batch.block(), offsets, self.zero_page)
            .map_err(refused)?;
        self.data.clear();
        self.normal.clear();
        self.normal.extend_from_slice(self.changed.normal());
        self.zero.clear();
        self.zero.extend_from_slice(self.changed.zero());
        Ok(sent)
    }

    fn write_device_state(&mut self, state: &DeviceState) -> Result<(), ChannelError> {
        let header = state.header.encode();
        self.pay(header.len() + state.payload.len())?;
        self.sink
            .write_all(&[Chunk::Bytes(&header), Chunk::Bytes(&state.payload)])
            .map_err(|e| write_failed(&self.peer, self.index, Part::Payload, e))?;
        self.index += 1;
        self.totals.bytes.fetch_add(
            (header.len() + state.payload.len()) as u64,
            Ordering::Relaxed,
        );
        Ok(())
    }

    fn write_sync(&mut self) -> Result<(), ChannelError> {
        let index = self.index;
        PacketHeader::sync(self.totals.packets.fetch_add(1, Ordering::Relaxed))
            .fill(&mut self.header)
            .map_err(|source| ChannelError::Packet { index, source })?;
        self.pay(HEADER_LEN)?;
        self.sink
            .write_all(&[Chunk::Bytes(&self.header)])
            .map_err(|e| write_failed(&self.peer, index, Part::Header, e))?;
        self.index += 1;
        self.totals
            .bytes
            .fetch_add(HEADER_LEN as u64, Ordering::Relaxed);
        if let Some(pace) = &mut self.pace {
            pace.sync();
        }
        Ok(())
    }

    /// Waits until nobody reads guest memory for what was sent: from here on the guest may change it,
    /// and newer content of a page may leave on another channel.
    fn wait_until_released(&mut self) -> Result<(), ChannelError> {
        let copied = self
            .sink
            .wait_until_released()
            .map_err(|e| write_failed(&self.peer, self.index, Part::Payload, e))?;
        if copied > 0 {
            self.totals.missed_zero_copy.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Parts the zero pages of the batch from those with data.
    fn sort(&mut self, batch: &Batch) -> Result<(), ChannelError> {
        self.normal.clear();
        self.zero.clear();
        self.data.clear();
        self.changed.clear();
        self.runs.clear();
        for (offset, len) in runs(batch.offsets()) {
            let run = self
                .ram
                .slice(batch.block(), offset, len)
                .map_err(refused)?;
            if run.len() != len {
                return Err(refused(MemoryError::OutOfBlock {
                    name: batch.block().to_string(),
                    offset,
                    len,
                    used_length: offset + run.len() as u64,
                }));
            }
            if self.zero_page {
                fetch_for_zero_check(&run);
            }
            self.runs.push((offset, run));
        }
        for &(offset, run) in &self.runs {
            let len = run.len();
            // Where the pages with data begin that were not added yet.
            let mut from = 0;
            for at in (0..len).step_by(PAGE_LEN) {
                let offset = offset + at as u64;
                if self.zero_page && zero_check(&piece(&run, at, PAGE_LEN)?) {
                    if from < at {
                        self.data.push(piece(&run, from, at - from)?);
                    }
                    from = at + PAGE_LEN;
                    self.zero.push(offset);
                } else {
                    self.normal.push(offset);
                }
            }
            if from < len {
                self.data.push(piece(&run, from, len - from)?);
            }
        }
        Ok(())
    }
}

/// Waits until so many bytes may leave, and returns how long that took.
fn pay(
    busy: &mut Option<Busy<'_>>,
    crew: Option<&Crew<Queue>>,
    bytes: usize,
) -> Result<Duration, ChannelError> {
    let (Some(busy), Some(crew)) = (busy, crew) else {
        return Ok(Duration::ZERO);
    };
    let begun = Instant::now();
    let go_on = || {
        let mut state = crew.lock();
        // It is the limit that holds the channel up, not its peer.
        state.progress += 1;
        !state.is_over()
    };
    if busy.pay(bytes as u64, go_on) {
        Ok(begun.elapsed())
    } else {
        Err(ChannelError::Closed)
    }
}

fn piece<'a>(
    run: &VolatileSlice<'a>,
    at: usize,
    len: usize,
) -> Result<VolatileSlice<'a>, ChannelError> {
    run.subslice(at, len).map_err(|e| {
        refused(MemoryError::Backend {
            what: "taking a page out of a run",
            source: Box::new(e),
        })
    })
}

fn refused(e: MemoryError) -> ChannelError {
    ChannelError::Memory {
        what: "reading guest memory",
        source: Arc::new(e),
    }
}

fn write_failed(peer: &Peer, index: u64, part: Part, e: io::Error) -> ChannelError {
    if matches!(
        e.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
    ) {
        return peer.closed(Some(index), e);
    }
    ChannelError::Io {
        what: "writing",
        part,
        index,
        source: Arc::new(e),
    }
}

const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);
