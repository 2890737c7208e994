//! The main stream, item by item, without I/O.
//!
//! A driver owns the buffer. It shows the decoder what it has as a [`Reader`], which also carries
//! the offset in the stream, drops what the decoder read of it, and acts on the [`Item`]:
//!
//! ```text
//! loop {
//!     let mut r = Reader::new(buffered, offset);
//!     let step = decoder.next(&mut r)?;
//!     drop the first r.consumed() bytes of the buffer
//!     match step { Step::NeedMore { .. } => read, Step::Item(item) => act }
//! }
//! ```
//!
//! Payloads never pass through the decoder, so that they can go straight to where they belong:
//!
//! | after | the driver takes |
//! |---|---|
//! | [`RamItem::Xbzrle`] | `len` bytes |
//! | [`RamItem::Page`] | [`PAGE_SIZE`](crate::PAGE_SIZE) bytes |
//! | [`RamItem::MappedBlock`] | what the file has up to the [end of the area](MappedArea::end) |
//! | [`Item::Section`], [`Item::Continuation`] of `dirty-bitmap` | the body, which a [`DirtyBitmapDecoder`](crate::raw::dirty_bitmap::DirtyBitmapDecoder) finds the end of |
//! | [`Item::VmDescription`] | `len` bytes |
//! | [`Command::Packaged`] | `size` bytes, which a [`PackageDecoder`](crate::raw::postcopy::PackageDecoder) reads |
//! | [`Item::Section`], [`Item::Continuation`] of anything but RAM | the section's body, whose length only its handler knows |
//!
//! and calls `next` again with the bytes after that. The offsets of a stream with `mapped-ram` are
//! those in its file, wherever in it the stream begins.
//!
//! Which command of postcopy may come when is checked by a
//! [`PostcopyOrder`](crate::raw::postcopy::PostcopyOrder), which also knows whether a description follows.
//!
//! A COLO checkpoint's RAM is read by a [`CheckpointDecoder`], which is what a [`StreamDecoder`]
//! becomes. It has no way to set RAM up: that this cannot happen once COLO was entered is not a
//! check but a property of the type.

use std::collections::HashMap;

use crate::error::{Cause, DecodeError};
use crate::ram::{BlockId, RamBlockTable};
use crate::raw::codec::Reader;
use crate::raw::command::Command;
use crate::raw::header;
use crate::raw::mapped_ram::MappedArea;
use crate::raw::ram::{
    PageAddress, RAM_IDSTR, RAM_VERSION, RamError, Record, RecordDecoder, SetupDecoder,
    SetupFields, check_announced, find_announced,
};
use crate::raw::section::{Announcement, Continuation, SectionError, SectionType, decode_footer};
use crate::{Configuration, ConfigurationError, InstanceId, SectionHeader, SectionId};

/// The most bytes that [`StreamDecoder::next`] needs to see at once: those of the longest command.
pub const MAX_ITEM_LEN: usize = 5 + u16::MAX as usize;

/// More sections than any machine has; it bounds what a hostile peer can make us remember.
pub const MAX_SECTIONS: usize = 4096;

/// What a [`StreamDecoder`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// Magic and version were right.
    Header,
    /// The configuration section, which the decoder's [`ConfigurationRule`] accepts.
    Configuration(Configuration),
    /// A command.
    Command(Command),
    /// A START or FULL section begins. RAM items or the body follow, then [`Item::Footer`].
    Section(SectionHeader),
    /// A PART or END section of an announced id begins. RAM items or the body follow, then
    /// [`Item::Footer`].
    Continuation {
        /// Which of the two.
        kind: Continuation,
        /// The section.
        id: SectionId,
    },
    /// Inside a RAM section.
    Ram(RamItem),
    /// The open section ended with its own footer. Absent from streams without footers.
    Footer(SectionId),
    /// The section loop ended.
    Eof,
    /// `len` bytes of JSON follow. It is the last item.
    VmDescription {
        /// Length in bytes, within the decoder's limit.
        len: u32,
    },
}

/// What stands in a RAM section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RamItem {
    /// The blocks as the source has them, in its order; they are those of this side.
    BlockList(RamBlockTable),
    /// With `mapped-ram`, once for each block, before the list: its pages are in this area of the
    /// file, and the stream goes on [behind it](MappedArea::end).
    MappedBlock {
        /// The block, of this side's table; of the announced one where there is none.
        block: BlockId,
        /// Where its pages are.
        area: MappedArea,
    },
    /// A page, whose bytes follow.
    Page(PageAddress),
    /// A page that is all zero.
    Zero(PageAddress),
    /// A page as its difference to the one that was sent before it; `len` bytes follow, which
    /// [`crate::raw::xbzrle::Runs`] reads.
    Xbzrle {
        /// The page.
        page: PageAddress,
        /// Length of what follows, at most [`PAGE_SIZE`](crate::PAGE_SIZE).
        len: u16,
    },
    /// The pages of all multifd channels up to their SYNC packet come before what follows.
    MultifdFlush,
    /// The section's body ends.
    EndOfSection,
}

/// What came of a look at the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An item was read.
    Item(Item),
    /// The next item is not there in full. What the reader has consumed is done with all the same.
    NeedMore {
        /// How many bytes are missing at least.
        at_least: usize,
    },
}

/// What is to stand between the header and the sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigurationRule {
    /// No configuration section (the property `send-configuration` is off).
    Absent,
    /// Any valid one, for tools.
    Any,
    /// Any valid one, or none, whichever the stream has: for tools that read what others have set up.
    AnyOrAbsent,
    /// One that [`Configuration::check`] accepts.
    Matching(Configuration),
}

/// What both sides of a stream agree on beforehand.
///
/// A [`ConfigurationRule`] alone is one for the stream of a current machine type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecoderConfig {
    configuration: ConfigurationRule,
    footers: bool,
    max_description: u32,
    xbzrle: bool,
    flush_each_section: bool,
}

impl DecoderConfig {
    /// QEMU's own tools look for the description in the last 10 MiB of a file.
    pub const DEFAULT_MAX_DESCRIPTION: u32 = 10 << 20;

    /// A stream as every current machine type sends it, with this configuration section.
    #[must_use]
    pub const fn new(configuration: ConfigurationRule) -> Self {
        Self {
            configuration,
            footers: true,
            max_description: Self::DEFAULT_MAX_DESCRIPTION,
            xbzrle: false,
            flush_each_section: false,
        }
    }

    /// Sets whether sections end with footers (the property `send-section-footer`). A stream that differs is
    /// refused at its first section. The default is `true`, as all machine types since 2.4 have it.
    #[must_use]
    pub const fn footers(mut self, footers: bool) -> Self {
        self.footers = footers;
        self
    }

    /// Bounds the description of the device sections, bytes. A longer one is refused before memory is taken for
    /// it. The default is 10 MiB.
    #[must_use]
    pub const fn max_description(mut self, bytes: u32) -> Self {
        self.max_description = bytes;
        self
    }

    /// Sets whether pages may come as differences (the capability `xbzrle`). No checkpoint can follow such a
    /// stream. The default is `false`: a difference is refused.
    #[must_use]
    pub const fn xbzrle(mut self, xbzrle: bool) -> Self {
        self.xbzrle = xbzrle;
        self
    }

    /// Sets whether multifd channels are synchronised at the end of every RAM section instead of where the
    /// stream has MULTIFD_FLUSH (machine types up to 8.0, `multifd-flush-after-each-section`). The decoder
    /// reports [`RamItem::MultifdFlush`] there. With the wrong setting pages can be loaded out of order. The
    /// default is `false`.
    #[must_use]
    pub const fn flush_each_section(mut self, each: bool) -> Self {
        self.flush_each_section = each;
        self
    }

    /// Returns whether sections end with footers.
    pub(crate) const fn has_footers(&self) -> bool {
        self.footers
    }
}

impl From<ConfigurationRule> for DecoderConfig {
    fn from(rule: ConfigurationRule) -> Self {
        Self::new(rule)
    }
}

/// Decodes a main stream from its header to the end of its description.
#[derive(Debug)]
pub struct StreamDecoder {
    configuration: ConfigurationRule,
    max_description: u32,
    phase: Phase,
    fields: SetupFields,
    setup: Setup,
    sections: Sections,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Header,
    Configuration,
    Sections,
    Description,
    Ended,
}

/// How far RAM set-up is.
#[derive(Debug)]
enum Setup {
    /// No block list yet; the blocks of this side, or any.
    Wanted(Option<RamBlockTable>),
    /// In the middle of the list.
    Listing {
        list: SetupDecoder,
        local: Option<RamBlockTable>,
    },
    /// The blocks of this side.
    Done(RamBlockTable),
}

impl StreamDecoder {
    /// For the stream of a VM whose RAM is `blocks`. With `None` whatever the stream announces is
    /// taken, which is for tools that have no memory to fill.
    #[must_use]
    pub fn new(config: DecoderConfig, blocks: Option<RamBlockTable>) -> Self {
        Self {
            configuration: config.configuration,
            max_description: config.max_description,
            phase: Phase::Header,
            fields: SetupFields::default(),
            setup: Setup::Wanted(blocks),
            sections: Sections {
                footers: config.footers,
                announced: HashMap::new(),
                records: RecordDecoder::with_xbzrle(config.xbzrle),
                flush_each_section: config.flush_each_section,
                end_due: false,
                open: Open::Nothing,
            },
        }
    }

    /// From here on as [`DecoderConfig::flush_each_section`] says.
    pub(crate) const fn flush_each_section(&mut self) {
        self.sections.flush_each_section = true;
    }

    /// The blocks that the addresses of pages refer to: those given, or else those announced.
    #[must_use]
    pub const fn blocks(&self) -> Option<&RamBlockTable> {
        match &self.setup {
            Setup::Done(blocks) => Some(blocks),
            Setup::Wanted(blocks) | Setup::Listing { local: blocks, .. } => blocks.as_ref(),
        }
    }

    /// The connection broke in postcopy, and there is a new one: no header, but a command or a
    /// section comes next, wherever the old one ended. The ids that were announced stand for what
    /// they did; the block of the first page is named again.
    ///
    /// # Errors
    /// [`RamError::NotSetUp`]: the old connection had not got beyond the set-up of RAM.
    pub const fn reconnected(&mut self) -> Result<(), RamError> {
        if !matches!((self.phase, &self.setup), (Phase::Sections, Setup::Done(_))) {
            return Err(RamError::NotSetUp);
        }
        self.sections.open = Open::Nothing;
        self.sections.end_due = false;
        self.sections.records.reconnected();
        Ok(())
    }

    /// Reads the next item from the front of `r`.
    ///
    /// # Errors
    /// [`DecodeError`]. The stream cannot be gone on with.
    pub fn next(&mut self, r: &mut Reader<'_>) -> Result<Step, DecodeError> {
        loop {
            let mut attempt = r.clone();
            match self.attempt(&mut attempt) {
                Ok(item) => {
                    *r = attempt;
                    if let Some(item) = item {
                        return Ok(Step::Item(item));
                    }
                }
                Err(e) => return need_more(e),
            }
        }
    }

    /// One item, or one step towards it. Where bytes are missing the state stays as it was.
    fn attempt(&mut self, r: &mut Reader<'_>) -> Result<Option<Item>, DecodeError> {
        match self.phase {
            Phase::Header => {
                header::decode(r)?;
                self.phase = match self.configuration {
                    ConfigurationRule::Absent => Phase::Sections,
                    ConfigurationRule::Any
                    | ConfigurationRule::AnyOrAbsent
                    | ConfigurationRule::Matching(_) => Phase::Configuration,
                };
                Ok(Some(Item::Header))
            }
            Phase::Configuration => {
                let at = r.clone();
                let found = r.u8()?;
                if found != SectionType::Configuration.byte() {
                    if self.configuration == ConfigurationRule::AnyOrAbsent {
                        *r = at;
                        self.phase = Phase::Sections;
                        return Ok(None);
                    }
                    return Err(at.error(ConfigurationError::Missing { found }));
                }
                let configuration = match &self.configuration {
                    ConfigurationRule::Matching(local) => Configuration::decode_matching(r, local)?,
                    ConfigurationRule::Any
                    | ConfigurationRule::AnyOrAbsent
                    | ConfigurationRule::Absent => Configuration::decode(r)?,
                };
                self.phase = Phase::Sections;
                self.fields = SetupFields::of(&configuration);
                if self.fields.mapped_ram {
                    self.sections.records.refuse_pages();
                }
                Ok(Some(Item::Configuration(configuration)))
            }
            Phase::Sections => self.section_loop(r),
            Phase::Description => {
                let at = r.clone();
                let found = r.u8()?;
                if found != SectionType::VmDescription.byte() {
                    return Err(at.error(SectionError::UnexpectedType { found }));
                }
                let len = r.be32()?;
                if len > self.max_description {
                    let max = self.max_description;
                    return Err(at.error(SectionError::DescriptionLength { len, max }));
                }
                self.phase = Phase::Ended;
                Ok(Some(Item::VmDescription { len }))
            }
            Phase::Ended => Err(r.error(SectionError::AfterEnd)),
        }
    }

    fn section_loop(&mut self, r: &mut Reader<'_>) -> Result<Option<Item>, DecodeError> {
        if matches!(self.sections.open, Open::Ram(_)) {
            return self.ram(r);
        }
        if let Some(item) = self.sections.footer(r)? {
            return Ok(Some(item));
        }
        let at = r.clone();
        let item = match section_type(r)? {
            SectionType::Start => self.announce(Announcement::Start, r)?,
            SectionType::Full => self.announce(Announcement::Full, r)?,
            other => self.sections.common(other, r, &at)?,
        };
        if let Item::Command(Command::PostcopyAdvise(Some(advice))) = &item {
            self.fields.page_sizes = advice.ram_page_sizes;
        }
        if item == Item::Eof {
            self.phase = Phase::Description;
        }
        Ok(Some(item))
    }

    fn announce(&mut self, kind: Announcement, r: &mut Reader<'_>) -> Result<Item, DecodeError> {
        let at = r.clone();
        let header = SectionHeader::decode(kind, r)?;
        let is_ram = header.idstr.as_str() == RAM_IDSTR;
        if is_ram && header.instance != InstanceId(0) {
            return Err(at.error(SectionError::Instance {
                idstr: header.idstr,
                instance: header.instance,
            }));
        }
        if is_ram && header.version != RAM_VERSION {
            return Err(at.error(SectionError::Version {
                idstr: header.idstr,
                version: header.version,
                expected: RAM_VERSION,
            }));
        }
        if is_ram && !matches!(self.setup, Setup::Wanted(_)) {
            return Err(at.error(RamError::UnexpectedSetup));
        }
        let announced = &mut self.sections.announced;
        if announced.contains_key(&header.id) {
            let (id, idstr) = (header.id, header.idstr);
            return Err(at.error(SectionError::AnnouncedTwice { id, idstr }));
        }
        if announced.len() == MAX_SECTIONS {
            return Err(at.error(SectionError::TooMany { max: MAX_SECTIONS }));
        }
        let body = if is_ram { Body::Ram } else { Body::Device };
        announced.insert(header.id, body);
        self.sections.open(header.id, body);
        Ok(Item::Section(header))
    }

    fn ram(&mut self, r: &mut Reader<'_>) -> Result<Option<Item>, DecodeError> {
        let at = r.clone();
        if let Some(item) = self.sections.due_end() {
            return Ok(Some(item));
        }
        match &mut self.setup {
            Setup::Done(blocks) => {
                let record = self.sections.records.decode(r, blocks)?;
                match self.sections.ram_item(record) {
                    Some(item) => Ok(Some(item)),
                    None => Err(at.error(RamError::UnexpectedSetup)),
                }
            }
            Setup::Wanted(local) => {
                // Nothing but the list is valid here, so that no block need be known yet.
                let list = SetupDecoder::begin(r, self.fields)?;
                self.setup = Setup::Listing {
                    list,
                    local: local.take(),
                };
                Ok(None)
            }
            Setup::Listing { list, local } => {
                if !list.is_complete() {
                    let entry = list.entry(r)?;
                    let block = match local {
                        Some(local) => {
                            find_announced(local, entry.block).map_err(|e| at.error(e))?
                        }
                        None => entry.index,
                    };
                    return Ok(entry.area.map(|area| {
                        // Nothing but the blocks that both sides share has no area.
                        Item::Ram(RamItem::MappedBlock { block, area })
                    }));
                }
                let announced = list.finish().map_err(|e| at.error(e))?;
                if let Some(local) = local {
                    check_announced(local, &announced).map_err(|e| at.error(e))?;
                }
                let blocks = local.take().unwrap_or_else(|| announced.clone());
                self.setup = Setup::Done(blocks);
                Ok(Some(Item::Ram(RamItem::BlockList(announced))))
            }
        }
    }

    /// The decoder of what a COLO primary sends in its checkpoints, after the stream it began with.
    ///
    /// The stream need not have been decoded to its end here (a driver may take the device sections
    /// as a whole), but its RAM must have been.
    ///
    /// # Errors
    /// [`RamError::NotSetUp`]: RAM was not set up, or its section is still open.
    /// [`RamError::XbzrleWithCheckpoints`]: the stream may have had encoded pages.
    pub fn into_checkpoint_decoder(self) -> Result<CheckpointDecoder, RamError> {
        if self.sections.records.takes_xbzrle() {
            return Err(RamError::XbzrleWithCheckpoints);
        }
        match (self.setup, self.sections.open) {
            (Setup::Done(_), Open::Ram(_)) | (Setup::Wanted(_) | Setup::Listing { .. }, _) => {
                Err(RamError::NotSetUp)
            }
            (Setup::Done(blocks), _) => Ok(CheckpointDecoder {
                blocks,
                sections: Sections {
                    open: Open::Nothing,
                    ..self.sections
                },
            }),
        }
    }
}

/// Decodes the RAM of COLO checkpoints: sections without header and description, of the ids that
/// the main stream announced, up to EOF; after EOF the next checkpoint's may follow.
///
/// Of the [`Item`]s there are commands (QEMU before 11.0 sends SWITCHOVER_START), continuations,
/// RAM items without a block list, footers and EOF.
#[derive(Debug)]
pub struct CheckpointDecoder {
    blocks: RamBlockTable,
    sections: Sections,
}

impl CheckpointDecoder {
    /// The blocks that the addresses of pages refer to.
    #[must_use]
    pub const fn blocks(&self) -> &RamBlockTable {
        &self.blocks
    }

    /// Reads the next item from the front of `r`.
    ///
    /// # Errors
    /// [`DecodeError`]; a START or FULL section and a block list are errors. The stream cannot be
    /// gone on with.
    pub fn next(&mut self, r: &mut Reader<'_>) -> Result<Step, DecodeError> {
        let mut attempt = r.clone();
        match self.attempt(&mut attempt) {
            Ok(item) => {
                *r = attempt;
                Ok(Step::Item(item))
            }
            Err(e) => need_more(e),
        }
    }

    fn attempt(&mut self, r: &mut Reader<'_>) -> Result<Item, DecodeError> {
        let at = r.clone();
        if let Some(item) = self.sections.due_end() {
            return Ok(item);
        }
        if matches!(self.sections.open, Open::Ram(_)) {
            let record = self.sections.records.decode(r, &self.blocks)?;
            return self
                .sections
                .ram_item(record)
                .ok_or_else(|| at.error(RamError::UnexpectedSetup));
        }
        if let Some(item) = self.sections.footer(r)? {
            return Ok(item);
        }
        let kind = match section_type(r)? {
            SectionType::Start => Announcement::Start,
            SectionType::Full => Announcement::Full,
            other => return self.sections.common(other, r, &at),
        };
        let SectionHeader { id, idstr, .. } = SectionHeader::decode(kind, r)?;
        Err(at.error(SectionError::AnnouncedInCheckpoint { id, idstr }))
    }
}

/// What a section id stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Ram,
    Device,
}

/// What of a section was read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Nothing,
    /// In the body of RAM.
    Ram(SectionId),
    /// The body is the driver's, or is over: the footer is next.
    Footer(SectionId),
}

/// What both decoders know of the stream's sections.
#[derive(Debug)]
struct Sections {
    footers: bool,
    announced: HashMap<SectionId, Body>,
    records: RecordDecoder,
    flush_each_section: bool,
    /// The end of the body was read, and the flush that goes before it reported.
    end_due: bool,
    open: Open,
}

impl Sections {
    fn open(&mut self, id: SectionId, body: Body) {
        self.open = match body {
            Body::Ram => Open::Ram(id),
            Body::Device => self.awaiting_footer(id),
        };
    }

    const fn awaiting_footer(&self, id: SectionId) -> Open {
        if self.footers {
            Open::Footer(id)
        } else {
            Open::Nothing
        }
    }

    /// The footer, if one is due.
    fn footer(&mut self, r: &mut Reader<'_>) -> Result<Option<Item>, DecodeError> {
        let Open::Footer(id) = self.open else {
            return Ok(None);
        };
        decode_footer(id, r)?;
        self.open = Open::Nothing;
        Ok(Some(Item::Footer(id)))
    }

    /// What stands in the section loop of a stream and of a checkpoint alike. `at` is where its
    /// type byte was.
    fn common(
        &mut self,
        section: SectionType,
        r: &mut Reader<'_>,
        at: &Reader<'_>,
    ) -> Result<Item, DecodeError> {
        match section {
            SectionType::Part => self.continuation(Continuation::Part, r, at),
            SectionType::End => self.continuation(Continuation::End, r, at),
            SectionType::Command => Command::decode(r).map(Item::Command),
            SectionType::Eof => Ok(Item::Eof),
            SectionType::Start
            | SectionType::Full
            | SectionType::Subsection
            | SectionType::VmDescription
            | SectionType::Configuration
            | SectionType::Footer => Err(at.error(SectionError::UnexpectedType {
                found: section.byte(),
            })),
        }
    }

    fn continuation(
        &mut self,
        kind: Continuation,
        r: &mut Reader<'_>,
        at: &Reader<'_>,
    ) -> Result<Item, DecodeError> {
        let id = SectionId(r.be32()?);
        match self.announced.get(&id) {
            Some(body) => {
                self.open(id, *body);
                Ok(Item::Continuation { kind, id })
            }
            None => Err(at.error(SectionError::NotAnnounced { id })),
        }
    }

    /// The item of a record in the open RAM section; `None` for a block list.
    fn ram_item(&mut self, record: Record) -> Option<Item> {
        Some(Item::Ram(match record {
            Record::MemSize { .. } => return None,
            Record::Page(page) => RamItem::Page(page),
            Record::Zero(page) => RamItem::Zero(page),
            Record::Xbzrle { page, len } => RamItem::Xbzrle { page, len },
            Record::MultifdFlush => RamItem::MultifdFlush,
            Record::EndOfSection if self.flush_each_section => {
                self.end_due = true;
                RamItem::MultifdFlush
            }
            Record::EndOfSection => return Some(self.end_of_body()),
        }))
    }

    /// The end of a body whose flush was reported.
    fn due_end(&mut self) -> Option<Item> {
        std::mem::take(&mut self.end_due).then(|| self.end_of_body())
    }

    fn end_of_body(&mut self) -> Item {
        if let Open::Ram(id) = self.open {
            self.open = self.awaiting_footer(id);
        }
        Item::Ram(RamItem::EndOfSection)
    }
}

fn section_type(r: &mut Reader<'_>) -> Result<SectionType, DecodeError> {
    let at = r.clone();
    let found = r.u8()?;
    SectionType::from_byte(found).ok_or_else(|| at.error(SectionError::UnexpectedType { found }))
}

fn need_more(e: DecodeError) -> Result<Step, DecodeError> {
    match e.cause {
        Cause::Truncated { needed } => Ok(Step::NeedMore { at_least: needed }),
        _ => Err(e),
    }
}
