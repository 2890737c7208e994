//! From a stream's first byte to its last.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::codec::Reader;
use migration_stream::command::{Command, CommandNumber};
use migration_stream::configuration::Configuration;
use migration_stream::decoder::{
    ConfigurationRule, DecoderConfig, Item, MAX_ITEM_LEN, RamItem, Step, StreamDecoder,
};
use migration_stream::dirty_bitmap::{DIRTY_BITMAP_IDSTR, DirtyBitmapDecoder};
use migration_stream::io::PositionedFile;
use migration_stream::mapped_ram::MappedArea;
use migration_stream::opaque_tail::{Fed, OpaqueTail, Tail, TailError, TailLimits};
use migration_stream::ram::{BlockId, PageAddress, RAM_IDSTR, RamBlockTable};
use migration_stream::section::{
    Announcement, Continuation, SectionHeader, SectionId, SectionType,
};
use migration_stream::vmdesc::VmDescription;
use migration_stream::{Cause, DecodeError, PAGE_SIZE, StreamReader};

use crate::extract::{Extract, ExtractError};
use crate::inspection::{Block, Commands, Device, Extent, Inspection, Part, Section};
use crate::pages::PageSet;

const PAGE_LEN: usize = 4096;
/// How much of a bitmap is read at once, bytes.
const BITMAP_PIECE: usize = 64 << 10;
/// How often whoever watches is told how far it is, bytes.
const TOLD_EACH: u64 = 4 << 20;

/// Where a stream comes from, beside its bytes.
pub trait Origin {
    /// A command has come.
    ///
    /// # Errors
    /// It cannot be answered, or not here.
    fn command(&mut self, command: &Command) -> Result<(), ScanError>;

    /// The list of RAM blocks has come, and pages follow.
    ///
    /// # Errors
    /// The stream is not wanted.
    fn announced(
        &mut self,
        configuration: Option<&Configuration>,
        blocks: &RamBlockTable,
    ) -> Result<(), ScanError>;

    /// The pages of all channels up to here come before what follows.
    ///
    /// # Errors
    /// A channel broke.
    fn flush(&mut self) -> Result<(), ScanError>;

    /// Whether [`Origin::flush`] is due at the end of every RAM section.
    fn flushes_each_section(&self) -> bool {
        false
    }

    /// All of RAM has come: what of it crossed beside the stream.
    ///
    /// # Errors
    /// A channel broke.
    fn beside(&mut self) -> Result<Beside, ScanError>;

    /// The file, if it is one.
    fn file(&self) -> Option<&Arc<dyn PositionedFile>>;
}

/// What crossed beside the stream.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// Bytes on all channels.
    pub bytes: u64,
    /// Pages of each block.
    pub blocks: Vec<BesideBlock>,
}

/// What of a block crossed beside the stream.
#[derive(Clone, Debug, Default)]
pub struct BesideBlock {
    /// Pages with content, as often as they came.
    pub normal: u64,
    /// Pages that are zero, as often as they came.
    pub zero: u64,
    /// Which.
    pub unique: PageSet,
}

/// A stream in a file.
pub struct FileOrigin(Arc<dyn PositionedFile>);

impl FileOrigin {
    /// The stream that begins at byte `offset` of `file`.
    #[must_use]
    pub fn open(file: Arc<dyn PositionedFile>, offset: u64) -> (Self, StreamReader) {
        let reader = StreamReader::from_file(Arc::clone(&file), offset);
        (Self(file), reader)
    }
}

impl std::fmt::Debug for FileOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileOrigin").finish_non_exhaustive()
    }
}

impl Origin for FileOrigin {
    fn command(&mut self, _command: &Command) -> Result<(), ScanError> {
        Ok(())
    }

    fn announced(
        &mut self,
        _configuration: Option<&Configuration>,
        _blocks: &RamBlockTable,
    ) -> Result<(), ScanError> {
        Ok(())
    }

    /// In a file with mapped-ram pages have their places; in another one there are none on channels.
    fn flush(&mut self) -> Result<(), ScanError> {
        Ok(())
    }

    fn beside(&mut self) -> Result<Beside, ScanError> {
        Ok(Beside::default())
    }

    fn file(&self) -> Option<&Arc<dyn PositionedFile>> {
        Some(&self.0)
    }
}

/// Reads a stream to its end. RAM goes into `extract`, if there is one; `progress` is told the
/// offset from time to time.
///
/// # Errors
/// [`ScanError`].
pub fn scan(
    reader: StreamReader,
    origin: &mut dyn Origin,
    extract: Option<&mut Extract>,
    progress: &mut dyn FnMut(u64),
) -> Result<Inspection, ScanError> {
    let config = DecoderConfig {
        xbzrle: true,
        ..DecoderConfig::new(ConfigurationRule::Any)
    };
    let meter = Meter::new(reader.offset());
    let scan = Scan {
        reader,
        origin,
        extract,
        progress,
        told: 0,
        meter,
        found: Inspection::default(),
        unique: Vec::new(),
        areas: Vec::new(),
        ram: Ram::Unknown,
        bitmap_section: None,
        bitmap_decoder: DirtyBitmapDecoder::new(),
    };
    scan.run(StreamDecoder::new(config, None))
}

/// How far RAM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ram {
    Unknown,
    Open(SectionId),
    Ended,
}

struct Scan<'a> {
    reader: StreamReader,
    origin: &'a mut dyn Origin,
    extract: Option<&'a mut Extract>,
    progress: &'a mut dyn FnMut(u64),
    told: u64,
    meter: Meter,
    found: Inspection,
    /// The pages of each block.
    unique: Vec<PageSet>,
    /// Of blocks whose names have not come.
    areas: Vec<(BlockId, MappedArea)>,
    ram: Ram,
    /// The section of dirty bitmaps, once it was announced.
    bitmap_section: Option<SectionId>,
    bitmap_decoder: DirtyBitmapDecoder,
}

impl Scan<'_> {
    fn run(mut self, mut decoder: StreamDecoder) -> Result<Inspection, ScanError> {
        loop {
            let offset = self.reader.offset();
            let mut r = Reader::new(self.reader.buffered(), offset);
            let step = decoder.next(&mut r)?;
            let consumed = r.consumed();
            self.reader.consume(consumed);
            match step {
                Step::NeedMore { .. } => self.fill()?,
                Step::Item(Item::Ram(item)) => self.ram_item(item, offset)?,
                Step::Item(Item::Header) => {}
                Step::Item(Item::Configuration(configuration)) => {
                    self.found.configuration = Some(configuration);
                }
                Step::Item(Item::Command(command)) => {
                    self.meter.turn(Part::Commands, offset);
                    self.command(&command)?;
                }
                Step::Item(Item::Section(header)) if header.idstr.as_str() == RAM_IDSTR => {
                    self.meter.turn(Part::Setup, offset);
                    self.ram = Ram::Open(header.id);
                    self.found.ram_sections += 1;
                    self.found.sections.push(Section::Ram(header.id));
                }
                Step::Item(Item::Section(header))
                    if header.idstr.as_str() == DIRTY_BITMAP_IDSTR
                        && header.kind == Announcement::Start =>
                {
                    self.meter.turn(Part::Bitmaps, offset);
                    self.bitmap_section = Some(header.id);
                    self.bitmaps()?;
                }
                Step::Item(Item::Continuation { id, .. }) if self.bitmap_section == Some(id) => {
                    self.meter.turn(Part::Bitmaps, offset);
                    self.bitmaps()?;
                }
                Step::Item(Item::Section(header)) => {
                    self.meter.turn(Part::Devices, offset);
                    if self.ram == Ram::Ended && header.kind == Announcement::Full {
                        return self.tail(&header, offset);
                    }
                    self.early(header, offset)?;
                }
                Step::Item(Item::Continuation { kind, id }) => {
                    if self.ram != Ram::Open(id) {
                        return Err(ScanError::Unknown { id, offset });
                    }
                    self.meter.turn(Part::Pages, offset);
                    self.found.ram_sections += 1;
                    if kind == Continuation::End {
                        self.ram = Ram::Ended;
                    }
                }
                Step::Item(Item::Footer(_)) => {}
                // RAM alone, as nothing but a test has it.
                Step::Item(Item::Eof) => {
                    self.meter.turn(Part::Devices, offset);
                    return self.finish();
                }
                Step::Item(Item::VmDescription { .. }) => return self.finish(),
            }
        }
    }

    fn finish(mut self) -> Result<Inspection, ScanError> {
        self.meter.turn(Part::Configuration, self.reader.offset());
        self.found.parts = self.meter.extents;
        let beside = self.origin.beside()?;
        if let Some(pages) = self.found.parts.get_mut(Part::Pages as usize) {
            pages.bytes += beside.bytes;
        }
        let blocks = self.found.blocks.iter_mut().zip(&mut self.unique);
        let mut beside = beside.blocks.into_iter();
        for (block, unique) in blocks {
            if let Some(beside) = beside.next() {
                block.normal += beside.normal;
                block.zero += beside.zero;
                unique.extend(&beside.unique);
            }
            block.unique = unique.len();
        }
        if let Some(extract) = self.extract {
            extract.finish()?;
        }
        Ok(self.found)
    }

    fn fill(&mut self) -> Result<(), ScanError> {
        let offset = self.reader.offset();
        if offset.abs_diff(self.told) >= TOLD_EACH {
            self.told = offset;
            (self.progress)(offset);
        }
        self.reader
            .fill(MAX_ITEM_LEN)
            .map_err(|source| ScanError::Stream { offset, source })
    }

    fn skip(&mut self, mut len: usize) -> Result<(), ScanError> {
        loop {
            let here = len.min(self.reader.buffered().len());
            self.reader.consume(here);
            len -= here;
            if len == 0 {
                return Ok(());
            }
            self.fill()?;
        }
    }

    /// The body of a section of dirty bitmaps, whose bits are passed over.
    fn bitmaps(&mut self) -> Result<(), ScanError> {
        loop {
            let mut r = Reader::new(self.reader.buffered(), self.reader.offset());
            match self.bitmap_decoder.next(&mut r) {
                Ok(chunk) => {
                    let consumed = r.consumed();
                    self.reader.consume(consumed);
                    if chunk.is_last {
                        break;
                    }
                }
                Err(e) if matches!(e.cause, Cause::Truncated { .. }) => self.fill()?,
                Err(e) => return Err(e.into()),
            }
        }
        self.found.bitmaps = self.bitmap_decoder.bitmaps().to_vec();
        Ok(())
    }

    fn command(&mut self, command: &Command) -> Result<(), ScanError> {
        let number = command.number();
        let commands = &mut self.found.commands;
        match commands.iter_mut().find(|c| c.number == number) {
            Some(known) => known.count += 1,
            None => commands.push(Commands { number, count: 1 }),
        }
        if number == CommandNumber::Packaged {
            // Postcopy: what is in there is a stream of its own, and pages follow on request.
            return Err(ScanError::Postcopy {
                offset: self.reader.offset(),
            });
        }
        self.origin.command(command)
    }

    fn ram_item(&mut self, item: RamItem, offset: u64) -> Result<(), ScanError> {
        match item {
            RamItem::BlockList(table) => self.announced(&table)?,
            RamItem::MappedBlock { block, area } => {
                self.meter.turn(Part::Pages, self.reader.offset());
                let end = area.end();
                let file = self.origin.file().ok_or(ScanError::NoFile)?;
                let size = file
                    .size()
                    .map_err(|source| ScanError::Stream { offset, source })?;
                if end > size {
                    return Err(ScanError::Truncated { end, size });
                }
                self.reader
                    .seek(end)
                    .map_err(|source| ScanError::Stream { offset, source })?;
                self.meter.turn(Part::Setup, end);
                // Which block it is, is known when the list is complete.
                self.areas.push((block, area));
            }
            RamItem::Page(page) => {
                self.count(page, offset, |block| &mut block.normal);
                if let Some(extract) = &mut self.extract {
                    while self.reader.buffered().len() < PAGE_LEN {
                        self.reader
                            .fill(MAX_ITEM_LEN)
                            .map_err(|source| ScanError::Stream { offset, source })?;
                    }
                    let bytes = self.reader.buffered().get(..PAGE_LEN);
                    extract.page(page, bytes.unwrap_or_default())?;
                }
                self.skip(PAGE_LEN)?;
            }
            RamItem::Zero(page) => {
                self.count(page, offset, |block| &mut block.zero);
                if let Some(extract) = &mut self.extract {
                    extract.zero(page)?;
                }
            }
            RamItem::Xbzrle { page, len } => {
                self.count(page, offset, |block| &mut block.xbzrle);
                let len = usize::from(len);
                while self.reader.buffered().len() < len {
                    self.fill()?;
                }
                let bytes = self.reader.buffered().get(..len).unwrap_or_default();
                if let Some(extract) = &mut self.extract {
                    extract.xbzrle(page, bytes)?;
                }
                self.skip(len)?;
            }
            RamItem::MultifdFlush => self.origin.flush()?,
            RamItem::EndOfSection if self.origin.flushes_each_section() => self.origin.flush()?,
            RamItem::EndOfSection => {}
        }
        Ok(())
    }

    fn count(&mut self, page: PageAddress, offset: u64, kind: impl Fn(&mut Block) -> &mut u64) {
        self.meter.turn(Part::Pages, offset);
        if let Some(block) = self.found.blocks.get_mut(page.block.index()) {
            *kind(block) += 1;
        }
        if let Some(unique) = self.unique.get_mut(page.block.index()) {
            unique.insert(page.offset / PAGE_SIZE, 1);
        }
    }

    fn announced(&mut self, table: &RamBlockTable) -> Result<(), ScanError> {
        self.found.blocks = table
            .iter()
            .map(|(id, block)| Block {
                block: block.clone(),
                is_ignored: table.is_ignored(id),
                normal: 0,
                zero: 0,
                xbzrle: 0,
                unique: 0,
            })
            .collect();
        self.unique.resize_with(table.len(), PageSet::default);
        if let Some(extract) = &mut self.extract {
            extract.begin(table)?;
        }
        for (id, area) in std::mem::take(&mut self.areas) {
            self.mapped(id, &area)?;
        }
        self.origin
            .announced(self.found.configuration.as_ref(), table)
    }

    /// Pages that have their places in the file.
    fn mapped(&mut self, id: BlockId, area: &MappedArea) -> Result<(), ScanError> {
        let file = self.origin.file().ok_or(ScanError::NoFile)?;
        let failed = |offset| move |source| ScanError::Stream { offset, source };
        let total = area.used_length() / PAGE_SIZE;
        let (mut normal, mut first) = (0, 0);
        let mut bits = vec![0; BITMAP_PIECE];
        while first < total {
            let rest = area.bitmap_len() - first / 8;
            let len = BITMAP_PIECE.min(usize::try_from(rest).unwrap_or(BITMAP_PIECE));
            let Some(bits) = bits.get_mut(..len) else {
                break;
            };
            let at = area.bitmap() + first / 8;
            read_exact(&**file, at, bits).map_err(failed(at))?;
            let pages = (total - first).min(len as u64 * 8);
            for run in runs(bits, pages) {
                normal += run.end - run.start;
                if let Some(extract) = &mut self.extract {
                    let from = area.pages() + (first + run.start) * PAGE_SIZE;
                    let count = run.end - run.start;
                    extract.copy(&**file, from, id, first + run.start, count)?;
                }
            }
            first += pages;
            (self.progress)(at);
        }
        if let Some(block) = self.found.blocks.get_mut(id.index()) {
            block.normal = normal;
            block.zero = total - normal;
        }
        if let Some(unique) = self.unique.get_mut(id.index()) {
            unique.insert(0, total);
        }
        Ok(())
    }

    /// A device section before RAM or in it, as those have whose state the destination needs first.
    /// Its length stands in the description, which is at the end.
    fn early(&mut self, header: SectionHeader, offset: u64) -> Result<(), ScanError> {
        let unknown = |header: &SectionHeader| ScanError::Early {
            idstr: header.idstr.as_str().to_owned(),
            offset,
        };
        if header.kind != Announcement::Full {
            return Err(unknown(&header));
        }
        let file = self.origin.file().ok_or_else(|| unknown(&header))?;
        let description = description_at_end(&**file)?.ok_or_else(|| unknown(&header))?;
        let len = description
            .devices
            .iter()
            .find(|d| d.idstr == header.idstr && d.instance == header.instance)
            .and_then(|d| usize::try_from(d.body_len).ok())
            .filter(|len| *len <= TailLimits::default().len)
            .ok_or_else(|| unknown(&header))?;
        let mut body = Vec::new();
        while body.len() < len {
            if self.reader.buffered().is_empty() {
                self.fill()?;
            }
            let here = self.reader.buffered();
            let here = here.get(..len - body.len()).unwrap_or(here);
            body.extend_from_slice(here);
            let taken = here.len();
            self.reader.consume(taken);
        }
        let bytes = self.reader.offset() - offset + FOOTER_LEN as u64;
        self.found.sections.push(Section::Device(Device {
            header,
            body,
            extent: Extent {
                bytes,
                time: Duration::ZERO,
            },
        }));
        Ok(())
    }

    /// Device sections, EOF and description, beginning with the body of `header`, which begins at
    /// byte `begin` of the stream.
    fn tail(mut self, header: &SectionHeader, begin: u64) -> Result<Inspection, ScanError> {
        let mut tail = OpaqueTail::beginning_with(header, TailLimits::default())
            .after_early(self.found.devices().count());
        let mut arrivals = Arrivals::new(self.reader.offset() - begin);
        let mut ending = Vec::new();
        let tail = loop {
            let piece = self.reader.buffered();
            arrivals.add(piece.len());
            ending.extend_from_slice(piece);
            ending.drain(..ending.len().saturating_sub(FOOTER_LEN + 1));
            match tail.feed(piece)? {
                Fed::Complete { consumed, tail } => {
                    self.reader.consume(consumed);
                    break tail;
                }
                Fed::NeedMore => self.reader.consume(piece.len()),
            }
            match self.fill() {
                Ok(()) => {}
                Err(ScanError::Stream { source, offset })
                    if source.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    // The source may have been told to send no description (`suppress-vmdesc`).
                    let [footer, _, _, _, _, eof] = *ending else {
                        return Err(ScanError::Stream { source, offset });
                    };
                    if tail.rejected().is_none()
                        && footer == SectionType::Footer.byte()
                        && eof == SectionType::Eof.byte()
                    {
                        return self.finish();
                    }
                    return Err(ScanError::Stream { source, offset });
                }
                Err(error) => return Err(error),
            }
        };
        let mut end = 0;
        for device in tail.sections() {
            let mut head = Vec::new();
            device.header.encode(&mut head);
            let from = end;
            end += head.len() + device.body.len() + FOOTER_LEN;
            self.found.sections.push(Section::Device(Device {
                header: device.header.clone(),
                body: device.body.to_vec(),
                extent: Extent {
                    bytes: (end - from) as u64,
                    time: arrivals.between(from, end),
                },
            }));
        }
        self.found.description = tail.description_text().to_owned();
        self.end_of_tail(&tail, end, &arrivals);
        self.finish()
    }

    /// What of a tail is devices, and what its description.
    fn end_of_tail(&mut self, tail: &Tail, devices: usize, arrivals: &Arrivals) {
        let whole = tail.as_bytes().len();
        let description = (whole - devices - 1) as u64;
        let time = arrivals.between(devices + 1, whole);
        self.meter.turn(Part::Description, self.reader.offset());
        self.meter.shift(
            Part::Devices,
            Part::Description,
            Extent {
                bytes: description,
                time,
            },
        );
    }
}

/// Footer: type byte and section id.
const FOOTER_LEN: usize = 5;

/// How much of a tail has come, and when.
struct Arrivals(Vec<(usize, Instant)>);

impl Arrivals {
    fn new(head: u64) -> Self {
        let head = usize::try_from(head).unwrap_or(usize::MAX);
        Self(vec![(head, Instant::now())])
    }

    fn add(&mut self, len: usize) {
        let here = self.0.last().map_or(0, |(upto, _)| *upto);
        self.0.push((here.saturating_add(len), Instant::now()));
    }

    /// How long bytes `from .. to` took to come.
    fn between(&self, from: usize, to: usize) -> Duration {
        let when = |byte| {
            let next = self.0.partition_point(|(upto, _)| *upto < byte);
            self.0.get(next).or(self.0.last()).map(|(_, when)| *when)
        };
        match (when(from), when(to)) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        }
    }
}

/// What each part takes up, by whose turn it is.
struct Meter {
    part: Part,
    since: (u64, Instant),
    extents: [Extent; Part::ALL.len()],
}

impl Meter {
    fn new(offset: u64) -> Self {
        Self {
            part: Part::Configuration,
            since: (offset, Instant::now()),
            extents: Default::default(),
        }
    }

    /// From byte `offset` on it is this part's.
    fn turn(&mut self, part: Part, offset: u64) {
        if part == self.part {
            return;
        }
        let now = Instant::now();
        let (begun, since) = std::mem::replace(&mut self.since, (offset, now));
        let past = std::mem::replace(&mut self.part, part);
        if let Some(extent) = self.extents.get_mut(past as usize) {
            extent.bytes += offset.saturating_sub(begun);
            extent.time += now - since;
        }
    }

    /// Part of what was one part's is another's.
    fn shift(&mut self, from: Part, to: Part, what: Extent) {
        if let Some(extent) = self.extents.get_mut(from as usize) {
            extent.bytes = extent.bytes.saturating_sub(what.bytes);
            extent.time = extent.time.saturating_sub(what.time);
        }
        if let Some(extent) = self.extents.get_mut(to as usize) {
            extent.bytes += what.bytes;
            extent.time += what.time;
        }
    }
}

/// The description that a file ends with.
fn description_at_end(file: &dyn PositionedFile) -> Result<Option<VmDescription>, ScanError> {
    let max = u64::from(DecoderConfig::DEFAULT_MAX_DESCRIPTION) + 5;
    let failed = |offset| move |source| ScanError::Stream { offset, source };
    let size = file.size().map_err(failed(0))?;
    let begin = size.saturating_sub(max);
    let mut end = vec![0; usize::try_from(size - begin).unwrap_or_default()];
    read_exact(file, begin, &mut end).map_err(failed(begin))?;
    let head = |window: &[u8]| match *window {
        [kind, a, b, c, d, b'{'] => {
            (kind == SectionType::VmDescription.byte()).then(|| u32::from_be_bytes([a, b, c, d]))
        }
        _ => None,
    };
    let whole = end.len();
    Ok(end.windows(6).enumerate().find_map(|(i, window)| {
        let len = usize::try_from(head(window)?).ok()?;
        (i + 5 + len == whole)
            .then(|| VmDescription::parse(end.get(i + 5..)?).ok())
            .flatten()
    }))
}

fn read_exact(file: &dyn PositionedFile, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(offset, buf)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                offset += n as u64;
                buf = buf.get_mut(n..).unwrap_or_default();
            }
        }
    }
    Ok(())
}

/// The runs of bits that are set among the first `count`.
fn runs(bits: &[u8], count: u64) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
    let is_set = move |bit: u64| {
        let byte = usize::try_from(bit / 8).ok().and_then(|i| bits.get(i));
        byte.is_some_and(|b| b >> (bit % 8) & 1 == 1)
    };
    let uniform = move |bit: u64, value: u8| {
        let word = usize::try_from(bit / 8)
            .ok()
            .and_then(|i| bits.get(i..i + 8));
        bit.is_multiple_of(8) && word.is_some_and(|w| w.iter().all(|b| *b == value))
    };
    let beyond = move |mut bit: u64, set: bool| {
        while bit < count {
            if uniform(bit, if set { 0xff } else { 0 }) {
                bit += 64;
            } else if is_set(bit) == set {
                bit += 1;
            } else {
                break;
            }
        }
        bit.min(count)
    };
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = beyond(next, false);
        next = beyond(start, true);
        (start < next).then_some(start..next)
    })
}

/// Why a stream could not be read to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    /// It is not what a source of QEMU sends.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It breaks off, or cannot be read.
    #[error("reading byte {offset:#x} of the stream")]
    Stream {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The file ends before the pages of a block do.
    #[error("the file has {size:#x} bytes, but the pages of a block end at {end:#x}")]
    Truncated {
        /// Where they end.
        end: u64,
        /// Length of the file, bytes.
        size: u64,
    },
    /// Pages that have their places in a file, and there is none.
    #[error("the stream says that its pages are in a file (mapped-ram), but it comes from none")]
    NoFile,
    /// The device sections cannot be told apart.
    #[error(transparent)]
    Tail(#[from] TailError),
    /// A section whose length nobody knows.
    #[error(
        "section '{idstr}' at byte {offset:#x} comes before the end of RAM, and nothing says how \
         long it is"
    )]
    Early {
        /// The section.
        idstr: String,
        /// Where it begins.
        offset: u64,
    },
    /// A continuation of something that is not RAM.
    #[error("{id} at byte {offset:#x} goes on, and it is not RAM")]
    Unknown {
        /// The section.
        id: SectionId,
        /// Where.
        offset: u64,
    },
    /// The source has switched to postcopy.
    #[error(
        "the source went on with postcopy at byte {offset:#x}: no guest is whole in its stream"
    )]
    Postcopy {
        /// Where.
        offset: u64,
    },
    /// The source cannot be answered, or is not wanted.
    #[error(transparent)]
    Incoming(#[from] crate::incoming::IncomingError),
    /// What was found cannot be written.
    #[error(transparent)]
    Extract(#[from] ExtractError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_bitmap_are_found_across_bytes_and_words() {
        let mut bits = vec![0xff; 40];
        bits[0] = 0b0110;
        bits[20] = 0;
        bits[21] = 0x80;
        let found: Vec<_> = runs(&bits, 317).collect();
        assert_eq!(found, [1..3, 8..160, 175..317]);
        assert_eq!(runs(&[0; 9], 70).count(), 0);
        assert_eq!(runs(&[0xff; 9], 70).next(), Some(0..70));
        assert_eq!(runs(&[], 0).count(), 0);
    }

    #[test]
    fn bytes_go_to_the_part_whose_turn_it_is() {
        let mut meter = Meter::new(100);
        meter.turn(Part::Setup, 150);
        meter.turn(Part::Setup, 160);
        meter.turn(Part::Pages, 170);
        meter.turn(Part::Devices, 1170);
        meter.turn(Part::Description, 1470);
        let what = Extent {
            bytes: 100,
            time: Duration::ZERO,
        };
        meter.shift(Part::Devices, Part::Description, what);
        let bytes = meter.extents.map(|extent| extent.bytes);
        assert_eq!(bytes, [50, 0, 20, 1000, 0, 200, 100]);
    }
}
