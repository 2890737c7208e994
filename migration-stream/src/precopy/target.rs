//! The target of a live migration: pages into the store, devices to the VMM, answers on the return
//! path; and what a COLO secondary goes on with after it.

use std::sync::Arc;
use std::time::Instant;
use std::{fmt, io};

use bytes::BytesMut;
use vm_memory::VolatileSlice;

use super::error::{BoxError, TargetError};
use super::switchover_ack::SwitchoverAcks;
use crate::codec::Reader;
use crate::command::Command;
use crate::configuration::Configuration;
use crate::decoder::{
    CheckpointDecoder, DecoderConfig, Item, MAX_ITEM_LEN, RamItem, Step, StreamDecoder,
};
use crate::dirty_bitmap::{
    BitmapSections, Chunk, DIRTY_BITMAP_IDSTR, DIRTY_BITMAP_VERSION, MigratedBitmap,
};
use crate::io::{ByteSink, Chunk as IoChunk};
use crate::mapped_ram::MappedArea;
use crate::opaque_tail::{Fed, OpaqueTail, Tail, TailLimits};
use crate::postcopy::PostcopyOrder;
use crate::ram::{BlockId, PageAddress, RAM_IDSTR, RamBlockTable, RamError};
use crate::return_path::ReturnPathMessage;
use crate::section::{Continuation, InstanceId, SectionError, SectionHeader, SectionId};
use crate::xbzrle::{Run, Runs};
use crate::{DecodeError, MemoryError, PAGE_SIZE, PageBarrier, PageStore, StreamReader};

/// [`PAGE_SIZE`] as a length in memory.
#[allow(clippy::cast_possible_truncation)] // 4096
const PAGE_LEN: usize = PAGE_SIZE as usize;

/// What a target asks of its VMM.
pub trait TargetVm {
    /// A device section begins; `body` is as much of what follows as has arrived, and may already
    /// run over into the next section. Called again with more after [`Body::NeedMore`], from the
    /// start of the body.
    ///
    /// Nothing may change in the VM until the whole stream was loaded: parse, check, and keep.
    ///
    /// # Errors
    /// The device is unknown, or its state is not sound. The migration fails.
    fn load_device(&mut self, section: &SectionHeader, body: &[u8]) -> Result<Body, BoxError>;

    /// A chunk of `bitmap` (the capability `dirty-bitmaps`), whose alias is its node's and its own
    /// name unless the source maps them. Bits come while the guest still runs at the source; what
    /// was said above of changes holds here, too.
    ///
    /// # Errors
    /// The bitmap is not wanted, which is all that happens unless this is implemented. The
    /// migration fails.
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        _chunk: &Chunk,
    ) -> Result<(), BoxError> {
        Err(format!("dirty bitmap '{}' of '{}'", bitmap.name, bitmap.node).into())
    }
}

/// What a device found in the bytes shown to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The body is this many bytes long.
    Complete(usize),
    /// The body is longer than what was there.
    NeedMore,
}

/// What a target expects and bounds.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// Header, configuration, footers.
    pub decoder: DecoderConfig,
    /// The longest device section accepted, bytes.
    pub max_devices: usize,
}

/// Memory that came in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Pages on the main stream that came with data.
    pub normal_pages: u64,
    /// Pages on the main stream that came as zero.
    pub zero_pages: u64,
    /// Pages on the main stream that came as differences.
    pub xbzrle_pages: u64,
    /// Times that the multifd channels were synchronised.
    pub flushes: u64,
    /// Bytes of the main stream.
    pub bytes: u64,
}

/// An incoming migration.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    decoder: StreamDecoder,
    configuration: Option<Configuration>,
    ram_section: Option<SectionId>,
    bitmap_section: Option<SectionId>,
    bitmaps: BitmapSections,
    keeps_bitmaps: bool,
    /// Areas of a file that were announced before there was memory for them.
    mapped: Vec<(BlockId, MappedArea)>,
    link: Link,
    received: Received,
}

/// The two directions of the main channel.
struct Link {
    reader: StreamReader,
    return_path: Option<Box<dyn ByteSink>>,
    /// The source has asked for the return path.
    open: bool,
    /// The devices that acknowledge the switch-over, and for how many of them it was done.
    acks: Option<(Arc<SwitchoverAcks>, u32)>,
    /// What the source has said of postcopy, which never begins here.
    postcopy: PostcopyOrder,
}

/// Where pages go.
struct Pages<'a> {
    store: &'a dyn PageStore,
    barrier: &'a mut dyn PageBarrier,
}

/// What becomes of device sections.
enum Devices<'a> {
    /// The VMM reads them.
    Known(&'a mut dyn TargetVm),
    /// They are kept as they are.
    Opaque(TailLimits),
}

/// A guest that was taken over, devices included. The source stands still until
/// [`Loaded::confirm`] and may still take the guest back before.
#[derive(Debug)]
pub struct Loaded {
    decoder: StreamDecoder,
    configuration: Option<Configuration>,
    link: Link,
    received: Received,
    bitmaps: BitmapSections,
}

impl Target {
    /// A target that fills `store`. The store's blocks are what the source must announce. Messages
    /// of the return path go to `return_path`, once the source has opened it.
    #[must_use]
    pub fn new(
        config: TargetConfig,
        reader: StreamReader,
        return_path: Option<Box<dyn ByteSink>>,
        store: &dyn PageStore,
    ) -> Self {
        Self::with_blocks(config, reader, return_path, Some(store.blocks().clone()))
    }

    /// A target that does not know the source's memory beforehand: reads the stream as far as the
    /// list of its blocks, and returns that. The store that [`Target::load`] is given has to have
    /// these blocks in this order. How much memory they may take up is the caller's to judge: only
    /// their number is bounded.
    ///
    /// # Errors
    /// Whatever is wrong with the stream; the source is told by a SHUT message if it can be.
    pub fn from_announcement(
        config: TargetConfig,
        reader: StreamReader,
        return_path: Option<Box<dyn ByteSink>>,
    ) -> Result<(Self, RamBlockTable), TargetError> {
        let mut target = Self::with_blocks(config, reader, return_path, None);
        match target.announcement() {
            Ok(blocks) => Ok((target, blocks)),
            Err(error) => {
                target.link.refuse();
                Err(error)
            }
        }
    }

    fn with_blocks(
        config: TargetConfig,
        reader: StreamReader,
        return_path: Option<Box<dyn ByteSink>>,
        blocks: Option<RamBlockTable>,
    ) -> Self {
        Self {
            decoder: StreamDecoder::new(config.decoder.clone(), blocks),
            config,
            configuration: None,
            ram_section: None,
            bitmap_section: None,
            bitmaps: BitmapSections::new(),
            keeps_bitmaps: false,
            mapped: Vec::new(),
            link: Link {
                reader,
                return_path,
                open: false,
                acks: None,
                postcopy: PostcopyOrder::new(None),
            },
            received: Received::default(),
        }
    }

    /// The source's configuration, once it was read.
    #[must_use]
    pub const fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// Whether the source waits for [`Loaded::confirm`]: it has opened a return path.
    #[must_use]
    pub const fn has_return_path(&self) -> bool {
        self.link.open
    }

    /// Synchronises multifd channels as [`DecoderConfig::flush_each_section`] says. For those who
    /// learn the machine type from the stream.
    #[must_use]
    pub const fn flushing_each_section(mut self) -> Self {
        self.decoder.flush_each_section();
        self
    }

    /// Acknowledges the switch-over for `devices` (the capability `switchover-ack`).
    #[must_use]
    pub fn acknowledging(mut self, devices: Arc<SwitchoverAcks>) -> Self {
        self.link.acks = Some((devices, 0));
        self
    }

    /// Keeps dirty bitmaps (the capability `dirty-bitmaps`) of a guest that is
    /// [taken as it is](Target::load_opaque), in [`Loaded::dirty_bitmaps`]. Without this a guest that
    /// has some is refused: it would go on without them.
    #[must_use]
    pub const fn keeping_dirty_bitmaps(mut self) -> Self {
        self.keeps_bitmaps = true;
        self
    }

    /// Loads the stream to its end: pages into `store`, devices through `vm`.
    ///
    /// # Errors
    /// Whatever is wrong with the stream; the source is told by a SHUT message if it can be.
    pub fn load(
        self,
        store: &dyn PageStore,
        barrier: &mut dyn PageBarrier,
        vm: &mut dyn TargetVm,
    ) -> Result<Loaded, TargetError> {
        let mut devices = Devices::Known(vm);
        self.finish(|target| target.run(&mut Pages { store, barrier }, &mut devices))
            .map(|(loaded, _)| loaded)
    }

    /// Loads the stream to its end: pages into `store`, while device sections, which nobody here
    /// knows, are taken as they are and told apart by the description behind them.
    ///
    /// # Errors
    /// As for [`Target::load`], and when no description accounts for the sections.
    pub fn load_opaque(
        self,
        store: &dyn PageStore,
        barrier: &mut dyn PageBarrier,
        limits: TailLimits,
    ) -> Result<(Loaded, Tail), TargetError> {
        self.finish(|target| {
            let mut devices = Devices::Opaque(limits);
            let tail = target.run(&mut Pages { store, barrier }, &mut devices)?;
            let offset = target.link.reader.offset();
            tail.ok_or(TargetError::Missing {
                what: "device sections",
                offset,
            })
        })
    }

    fn finish<R>(
        mut self,
        load: impl FnOnce(&mut Self) -> Result<R, TargetError>,
    ) -> Result<(Loaded, R), TargetError> {
        match load(&mut self) {
            Ok(result) => {
                self.received.bytes = self.link.reader.offset();
                let Self {
                    decoder,
                    configuration,
                    link,
                    received,
                    bitmaps,
                    ..
                } = self;
                Ok((
                    Loaded {
                        decoder,
                        configuration,
                        link,
                        received,
                        bitmaps,
                    },
                    result,
                ))
            }
            Err(error) => {
                self.link.refuse();
                Err(error)
            }
        }
    }

    /// The next item, and where it began.
    fn item(&mut self) -> Result<(Item, u64), TargetError> {
        loop {
            self.link.acknowledge()?;
            let offset = self.link.reader.offset();
            let mut r = Reader::new(self.link.reader.buffered(), offset);
            let step = self.decoder.next(&mut r)?;
            let consumed = r.consumed();
            self.link.reader.consume(consumed);
            match step {
                Step::NeedMore { .. } => self.link.fill(MAX_ITEM_LEN)?,
                Step::Item(item) => return Ok((item, offset)),
            }
        }
    }

    /// Everything up to the block list.
    fn announcement(&mut self) -> Result<RamBlockTable, TargetError> {
        loop {
            let (item, offset) = self.item()?;
            match item {
                Item::Configuration(received) => self.configuration = Some(received),
                Item::Command(command) => self.link.command(&command, offset)?,
                Item::Section(header) if header.idstr.as_str() == RAM_IDSTR => {
                    self.ram_section = Some(header.id);
                }
                Item::Ram(RamItem::MappedBlock { block, area }) => {
                    self.link.seek(area.end())?;
                    self.mapped.push((block, area));
                }
                Item::Ram(RamItem::BlockList(blocks)) => return Ok(blocks),
                Item::Section(_) | Item::Eof | Item::VmDescription { .. } => {
                    let what = "the blocks of ram before anything else";
                    return Err(TargetError::Missing { what, offset });
                }
                Item::Header | Item::Footer(_) | Item::Continuation { .. } | Item::Ram(_) => {}
            }
        }
    }

    /// Returns the tail if the devices were taken opaque.
    fn run(
        &mut self,
        pages: &mut Pages<'_>,
        devices: &mut Devices<'_>,
    ) -> Result<Option<Tail>, TargetError> {
        for (block, area) in std::mem::take(&mut self.mapped) {
            pages.load_mapped(block, &area, &mut self.received)?;
        }
        let mut tail = None;
        loop {
            let (item, offset) = self.item()?;
            match item {
                Item::Header | Item::Footer(_) => {}
                Item::Configuration(received) => self.configuration = Some(received),
                Item::Command(command) => self.link.command(&command, offset)?,
                Item::Section(header) => {
                    let limit = self.config.max_devices;
                    match devices {
                        _ if header.idstr.as_str() == RAM_IDSTR => {
                            self.ram_section = Some(header.id);
                        }
                        _ if header.idstr.as_str() == DIRTY_BITMAP_IDSTR => {
                            check_bitmap_section(&header, offset)?;
                            if matches!(devices, Devices::Opaque(_)) && !self.keeps_bitmaps {
                                return Err(TargetError::DirtyBitmaps { offset });
                            }
                            self.bitmap_section = Some(header.id);
                            self.link.bitmaps(devices, &mut self.bitmaps, None)?;
                        }
                        Devices::Known(vm) => self.link.device(*vm, &header, limit)?,
                        Devices::Opaque(limits) => {
                            tail = Some(self.link.tail(&header, *limits)?);
                            break;
                        }
                    }
                }
                Item::Continuation { kind, id } => {
                    if self.bitmap_section == Some(id) {
                        self.link.bitmaps(devices, &mut self.bitmaps, Some(kind))?;
                    } else if self.ram_section != Some(id) {
                        return Err(TargetError::IterableDevice { id, offset });
                    }
                }
                Item::Ram(item) => self.link.ram(item, pages, &mut self.received)?,
                // The description follows.
                Item::Eof => {}
                Item::VmDescription { len } => {
                    self.link.skip(len as usize)?;
                    break;
                }
            }
        }
        if self.ram_section.is_none() {
            let offset = self.link.reader.offset();
            return Err(TargetError::Missing {
                what: "a RAM section",
                offset,
            });
        }
        Ok(tail)
    }
}

impl Pages<'_> {
    fn load_mapped(
        &mut self,
        block: BlockId,
        area: &MappedArea,
        received: &mut Received,
    ) -> Result<(), TargetError> {
        if !self.store.blocks().is_ignored(block) {
            let loaded = self.barrier.load_mapped(block, area, self.store)?;
            received.normal_pages += loaded.normal;
            received.zero_pages += loaded.zero;
        }
        Ok(())
    }
}

impl Link {
    fn seek(&mut self, offset: u64) -> Result<(), TargetError> {
        self.reader.seek(offset).map_err(|e| self.broken(e))
    }

    /// The migration has failed already: that the source cannot be told changes nothing.
    fn refuse(&mut self) {
        let _ = self.send(&ReturnPathMessage::Shut { status: 1 });
    }

    fn fill(&mut self, limit: usize) -> Result<(), TargetError> {
        self.reader.fill(limit).map_err(|e| self.broken(e))
    }

    fn broken(&self, source: io::Error) -> TargetError {
        TargetError::Stream {
            offset: self.reader.offset(),
            source,
        }
    }

    fn send(&mut self, message: &ReturnPathMessage) -> Result<(), TargetError> {
        if let (Some(out), true) = (&mut self.return_path, self.open) {
            let mut bytes = BytesMut::new();
            message.encode(&mut bytes);
            out.write_all(&[IoChunk::Bytes(&bytes)])
                .map_err(TargetError::ReturnPath)?;
        }
        Ok(())
    }

    /// Sends the acknowledgements that are due.
    fn acknowledge(&mut self) -> Result<(), TargetError> {
        while let Some((devices, sent)) = &mut self.acks
            && self.open
            && *sent < devices.owed()
        {
            *sent += 1;
            self.send(&ReturnPathMessage::SwitchoverAck)?;
        }
        Ok(())
    }

    fn command(&mut self, command: &Command, offset: u64) -> Result<(), TargetError> {
        match command {
            Command::OpenReturnPath if self.return_path.is_some() => {
                self.open = true;
                Ok(())
            }
            Command::Ping(value) if self.open => self.send(&ReturnPathMessage::Pong(*value)),
            Command::OpenReturnPath | Command::Ping(_) => Err(TargetError::NoReturnPath {
                command: command.number(),
                offset,
            }),
            // The guest stands still at the source: nothing to do for those who load at the end.
            Command::SwitchoverStart => Ok(()),
            // A source with `dirty-bitmaps` may go over to postcopy, and need not.
            Command::PostcopyAdvise(None) => Ok(self
                .postcopy
                .command(command)
                .map_err(|e| DecodeError::new(offset, e))?),
            _ => Err(TargetError::Unsupported {
                command: command.number(),
                offset,
            }),
        }
    }

    fn device(
        &mut self,
        vm: &mut dyn TargetVm,
        header: &SectionHeader,
        limit: usize,
    ) -> Result<(), TargetError> {
        let offset = self.reader.offset();
        let failed = |source: BoxError| TargetError::Device {
            idstr: header.idstr.as_str().into(),
            instance: header.instance.0,
            offset,
            source,
        };
        loop {
            let available = self.reader.buffered();
            match vm.load_device(header, available).map_err(failed)? {
                Body::Complete(len) if len <= available.len() => {
                    self.reader.consume(len);
                    return Ok(());
                }
                Body::Complete(len) => {
                    return Err(failed(
                        format!("took {len} bytes of the {} there were", available.len()).into(),
                    ));
                }
                Body::NeedMore => self.fill(limit)?,
            }
        }
    }

    /// The body of a section of dirty bitmaps.
    fn bitmaps(
        &mut self,
        devices: &mut Devices<'_>,
        sections: &mut BitmapSections,
        kind: Option<Continuation>,
    ) -> Result<(), TargetError> {
        if let Devices::Opaque(_) = devices {
            sections.begin(kind);
        }
        loop {
            let offset = self.reader.offset();
            let mut r = Reader::new(self.reader.buffered(), offset);
            let chunk = match devices {
                Devices::Known(_) => sections.pass(&mut r),
                Devices::Opaque(limits) => sections.next(&mut r, limits.len),
            };
            let consumed = r.consumed();
            self.reader.consume(consumed);
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(e) if e.missing().is_some() => {
                    self.fill(MAX_ITEM_LEN)?;
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            if let (Devices::Known(vm), Some(bitmap), true) =
                (&mut *devices, sections.current(), chunk.is_of_a_bitmap())
            {
                vm.load_dirty_bitmap(bitmap, &chunk)
                    .map_err(|source| TargetError::Device {
                        idstr: DIRTY_BITMAP_IDSTR.into(),
                        instance: 0,
                        offset,
                        source,
                    })?;
            }
            if chunk.is_last {
                return Ok(());
            }
        }
    }

    /// Device sections, EOF and description, beginning with the body of `header`.
    fn tail(&mut self, header: &SectionHeader, limits: TailLimits) -> Result<Tail, TargetError> {
        let mut tail = OpaqueTail::beginning_with(header, limits);
        loop {
            match tail.feed(self.reader.buffered())? {
                Fed::Complete { consumed, tail } => {
                    self.reader.consume(consumed);
                    return Ok(tail);
                }
                Fed::NeedMore => {
                    self.reader.consume(self.reader.buffered().len());
                    self.fill(MAX_ITEM_LEN)?;
                }
            }
        }
    }

    fn ram(
        &mut self,
        item: RamItem,
        pages: &mut Pages<'_>,
        received: &mut Received,
    ) -> Result<(), TargetError> {
        match item {
            RamItem::BlockList(_) | RamItem::EndOfSection => {}
            RamItem::MappedBlock { block, area } => {
                pages.load_mapped(block, &area, received)?;
                self.seek(area.end())?;
            }
            RamItem::Page(PageAddress { block, offset }) => {
                let page: VolatileSlice<'_> = pages.store.prepare(block, offset, PAGE_LEN)?;
                let read = self.reader.read_payload(&page);
                read.map_err(|e| self.broken(e))?;
                pages.store.landed(block, offset, PAGE_LEN)?;
                received.normal_pages += 1;
            }
            RamItem::Zero(PageAddress { block, offset }) => {
                pages.store.zero(block, offset, PAGE_LEN)?;
                received.zero_pages += 1;
            }
            RamItem::Xbzrle { page, len } => {
                let len = usize::from(len);
                while self.reader.buffered().len() < len {
                    self.fill(MAX_ITEM_LEN)?;
                }
                let offset = self.reader.offset();
                let encoded = self.reader.buffered().get(..len).unwrap_or_default();
                apply_xbzrle(encoded, page, pages.store, offset)?;
                self.reader.consume(len);
                received.xbzrle_pages += 1;
            }
            RamItem::MultifdFlush => {
                pages.barrier.flush()?;
                received.flushes += 1;
            }
        }
        Ok(())
    }

    /// Reads and drops `len` bytes.
    fn skip(&mut self, mut len: usize) -> Result<(), TargetError> {
        while len > 0 {
            let here = len.min(self.reader.buffered().len());
            self.reader.consume(here);
            len -= here;
            if len > 0 && here == 0 {
                self.fill(MAX_ITEM_LEN)?;
            }
        }
        Ok(())
    }
}

fn check_bitmap_section(header: &SectionHeader, offset: u64) -> Result<(), DecodeError> {
    let idstr = header.idstr.clone();
    let error = if header.instance != InstanceId(0) {
        SectionError::Instance {
            idstr,
            instance: header.instance,
        }
    } else if header.version != DIRTY_BITMAP_VERSION {
        SectionError::Version {
            idstr,
            version: header.version,
            expected: DIRTY_BITMAP_VERSION,
        }
    } else {
        return Ok(());
    };
    Err(DecodeError::new(offset, error))
}

/// Writes into a page what changed in it; nothing, unless all of it is sound.
fn apply_xbzrle(
    encoded: &[u8],
    page: PageAddress,
    store: &dyn PageStore,
    offset: u64,
) -> Result<(), TargetError> {
    let runs = Runs::new(encoded);
    runs.check()
        .map_err(|e| DecodeError::new(offset, RamError::from(e)))?;
    let memory = store.prepare(page.block, page.offset, PAGE_LEN)?;
    for Run { offset, bytes } in runs.flatten() {
        let place = memory
            .subslice(offset, bytes.len())
            .map_err(|_| MemoryError::OutOfBlock {
                name: page.block.to_string(),
                offset: page.offset + offset as u64,
                len: bytes.len(),
                used_length: page.offset + PAGE_SIZE,
            })?;
        place.copy_from(bytes);
    }
    Ok(store.landed(page.block, page.offset, PAGE_LEN)?)
}

impl Loaded {
    /// What came in.
    #[must_use]
    pub const fn received(&self) -> Received {
        self.received
    }

    /// The dirty bitmaps that came with a guest [taken as it is](Target::load_opaque), to be sent on
    /// with it.
    #[must_use]
    pub const fn dirty_bitmaps(&self) -> &BitmapSections {
        &self.bitmaps
    }

    /// The source's configuration, if the stream has one. Where it has a UUID and this side's has
    /// none, nothing was compared, and whoever cares should hear of it.
    #[must_use]
    pub const fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// Tells the source that everything is loaded, if it has opened a return path. From here on the
    /// guest belongs to this side.
    ///
    /// # Errors
    /// The return path's.
    pub fn confirm(&mut self) -> Result<(), TargetError> {
        self.link.send(&ReturnPathMessage::Shut { status: 0 })
    }

    /// Gives the guest back to the source, where it runs on: this side cannot keep it after all.
    pub fn refuse(mut self) {
        self.link.refuse();
    }

    /// What a COLO secondary goes on with: the same stream, which from here on carries checkpoints
    /// and cannot set RAM up again.
    ///
    /// # Errors
    /// The source has not opened a return path, without which there is no COLO.
    pub fn into_checkpoints(self) -> Result<CheckpointReceiver, TargetError> {
        let offset = self.link.reader.offset();
        let missing = |what| TargetError::Missing { what, offset };
        let decoder = self
            .decoder
            .into_checkpoint_decoder()
            .map_err(|e| match e {
                RamError::NotSetUp => missing("a complete RAM section"),
                other => DecodeError::new(offset, other).into(),
            })?;
        let out = self.link.return_path.filter(|_| self.link.open);
        let link = Link {
            return_path: None,
            open: false,
            acks: None,
            postcopy: self.link.postcopy,
            reader: self.link.reader,
        };
        let out = out.ok_or(missing("a return path"))?;
        Ok(CheckpointReceiver { decoder, link, out })
    }
}

/// The receiving side of COLO's checkpoints.
pub struct CheckpointReceiver {
    decoder: CheckpointDecoder,
    link: Link,
    out: Box<dyn ByteSink>,
}

impl CheckpointReceiver {
    /// The main stream, for what is no RAM: messages and device state.
    pub const fn reader(&mut self) -> &mut StreamReader {
        &mut self.link.reader
    }

    /// The return path, which carries no return-path messages any more.
    pub fn out(&mut self) -> &mut dyn ByteSink {
        &mut *self.out
    }

    /// No read or write of the main channel waits longer than until `deadline`.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.link.reader.set_deadline(deadline);
        self.out.set_write_deadline(deadline);
    }

    /// Receives the RAM of one checkpoint, to its EOF, into `store`.
    ///
    /// # Errors
    /// Whatever is wrong with the stream; what was stored until then is part of no checkpoint.
    pub fn receive_ram(
        &mut self,
        store: &dyn PageStore,
        barrier: &mut dyn PageBarrier,
    ) -> Result<Received, TargetError> {
        let begun = self.link.reader.offset();
        let mut received = Received::default();
        let mut pages = Pages { store, barrier };
        loop {
            let offset = self.link.reader.offset();
            let mut r = Reader::new(self.link.reader.buffered(), offset);
            let step = self.decoder.next(&mut r)?;
            let consumed = r.consumed();
            self.link.reader.consume(consumed);
            match step {
                Step::NeedMore { .. } => self.link.fill(MAX_ITEM_LEN)?,
                Step::Item(Item::Ram(item)) => self.link.ram(item, &mut pages, &mut received)?,
                Step::Item(Item::Command(command)) => self.link.command(&command, offset)?,
                Step::Item(Item::Eof) => break,
                Step::Item(_) => {}
            }
        }
        received.bytes = self.link.reader.offset() - begun;
        Ok(received)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("reader", &self.reader)
            .field("return_path", &self.return_path.is_some())
            .field("open", &self.open)
            .finish()
    }
}

impl fmt::Debug for CheckpointReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointReceiver")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}
