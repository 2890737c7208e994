//! The target of a live migration: pages into the store, devices to the VMM, answers on the return
//! path; and what a COLO secondary goes on with after it.
//!
//! [`Target`] walks through the stream. The channel it reads and answers on is `link`'s, what a
//! section holds is read by `pages` or `sections`; [`Loaded`] is what it comes to, and
//! [`CheckpointReceiver`] what may follow.

mod arrived;
mod checkpoints;
mod complete;
mod link;
mod loaded;
mod pages;
mod sections;
mod vm;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

pub use self::arrived::{Arrived, PageIntake, Settled, SettledSecondary};
pub use self::checkpoints::CheckpointReceiver;
pub use self::complete::CheckpointComplete;
use self::link::Link;
pub use self::loaded::Loaded;
use self::pages::Pages;
pub use self::pages::Received;
use self::sections::{Devices, check_bitmap_section};
use self::vm::Collector;
use super::error::TargetError;
use super::switchover_ack::SwitchoverAcks;
use crate::io::ByteSink;
use crate::ram::{BlockId, RamBlockTable};
use crate::raw::decoder::{Item, RamItem, StreamDecoder};
use crate::raw::dirty_bitmap::{BitmapSections, DIRTY_BITMAP_IDSTR};
use crate::raw::early::EarlySections;
use crate::raw::mapped_ram::MappedArea;
use crate::raw::ram::RAM_IDSTR;
use crate::raw::section::{Announcement, Continuation};
use crate::raw::transport::PageBarrier;
use crate::{
    Configuration, DecoderConfig, DeviceState, PageStore, SectionHeader, SectionId, StreamReader,
    Tail, TailLimits,
};

/// What a target expects of a stream, and how much of it.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    decoder: DecoderConfig,
    max_devices: usize,
}

impl TargetConfig {
    /// The longest device section by default, bytes.
    const DEFAULT_MAX_DEVICES: usize = 64 << 20;

    /// Expects a stream that fits `decoder`. A
    /// [`ConfigurationRule::Matching`](crate::ConfigurationRule::Matching) is enough for a source with a current
    /// machine type.
    #[must_use]
    pub fn new(decoder: impl Into<DecoderConfig>) -> Self {
        Self {
            decoder: decoder.into(),
            max_devices: Self::DEFAULT_MAX_DEVICES,
        }
    }

    /// Bounds the state of one device, bytes: a source can make the target keep this much. A longer section
    /// fails the migration. The default is 64 MiB.
    #[must_use]
    pub const fn max_devices(mut self, bytes: usize) -> Self {
        self.max_devices = bytes;
        self
    }
}

/// How long a source is waited for behind the announcement of RAM, where QEMU 10 sends its early sections.
const EARLY_PATIENCE: Duration = Duration::from_millis(200);

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
    /// RAM's END section has begun: what follows stands behind RAM.
    is_behind_ram: bool,
    /// Items that were read to find out whether device sections come before the pages of RAM.
    pending: VecDeque<(Item, u64)>,
    /// Device sections that came before RAM and that nobody has read yet.
    early: EarlySections,
    /// Areas of a file that were announced before there was memory for them.
    mapped: Vec<(BlockId, MappedArea)>,
    link: Link,
    received: Received,
}

impl Target {
    /// A target that fills `store`. The store's blocks are what the source must announce. Messages
    /// of the return path go to `return_path`, once the source has opened it.
    ///
    /// The [token of `reader`](StreamReader::set_cancel), if it has one, ends every wait of this migration up to
    /// [`Settled::confirm`]: those for the channels and on the return path too. The error is then
    /// [`TargetError::Cancelled`].
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
    /// list of its blocks and no further than the first pages, and returns the list. Device sections
    /// before the pages are kept ([`Target::early_sections`]). The store that [`Target::load`] is given has to have
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
                Err(target.link.cause(error))
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
            is_behind_ram: false,
            pending: VecDeque::new(),
            early: EarlySections::new(),
            mapped: Vec::new(),
            link: Link::new(reader, return_path),
            received: Received::default(),
        }
    }

    /// The source's configuration, once it was read.
    #[must_use]
    pub const fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// Whether the source waits for [`Settled::confirm`]: it has opened a return path.
    #[must_use]
    pub const fn has_return_path(&self) -> bool {
        self.link.open
    }

    /// The device sections that came before RAM, as [`Target::from_announcement`] has found them. That
    /// their ends are right is known when [`Target::load_opaque`] returns.
    #[must_use]
    pub const fn early_sections(&self) -> &EarlySections {
        &self.early
    }

    /// Lets the source say nothing for `limit` between two items of the main stream, in place of the
    /// channel's own limit. A source that pauses before the switch-over (the capability
    /// `pause-before-switchover`) says nothing there until its operator lets it go on. Within an item
    /// the channel's limit holds.
    #[must_use]
    pub const fn allowing_pauses_of(mut self, limit: Duration) -> Self {
        self.link.idle = Some(limit);
        self
    }

    /// Lets the source know that this side runs the guest only after [`Settled::confirm`] has returned,
    /// and never if it has not. A source of ours then knows that a connection that this side closed
    /// unconfirmed leaves the guest with the source. QEMU's sources do not ask.
    #[must_use]
    pub const fn confirming_before_it_runs(mut self) -> Self {
        self.link.confirms_first = true;
        self
    }

    /// Synchronises multifd channels as [`DecoderConfig::flush_each_section`] says. For those who
    /// learn the machine type from the stream.
    #[must_use]
    pub fn flushing_each_section(mut self) -> Self {
        self.decoder.flush_each_section();
        // The end of RAM's first section may have been read already.
        let end = Item::Ram(RamItem::EndOfSection);
        if let Some(at) = self.pending.iter().position(|(item, _)| *item == end) {
            let offset = self.pending.get(at).map_or(0, |(_, offset)| *offset);
            let flush = Item::Ram(RamItem::MultifdFlush);
            self.pending.insert(at, (flush, offset));
        }
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

    /// Loads the stream to its end: pages into `pages`, devices into `devices`, where they are staged.
    /// See [`Arrived`] for what is left to do.
    ///
    /// # Errors
    /// Whatever is wrong with the stream; the source is told by a SHUT message if it can be.
    pub fn load<P: PageIntake, D: DeviceState>(
        self,
        mut pages: P,
        devices: &mut D,
    ) -> Result<Arrived<P, D::Staged>, TargetError> {
        let (store, barrier) = pages.parts();
        let (loaded, staged) = self.finish(barrier, |target, barrier| {
            let mut collector = Collector::new(devices);
            let mut known = Devices::Known(&mut collector);
            target.load_early(&mut known)?;
            target.run(&mut Pages { store, barrier }, &mut known)?;
            collector.stage().map_err(|source| TargetError::Vm {
                what: "checking the state of all devices",
                source,
            })
        })?;
        Ok(Arrived {
            loaded,
            pages,
            staged,
        })
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
        self.finish(barrier, |target, barrier| {
            let mut devices = Devices::Opaque(limits);
            let tail = target.run(&mut Pages { store, barrier }, &mut devices)?;
            let offset = target.link.reader.offset();
            let tail = tail.ok_or(TargetError::Missing {
                what: "device sections",
                offset,
            })?;
            target.early.check(tail.description())?;
            Ok(tail)
        })
    }

    fn finish<R>(
        mut self,
        barrier: &mut dyn PageBarrier,
        load: impl FnOnce(&mut Self, &mut dyn PageBarrier) -> Result<R, TargetError>,
    ) -> Result<(Loaded, R), TargetError> {
        if let Some(token) = &self.link.cancel {
            barrier.set_cancel(token);
        }
        match load(&mut self, barrier) {
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
                if self.link.is_cancelled() {
                    return Err(TargetError::Cancelled);
                }
                // A main stream that ended may have been ended because a channel failed.
                let cause = match &error {
                    TargetError::Stream { .. } => barrier.failure().map(TargetError::Transport),
                    _ => None,
                };
                Err(cause.unwrap_or(error))
            }
        }
    }

    /// The next item, and where it began.
    fn item(&mut self) -> Result<(Item, u64), TargetError> {
        match self.pending.pop_front() {
            Some(pending) => Ok(pending),
            None => self.link.item(|r| self.decoder.next(r)),
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
                Item::Ram(RamItem::BlockList(blocks)) => {
                    self.early_behind_blocks()?;
                    return Ok(blocks);
                }
                Item::Section(header) => self.early(header, offset)?,
                Item::Eof | Item::VmDescription { .. } => {
                    let what = "the blocks of ram";
                    return Err(TargetError::Missing { what, offset });
                }
                Item::Header | Item::Footer(_) | Item::Continuation { .. } | Item::Ram(_) => {}
            }
        }
    }

    /// Reads on to the first item that belongs to the pages of RAM, or as far as the source goes on by itself: one
    /// whose channels are not read yet may say nothing more before they are.
    fn early_behind_blocks(&mut self) -> Result<(), TargetError> {
        loop {
            let is_behind_start = matches!(
                self.pending.back(),
                Some((Item::Footer(_) | Item::Ram(RamItem::EndOfSection), _))
            );
            if is_behind_start && !self.link.goes_on(EARLY_PATIENCE)? {
                return Ok(());
            }
            let (item, offset) = self.link.item(|r| self.decoder.next(r))?;
            match item {
                Item::Section(header)
                    if header.kind == Announcement::Full
                        && header.idstr.as_str() != DIRTY_BITMAP_IDSTR =>
                {
                    self.early(header, offset)?;
                }
                Item::Footer(_) | Item::Ram(RamItem::MultifdFlush | RamItem::EndOfSection) => {
                    self.pending.push_back((item, offset));
                }
                other => {
                    self.pending.push_back((other, offset));
                    return Ok(());
                }
            }
        }
    }

    /// A section before RAM, that begins at `offset` and that nobody here knows.
    fn early(&mut self, header: SectionHeader, offset: u64) -> Result<(), TargetError> {
        let is_device = header.kind == Announcement::Full && self.config.decoder.has_footers();
        if !is_device || header.idstr.as_str() == DIRTY_BITMAP_IDSTR {
            let idstr = header.idstr.as_str().into();
            return Err(TargetError::BeforeRam { idstr, offset });
        }
        let limit = self.config.max_devices;
        self.link
            .early(header, &mut self.early, self.ram_section, limit)
    }

    /// Shows the VMM what came before RAM while nobody knew the devices.
    fn load_early(&mut self, devices: &mut Devices<'_>) -> Result<(), TargetError> {
        let Devices::Known(vm) = devices else {
            return Ok(());
        };
        for section in std::mem::take(&mut self.early).sections() {
            let loaded = vm.load(&section.header, section.body);
            let source = match loaded {
                Ok(Some(len)) if len == section.body.len() => continue,
                Ok(Some(len)) => format!("took {len} bytes of {}", section.body.len()).into(),
                Ok(None) => {
                    format!("wants more than the {} bytes it has", section.body.len()).into()
                }
                Err(source) => source,
            };
            return Err(TargetError::Device {
                idstr: section.header.idstr.as_str().into(),
                instance: section.header.instance.0,
                offset: self.link.reader.offset(),
                source,
            });
        }
        Ok(())
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
                        Devices::Opaque(_) if !self.is_behind_ram => {
                            self.early(header, offset)?;
                        }
                        Devices::Opaque(limits) => {
                            let early = self.early.len();
                            tail = Some(self.link.tail(&header, *limits, early)?);
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
                    self.is_behind_ram |= kind == Continuation::End && self.ram_section == Some(id);
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
