//! One channel's thread: reads packets, and their pages straight into the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSource, deadline_after};
use migration_stream::ram::BlockId;
use migration_stream::raw::prepare_range;
use migration_stream::{MemoryError, PageStore};
use vm_memory::VolatileSlice;

use super::ahead::Ahead;
use super::budget::Budget;
use super::rendezvous::{RecvCounters, Rendezvous};
use crate::compression::Decoder;
use crate::crew::Crew;
use crate::device_state::{DEVICE_STATE_HEADER_LEN, DeviceStateHeader, DeviceStateSink};
use crate::error::{ChannelError, Part};
use crate::packet::{
    HEADER_LEN, MAX_COMPRESSED_LEN, Method, PAGES_PER_PACKET, PREFIX_LEN, PacketError, PacketKind,
    PacketView,
};
use crate::runs::runs;

/// Where device state goes, and the memory for what is on its way there.
pub(super) struct Devices {
    pub(super) sink: Arc<dyn DeviceStateSink>,
    pub(super) memory: Arc<Budget>,
}

pub(super) struct Reader<'a, S> {
    store: &'a S,
    devices: Option<Devices>,
    source: Box<dyn ByteSource>,
    decoder: Option<Box<dyn Decoder>>,
    method: Method,
    id: u8,
    /// Packets read on this channel.
    index: u64,
    /// The next header, as far as it came along with what was before it, and maybe more of them.
    ahead: Ahead,
    /// The last packet had pages and no payload: zero pages alone.
    is_bare: bool,
    /// The block of the last packet: a channel's packets are mostly of one.
    block: Option<BlockId>,
    /// Where the payload goes, one slice for pages that follow each other.
    landing: Vec<VolatileSlice<'a>>,
    /// A compressed payload.
    compressed: Vec<u8>,
    /// What the packet at hand has brought.
    taken: RecvCounters,
    /// Between packets a channel waits as long as the migration lasts: only its being shut ends that.
    idle_until: Instant,
}

/// Bytes of device state for which memory is taken at a time.
const DEVICE_STATE_STEP: usize = 1 << 20;

/// What a packet leaves to be done.
enum After {
    Next,
    Pages,
    Sync,
}

impl<'a, S: PageStore> Reader<'a, S> {
    pub(super) fn new(
        store: &'a S,
        devices: Option<Devices>,
        source: Box<dyn ByteSource>,
        decoder: Option<Box<dyn Decoder>>,
        method: Method,
        id: u8,
    ) -> Self {
        let room = if decoder.is_some() {
            MAX_COMPRESSED_LEN as usize
        } else {
            0
        };
        Self {
            store,
            devices,
            source,
            decoder,
            method,
            id,
            index: 0,
            ahead: Ahead::new(),
            is_bare: false,
            block: None,
            landing: Vec::with_capacity(PAGES_PER_PACKET),
            compressed: vec![0; room],
            taken: RecvCounters::default(),
            idle_until: deadline_after(Duration::MAX),
        }
    }

    pub(super) fn run(mut self, crew: &Crew<Rendezvous>) -> Result<(), ChannelError> {
        let result = self.packets(crew);
        crew.leave(self.id, result.is_ok());
        result
    }

    fn packets(&mut self, crew: &Crew<Rendezvous>) -> Result<(), ChannelError> {
        while let Some(kind) = self.read_header()? {
            crew.begin_packet(self.id)?;
            self.taken = RecvCounters::default();
            let after = match kind {
                PacketKind::Pages(_) => self.take_packet()?,
                PacketKind::DeviceState => self.take_device_state()?,
            };
            self.index += 1;
            match after {
                After::Next => crew.end_packet(self.id, false, self.taken),
                After::Pages => crew.end_packet(self.id, true, self.taken),
                After::Sync => crew.wait_at_sync(self.id, self.taken)?,
            }
        }
        Ok(())
    }

    /// Completes the next header; none when the channel ends before it.
    fn read_header(&mut self) -> Result<Option<PacketKind>, ChannelError> {
        let mut kind = None;
        loop {
            if kind.is_none()
                && let Some(prefix) = self.ahead.bytes().first_chunk::<PREFIX_LEN>()
            {
                let found = PacketView::check_prefix(prefix).map_err(|e| self.bad(e))?;
                if found == PacketKind::DeviceState && self.devices.is_none() {
                    return Err(self.bad(PacketError::DeviceState));
                }
                kind = Some(found);
            }
            let wanted = match kind {
                Some(PacketKind::DeviceState) => DEVICE_STATE_HEADER_LEN,
                _ => HEADER_LEN,
            };
            let have = self.ahead.len();
            if have >= wanted {
                return Ok(kind);
            }
            self.source.set_read_deadline(if have == 0 {
                Some(self.idle_until)
            } else {
                None
            });
            if have == 0 {
                // A read that found nothing would be one call more, and mostly there is nothing yet.
                let waited = self.source.wait(None, Some(self.idle_until));
                waited.map_err(|e| self.broken(Part::Header, e))?;
            }
            // Payload bytes that are read here are copied once more. Zero pages mostly follow zero pages, so
            // headers are read ahead behind them only.
            match self.source.read(self.ahead.room(self.is_bare)) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(self.eof(Part::Header, have, wanted)),
                Ok(n) => self.ahead.filled(n),
                Err(e) => return Err(self.broken(Part::Header, e)),
            }
        }
    }

    fn take_packet(&mut self) -> Result<After, ChannelError> {
        let Some(header) = self.ahead.bytes().first_chunk() else {
            return Ok(After::Next);
        };
        let header = PacketView::unfill(header, self.method).map_err(|e| self.bad(e))?;
        let after = match (header.is_sync(), header.has_pages()) {
            (true, _) => After::Sync,
            (false, true) => After::Pages,
            (false, false) => After::Next,
        };
        self.taken.bytes = HEADER_LEN as u64;
        self.is_bare = false;
        if !header.has_pages() {
            self.ahead.consume(HEADER_LEN);
            return Ok(after);
        }
        let name = header.block().map_err(|e| self.bad(e))?;
        let (block, used_length) = self.find_block(name)?;
        let payload_len = header.payload_len() as usize;
        self.is_bare = payload_len == 0 && !header.is_sync();
        let mut offsets = [0; PAGES_PER_PACKET];
        let (normal, zero) = header
            .offsets(used_length, &mut offsets)
            .map_err(|e| self.bad(e))?;
        self.ahead.consume(HEADER_LEN);
        self.taken.bytes += payload_len as u64;
        self.taken.normal_pages = normal.len() as u64;
        self.taken.zero_pages = zero.len() as u64;
        self.block = Some(block);

        self.landing.clear();
        for (offset, len) in runs(normal) {
            let landing = &mut self.landing;
            prepare_range(self.store, block, offset, len, |_, slice| {
                landing.push(slice);
                Ok(())
            })
            .map_err(refused)?;
        }
        if self.decoder.is_some() {
            self.read_compressed(payload_len)?;
        } else {
            self.read_pages(payload_len)?;
        }
        for (offset, len) in runs(normal) {
            self.store.landed(block, offset, len).map_err(refused)?;
        }
        for (offset, len) in runs(zero) {
            self.store.zero(block, offset, len).map_err(refused)?;
        }
        Ok(after)
    }

    /// Takes a packet of device state. Of it, and of the header behind it, something may be there
    /// already behind its own header.
    fn take_device_state(&mut self) -> Result<After, ChannelError> {
        let Some(header) = self.ahead.bytes().first_chunk() else {
            return Ok(After::Next);
        };
        let header = DeviceStateHeader::decode(header).map_err(|e| self.bad(e))?;
        let device = header.device;
        let max = (self.devices.as_ref()).and_then(|d| d.sink.max_len(&device));
        let refused = match max {
            None => Some(PacketError::UnknownDevice {
                idstr: device.idstr.clone(),
                instance: device.instance,
            }),
            Some(max) if header.payload_len > max => Some(PacketError::DeviceStateLength {
                idstr: device.idstr.clone(),
                got: header.payload_len,
                max,
            }),
            Some(_) => None,
        };
        if let Some(refused) = refused {
            return Err(self.bad(refused));
        }
        let memory = self.devices.as_ref().map(|d| Arc::clone(&d.memory));
        let mut held = memory.as_ref().map(|memory| memory.begin());
        let len = header.payload_len as usize;
        self.taken.bytes = (DEVICE_STATE_HEADER_LEN + len) as u64;
        self.is_bare = false;
        self.ahead.consume(DEVICE_STATE_HEADER_LEN);
        let here = len.min(self.ahead.len());
        let mut payload = self.ahead.bytes()[..here].to_vec();
        self.ahead.consume(here);
        self.source.set_read_deadline(None);
        while payload.len() < len {
            // Memory follows what has come, not what was said.
            let got = payload.len();
            payload.resize(len.min(got + DEVICE_STATE_STEP), 0);
            if let Some(held) = &mut held {
                held.grow_to(payload.capacity())?;
            }
            match self.source.read(&mut payload[got..]) {
                Ok(0) => return Err(self.eof(Part::Payload, got, len)),
                Ok(n) => payload.truncate(got + n),
                Err(e) => return Err(self.broken(Part::Payload, e)),
            }
        }
        let index = self.index;
        if let Some(devices) = &self.devices {
            devices
                .sink
                .load(&device, payload)
                .map_err(|source| ChannelError::DeviceState {
                    idstr: device.idstr,
                    instance: device.instance,
                    index,
                    source: source.into(),
                })?;
        }
        Ok(After::Next)
    }

    /// The block called `name` and its length, without a search if it is that of the last packet.
    fn find_block(&self, name: &[u8]) -> Result<(BlockId, u64), ChannelError> {
        let blocks = self.store.blocks();
        let id = self
            .block
            .filter(|id| blocks.get(*id).is_some_and(|b| b.name().as_bytes() == name))
            .or_else(|| blocks.find(name));
        if id.is_some_and(|id| blocks.is_ignored(id)) {
            return Err(self.bad(PacketError::IgnoredBlock {
                name: String::from_utf8_lossy(name).into_owned(),
            }));
        }
        id.and_then(|id| Some((id, blocks.get(id)?.used_length())))
            .ok_or_else(|| {
                self.bad(PacketError::Block {
                    name: String::from_utf8_lossy(name).into_owned(),
                })
            })
    }

    /// Reads a payload into the store, and of the header behind it what is there already.
    fn read_pages(&mut self, len: usize) -> Result<(), ChannelError> {
        self.source.set_read_deadline(None);
        let mut got = 0;
        let mut first = 0;
        while let Some(slice) = self.landing.get(first)
            && self.ahead.len() > 0
        {
            let here = slice.len().min(self.ahead.len());
            slice.copy_from(&self.ahead.bytes()[..here]);
            self.ahead.consume(here);
            got += here;
            first = self.fill_landing(first, here);
        }
        while got < len {
            let Some(rest) = self.landing.get(first..) else {
                break;
            };
            let n = match self.source.read_scatter(rest, self.ahead.room(false)) {
                Ok(0) => return Err(self.eof(Part::Payload, got, len)),
                Ok(n) => n,
                Err(e) => return Err(self.broken(Part::Payload, e)),
            };
            self.ahead.filled(n.saturating_sub(len - got));
            got += n;
            first = self.fill_landing(first, n);
        }
        Ok(())
    }

    /// Goes past the slices that `n` bytes more have filled, and to the middle of the one that is not
    /// full. The index of that one.
    fn fill_landing(&mut self, mut first: usize, mut n: usize) -> usize {
        while let Some(slice) = self.landing.get_mut(first) {
            if n < slice.len() {
                if let Ok(rest) = slice.offset(n) {
                    *slice = rest;
                }
                break;
            }
            n -= slice.len();
            first += 1;
        }
        first
    }

    /// Reads a compressed payload, likewise, and takes it apart into the store.
    fn read_compressed(&mut self, len: usize) -> Result<(), ChannelError> {
        self.source.set_read_deadline(None);
        let mut got = len.min(self.ahead.len());
        self.compressed[..got].copy_from_slice(&self.ahead.bytes()[..got]);
        self.ahead.consume(got);
        while got < len {
            let rest = VolatileSlice::from(&mut self.compressed[got..len]);
            let n = match self.source.read_scatter(&[rest], self.ahead.room(false)) {
                Ok(0) => return Err(self.eof(Part::Payload, got, len)),
                Ok(n) => n,
                Err(e) => return Err(self.broken(Part::Payload, e)),
            };
            self.ahead.filled(n.saturating_sub(len - got));
            got += n;
        }
        let index = self.index;
        match &mut self.decoder {
            // A packet of zero pages alone is not part of the compressed stream.
            Some(decoder) if !self.landing.is_empty() => decoder
                .decode(&self.compressed[..len], &self.landing)
                .map_err(|source| ChannelError::Compression { index, source }),
            _ => Ok(()),
        }
    }

    fn bad(&self, source: PacketError) -> ChannelError {
        ChannelError::Packet {
            index: self.index,
            source,
        }
    }

    fn eof(&self, part: Part, got: usize, expected: usize) -> ChannelError {
        ChannelError::Eof {
            part,
            index: self.index,
            got,
            expected,
        }
    }

    fn broken(&self, part: Part, e: std::io::Error) -> ChannelError {
        ChannelError::Io {
            what: "reading",
            part,
            index: self.index,
            source: Arc::new(e),
        }
    }
}

fn refused(e: MemoryError) -> ChannelError {
    ChannelError::Memory {
        what: "storing received pages",
        source: Arc::new(e),
    }
}
