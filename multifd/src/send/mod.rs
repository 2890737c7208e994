//! The sending side: channel threads that take packets of pages from one bounded queue.
//!
//! Whichever channel is free takes the next packet, so no channel has to be looked for and a slow
//! one holds up nothing but its own packet. The queue is empty before any channel writes its SYNC
//! packet, and nothing enters it before all have: that is the sync point.
//!
//! Where pages are sent again without a sync point in between (COLO, between two checkpoints), each
//! place in memory has its own channel instead: see [`PagesBeside::keep_order`].

#[cfg(feature = "zstd-adaptive")]
mod level;
#[cfg(not(feature = "zstd-adaptive"))]
#[path = "no_level.rs"]
mod level;
mod places;
mod queue;
mod writer;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use migration_stream::io::{CancelToken, SendMode};
use migration_stream::ram::{BlockId, ZeroPageDetection};
use migration_stream::raw::ram::{PageAddress, RecordEncoder, encode_multifd_flush, zero_check};
use migration_stream::raw::rate::RateLimiter;
use migration_stream::raw::transport::{PagesBeside, SendPages};
use migration_stream::raw::unchanged::{Sent, Unchanged};
use migration_stream::{
    GuestRam, MemoryError, PAGE_SIZE, StreamWriter, TransportCounters, TransportError,
    WhenToCompare,
};

use crate::channel::{IsClosed, SendChannel};
use crate::config::{Compression, Flush, MultifdConfig};
use crate::crew::{AbortHandle, Crew, State, Threads};
use crate::device_state::{DeviceId, DeviceStateHeader};
use crate::error::{ChannelError, Failure};
use crate::packet::PAGES_PER_PACKET;
use crate::patience::Patience;
#[cfg(feature = "zstd-adaptive")]
pub use level::LevelWatch;
#[cfg(not(feature = "zstd-adaptive"))]
use level::LevelWatch;
use places::Places;
use queue::{Awaited, Batch, DeviceState, Due, Queue, Work};
use writer::{Peer, Totals, Writer};

/// [`PAGE_SIZE`] as a length in memory.
const PAGE_LEN: usize = 4096;

/// The channels of an outgoing migration, a [`PageTransport`](migration_stream::PageTransport).
///
/// Every [`TransportError`] has a [`ChannelError`] as its source. After the first one of a channel
/// all channels are shut, and every later call returns that error again; a range that does not lie
/// in guest RAM is refused without harm to the channels.
pub struct SendSet {
    ram: Arc<dyn GuestRam>,
    crew: Arc<Crew<Queue>>,
    threads: Threads<Queue>,
    peers: Vec<Peer>,
    totals: Arc<Totals>,
    /// Pages that wait for more of their block.
    batch: Option<Batch>,
    /// The same by channel, where each place has its own.
    places: Option<Places>,
    deadline: Option<Instant>,
    /// Ends every wait of the set's owner, and the set with it.
    cancel: Option<CancelToken>,
    flush: Flush,
    is_compressed: bool,
    /// Guest memory may still be read when a packet of it is written.
    is_uncopied: bool,
    /// The level of all channels, if it adapts.
    #[cfg(feature = "zstd-adaptive")]
    level: Option<LevelWatch>,
    /// Zero pages go on the main stream.
    main_zero: Option<MainZero>,
}

/// What zero pages on the main stream need.
#[derive(Debug, Default)]
struct MainZero {
    records: RecordEncoder,
    pages: u64,
}

impl SendSet {
    /// Starts the threads of `channels`, whose handshakes are sent, in the order of their ids.
    ///
    /// # Errors
    /// [`ChannelError::ChannelCount`], [`ChannelError::Setup`] and [`ChannelError::Spawn`];
    /// [`ChannelError::ZeroCopy`] and [`ChannelError::CompressedZeroCopy`].
    pub fn start(
        ram: Arc<dyn GuestRam>,
        channels: Vec<SendChannel>,
        config: &MultifdConfig,
    ) -> Result<Self, TransportError> {
        if channels.len() != usize::from(config.channels.get()) {
            return Err(TransportError::main(ChannelError::ChannelCount {
                got: channels.len(),
                expected: config.channels.get(),
            }));
        }
        let is_compressed = config.compression != Compression::None;
        if config.send_mode == SendMode::ZeroCopy && is_compressed {
            return Err(TransportError::main(ChannelError::CompressedZeroCopy));
        }
        let method = config.compression.method();
        let count = config.channels.get();
        let mut peers = Vec::new();
        let (mut sinks, closers): (Vec<_>, Vec<_>) = channels
            .into_iter()
            .map(|c| {
                peers.push(c.is_closed);
                (c.sink, c.close)
            })
            .unzip();
        let peer = |is_closed: &Option<IsClosed>| Peer {
            is_closed: is_closed.clone(),
            channels: count,
            method,
        };
        let peers: Vec<_> = peers.iter().map(peer).collect();
        let mut is_uncopied = false;
        // What was compressed is our own bytes, of which copies are sent.
        if config.send_mode != SendMode::Copy && !is_compressed {
            for (id, sink) in config.channels.ids().zip(&mut sinks) {
                match (sink.set_send_mode(config.send_mode), config.send_mode) {
                    (Ok(()), _) => is_uncopied = true,
                    // Over anything but a unix socket pages are copied.
                    (Err(_), SendMode::Splice) => {}
                    (Err(e), _) => {
                        let source = Arc::new(e);
                        let error = ChannelError::ZeroCopy { source };
                        return Err(TransportError::channel(id.get(), error));
                    }
                }
            }
        }
        let crew = Arc::new(Crew::new(
            Queue::new(config.channels),
            closers,
            config.stall_limit,
        ));
        let totals = Arc::new(Totals::default());
        let level = LevelWatch::of(config.compression, config.channels);
        let mut threads = Threads::new(Arc::clone(&crew));
        for ((id, sink), its) in (0..count).zip(sinks).zip(&peers) {
            let its = peer(&its.is_closed);
            let encoder = config
                .compression
                .encoder()
                .map_err(|source| TransportError::channel(id, ChannelError::Setup { source }))?;
            let (ram, crew, totals) = (Arc::clone(&ram), Arc::clone(&crew), Arc::clone(&totals));
            let level = level.clone();
            let zero_page = config.zero_pages == ZeroPageDetection::Multifd;
            threads.spawn(
                format!("mfd-send-{id}"),
                id,
                move || {
                    Writer::new(&*ram, sink, encoder, its, zero_page, &totals)
                        .at(level)
                        .run(id, &crew)
                },
                |_| {},
            )?;
        }
        Ok(Self {
            ram,
            crew,
            threads,
            peers,
            totals,
            batch: None,
            places: None,
            deadline: None,
            cancel: None,
            flush: config.flush,
            is_compressed,
            is_uncopied,
            #[cfg(feature = "zstd-adaptive")]
            level,
            main_zero: (config.zero_pages == ZeroPageDetection::Legacy).then(MainZero::default),
        })
    }

    /// Says at which level the channels compress, if it is one that adapts
    /// ([`Compression::ZstdAdaptive`]).
    #[cfg(feature = "zstd-adaptive")]
    #[must_use]
    pub fn level(&self) -> Option<LevelWatch> {
        self.level.clone()
    }

    /// A handle that ends the channels from another thread.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(&self.crew)
    }

    /// Lets the channels write what is queued, shuts them, and waits for their threads.
    ///
    /// # Errors
    /// The first error of a channel; [`ChannelError::Stalled`] when the deadline passes, or nothing
    /// moves for the stall limit, before all is written; [`ChannelError::Stuck`].
    pub fn join(mut self) -> Result<TransportCounters, TransportError> {
        let written = self.finish_queue();
        let stopped = self.threads.stop();
        written?;
        stopped?;
        Ok(self.counters())
    }

    /// Sends state of a device on whichever channel is free, in one packet. It is in no order with
    /// others, and is there after the next synchronisation. Only a destination that has the
    /// device, and takes its state on the channels (QEMU 10.0 and later), can be sent any.
    ///
    /// # Errors
    /// The first error of a channel; [`ChannelError::CompressedDeviceState`] and
    /// [`ChannelError::DeviceStateLength`], without harm to the channels.
    pub fn send_device_state(
        &mut self,
        device: DeviceId,
        payload: Vec<u8>,
    ) -> Result<(), TransportError> {
        self.crew.check()?;
        if self.is_compressed {
            return Err(TransportError::main(ChannelError::CompressedDeviceState));
        }
        let len = payload.len();
        let payload_len = u32::try_from(len).ok().filter(|len| *len > 0);
        let payload_len = payload_len
            .ok_or_else(|| TransportError::main(ChannelError::DeviceStateLength { len }))?;
        let header = DeviceStateHeader {
            device,
            payload_len,
        };
        let work = Work::DeviceState(DeviceState { header, payload });
        Ok(self.queue(None, work)?)
    }

    /// A channel that the peer has closed and not the others, which nobody has written to since. A peer
    /// that has closed them all has failed elsewhere.
    fn closed_by_peer(&self) -> Option<Failure> {
        let mut closed = (0..).zip(&self.peers).filter(|(_, peer)| peer.has_closed());
        let (channel, peer) = closed.next()?;
        (closed.count() + 1 < self.peers.len()).then(|| Failure {
            channel: Some(channel),
            error: peer.closed(None, std::io::ErrorKind::UnexpectedEof.into()),
        })
    }

    fn finish_queue(&mut self) -> Result<(), Failure> {
        self.queue_batch()?;
        self.crew.lock().finish();
        self.crew.for_channels.notify_all();
        self.threads.drain(self.deadline)
    }

    /// Checks that the pages lie in guest RAM, so that no thread can fail on it.
    fn check_range(&self, block: BlockId, offset: u64, pages: u64) -> Result<(), ChannelError> {
        let what = "a range of pages to send";
        let refuse = |e| ChannelError::Memory {
            what,
            source: Arc::new(e),
        };
        let found = self
            .ram
            .blocks()
            .get(block)
            .ok_or_else(|| refuse(MemoryError::NoBlock(block)))?;
        let len = pages.checked_mul(PAGE_SIZE);
        let end = len.and_then(|len| offset.checked_add(len));
        if offset.is_multiple_of(PAGE_SIZE) && end.is_some_and(|end| end <= found.used_length()) {
            return Ok(());
        }
        Err(refuse(MemoryError::OutOfBlock {
            name: found.name().to_owned(),
            offset,
            len: len
                .and_then(|len| usize::try_from(len).ok())
                .unwrap_or(usize::MAX),
            used_length: found.used_length(),
        }))
    }

    /// Collects pages for the channels.
    fn queue_pages(&mut self, block: BlockId, offset: u64, end: u64) -> Result<(), Failure> {
        let mut offset = offset;
        while let Some(places) = &mut self.places
            && offset < end
        {
            let crew = &self.crew;
            let (next, channel, full) =
                places.extend(block, offset, end, || crew.lock().empty_batch(block));
            offset = next;
            for batch in full.into_iter().flatten() {
                self.queue(Some(channel), Work::Pages(batch))?;
            }
        }
        while offset < end {
            if self.batch.as_ref().is_some_and(|b| b.block() != block) {
                self.queue_batch()?;
            }
            let batch = self
                .batch
                .get_or_insert_with(|| self.crew.lock().empty_batch(block));
            offset = batch.extend(offset, end);
            if batch.offsets().len() == PAGES_PER_PACKET {
                self.queue_batch()?;
            }
        }
        Ok(())
    }

    /// Sends the page on the main stream if it is zero; false if it is not.
    fn send_zero(
        &mut self,
        main: &mut StreamWriter,
        page: PageAddress,
    ) -> Result<bool, TransportError> {
        let data = self
            .ram
            .slice(page.block, page.offset, PAGE_LEN)
            .map_err(TransportError::main)?;
        let (Some(zero), true) = (&mut self.main_zero, zero_check(&data)) else {
            return Ok(false);
        };
        if let Some(unchanged) = self.totals.unchanged.get() {
            if !unchanged.compares() {
                unchanged.sent_unseen(page);
            } else if unchanged.is_known_zero(page) {
                unchanged.note(Sent {
                    still_zero: 1,
                    ..Sent::default()
                });
                return Ok(true);
            }
        }
        let mut record = Vec::with_capacity(RecordEncoder::MAX_LEN);
        zero.records
            .zero(page, self.ram.blocks(), &mut record)
            .map_err(TransportError::main)?;
        zero.pages += 1;
        main.hold(&record, None).map_err(main_stream)?;
        Ok(true)
    }

    /// Hands the pages that were collected to whichever channel is free first, or to the one that
    /// they belong to.
    fn queue_batch(&mut self) -> Result<(), Failure> {
        let begun: Vec<_> = self.places.iter_mut().flat_map(Places::take_all).collect();
        for (channel, batch) in begun {
            self.queue(Some(channel), Work::Pages(batch))?;
        }
        match self.batch.take() {
            Some(batch) => self.queue(None, Work::Pages(batch)),
            None => Ok(()),
        }
    }

    /// Hands out what one packet is made of, to `channel` or to any.
    fn queue(&mut self, channel: Option<usize>, work: Work) -> Result<(), Failure> {
        let mut state = self.crew.lock();
        let mut patience = self.patience(&state);
        loop {
            state.check()?;
            state.limited = self.totals.limiter.get().is_some_and(|l| l.rate() > 0);
            if state.has_room(channel, &work) {
                state.push(channel, work);
                match channel {
                    None => self.crew.for_channels.notify_one(),
                    // They all wait at the same place.
                    Some(_) => self.crew.for_channels.notify_all(),
                }
                return Ok(());
            }
            let in_time;
            state.wait_for(Awaited::Room(channel));
            (state, in_time) = patience.wait(&self.crew.for_owner, state, |s| s.progress);
            if !in_time {
                drop(state);
                return Err(self.give_up("a channel that takes the next packet"));
            }
        }
    }

    /// Waits until the channels have written all that is queued.
    fn wait_written(&mut self) -> Result<(), Failure> {
        self.queue_batch()?;
        let mut state = self.crew.lock();
        let mut patience = self.patience(&state);
        loop {
            state.check()?;
            if state.is_drained() {
                return Ok(());
            }
            let in_time;
            state.wait_for(Awaited::Drained);
            (state, in_time) = patience.wait(&self.crew.for_owner, state, |s| s.progress);
            if !in_time {
                drop(state);
                return Err(self.give_up("the channels to write what is queued"));
            }
        }
    }

    /// Every channel writes exactly one SYNC packet behind everything that is queued.
    fn sync_channels(&mut self) -> Result<(), Failure> {
        self.settle(Due::Sync, "every channel to write its sync packet")
    }

    /// Every channel does what is due behind everything that is queued.
    fn settle(&mut self, due: Due, what: &'static str) -> Result<(), Failure> {
        self.queue_batch()?;
        let mut state = self.crew.lock();
        state.check()?;
        state.begin_point(due);
        self.crew.for_channels.notify_all();
        let mut patience = self.patience(&state);
        while !state.is_settled() {
            let in_time;
            state.wait_for(Awaited::Settled);
            (state, in_time) = patience.wait(&self.crew.for_owner, state, |s| s.progress);
            state.check()?;
            if !in_time {
                drop(state);
                return Err(self.give_up(what));
            }
        }
        Ok(())
    }

    fn patience(&self, state: &State<Queue>) -> Patience {
        self.crew
            .patience(self.deadline, state)
            .until_cancelled(self.cancel.as_ref())
    }

    /// The set is behind its deadline, or was cancelled. It cannot go on: what the receiver has is not known.
    fn give_up(&self, what: &'static str) -> Failure {
        let is_cancelled = self.cancel.as_ref().is_some_and(CancelToken::is_cancelled);
        let error = match is_cancelled {
            true => ChannelError::Closed,
            false => ChannelError::Stalled { what },
        };
        self.crew.give_up(None, error)
    }
}

impl SendPages for SendSet {
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
        self.crew.check()?;
        self.check_range(block, offset, pages)
            .map_err(TransportError::main)?;
        let end = offset + pages * PAGE_SIZE;
        if self.main_zero.is_none() {
            return Ok(self.queue_pages(block, offset, end)?);
        }
        for offset in (offset..end).step_by(PAGE_LEN) {
            if !self.send_zero(main, PageAddress { block, offset })? {
                self.queue_pages(block, offset, offset + PAGE_SIZE)?;
            }
        }
        Ok(())
    }

    fn sync(&mut self, main: &mut StreamWriter) -> Result<(), TransportError> {
        if self.flush == Flush::EachSection {
            return Ok(());
        }
        self.sync_channels()?;
        let mut record = [0; 8];
        encode_multifd_flush(&mut record.as_mut_slice());
        main.write_bytes(&record).map_err(main_stream)
    }

    fn end_section(&mut self, _main: &mut StreamWriter) -> Result<(), TransportError> {
        if self.flush == Flush::EachSection {
            self.sync_channels()?;
        }
        Ok(())
    }

    fn begin_round(&mut self) {
        if let Some(unchanged) = self.totals.unchanged.get() {
            unchanged.begin_round();
        }
    }

    fn leave_out_unchanged(&mut self, when: WhenToCompare) -> Result<bool, TransportError> {
        let unchanged = Unchanged::new(self.ram.blocks(), when).map_err(TransportError::main)?;
        // Called again it is the table that is there already.
        self.totals.unchanged.get_or_init(|| unchanged);
        Ok(true)
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
        self.crew.lock().deadline = deadline;
    }

    fn set_limiter(&mut self, limiter: &Arc<RateLimiter>) {
        // Called again it is the limiter that is there already.
        self.totals.limiter.get_or_init(|| Arc::clone(limiter));
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }

    fn counters(&self) -> TransportCounters {
        let mut counters = self.totals.counters();
        counters.zero_pages += self.main_zero.as_ref().map_or(0, |z| z.pages);
        counters
    }

    fn failure(&self) -> Option<TransportError> {
        // A channel that writes nothing has nothing to report.
        let failure = self.crew.first_failure(|queue| !queue.is_drained());
        failure.or_else(|| self.closed_by_peer()).map(Into::into)
    }

    fn beside(&mut self) -> Option<&mut dyn PagesBeside> {
        // A zero page on the main stream could overtake what a channel had of it before.
        self.main_zero.is_none().then_some(self)
    }
}

impl PagesBeside for SendSet {
    fn keep_order(&mut self) {
        if self.places.is_none() {
            self.places = Some(Places::new(self.threads.len()));
        }
    }

    fn send_beside(
        &mut self,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError> {
        self.crew.check()?;
        self.check_range(block, offset, pages)
            .map_err(TransportError::main)?;
        Ok(self.queue_pages(block, offset, offset + pages * PAGE_SIZE)?)
    }

    fn drain(&mut self) -> Result<(), TransportError> {
        Ok(match self.is_uncopied {
            true => self.settle(Due::LetGo, "the peer to take the pages that were sent"),
            false => self.wait_written(),
        }?)
    }
}

fn main_stream(e: std::io::Error) -> TransportError {
    TransportError::main(ChannelError::Main {
        source: Arc::new(e),
    })
}

impl fmt::Debug for SendSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendSet")
            .field("crew", &self.crew)
            .field("packets", &self.totals.packets.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}
