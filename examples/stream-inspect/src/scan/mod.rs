//! From a stream's first byte to its last.
//!
//! [`scan()`] reads one item after the other. What it finds in RAM is counted by `ram` and, where
//! pages have their places in a file, by `mapped`; device sections are told apart by `devices`;
//! `meter` keeps account of what each part takes up.

mod devices;
mod error;
mod file;
mod mapped;
mod meter;
mod origin;
mod ram;

use migration_stream::ram::BlockId;
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::{Command, CommandNumber};
use migration_stream::raw::decoder::{Item, MAX_ITEM_LEN, Step, StreamDecoder};
use migration_stream::raw::dirty_bitmap::{DIRTY_BITMAP_IDSTR, DirtyBitmapDecoder};
use migration_stream::raw::early::EarlySections;
use migration_stream::raw::mapped_ram::MappedArea;
use migration_stream::raw::ram::RAM_IDSTR;
use migration_stream::raw::section::{Announcement, Continuation};
use migration_stream::{
    Cause, ConfigurationRule, DecoderConfig, SectionId, StreamReader, TailLimits,
};

pub use self::error::ScanError;
use self::meter::Meter;
pub use self::origin::{Beside, BesideBlock, FileOrigin, Origin, PipeOrigin};
use crate::extract::Extract;
use crate::inspection::{Commands, Inspection, Part, Section};
use crate::pages::PageSet;

/// How often whoever watches is told how far it is, bytes.
const TOLD_EACH: u64 = 4 << 20;

/// Reads a stream to its end, of which `max_device_state` bytes may be device state. RAM goes into
/// `extract`, if there is one; `progress` is told the offset from time to time.
///
/// # Errors
/// [`ScanError`].
pub fn scan(
    reader: StreamReader,
    origin: &mut dyn Origin,
    max_device_state: usize,
    extract: Option<&mut Extract>,
    progress: &mut dyn FnMut(u64),
) -> Result<Inspection, ScanError> {
    let config = DecoderConfig::new(ConfigurationRule::AnyOrAbsent).xbzrle(true);
    let meter = Meter::new(reader.offset());
    let scan = Scan {
        reader,
        origin: &mut *origin,
        extract,
        progress,
        told: 0,
        meter,
        limits: TailLimits {
            len: max_device_state,
            ..TailLimits::default()
        },
        found: Inspection::default(),
        unique: Vec::new(),
        areas: Vec::new(),
        ram: Ram::Unknown,
        has_pages: false,
        early: EarlySections::new(),
        bitmap_section: None,
        bitmap_decoder: DirtyBitmapDecoder::new(),
    };
    let found = scan.run(StreamDecoder::new(config, None));
    // A stream that ended because a channel failed is told by what the channel met.
    found.map_err(|error| origin.failure().unwrap_or(error))
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
    limits: TailLimits,
    found: Inspection,
    /// The pages of each block.
    unique: Vec<PageSet>,
    /// Of blocks whose pages have their places in the file and have not been looked at.
    areas: Vec<(BlockId, MappedArea)>,
    ram: Ram,
    /// What comes before the first page has come.
    has_pages: bool,
    /// Device sections before RAM.
    early: EarlySections,
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
                    self.begin_pages()?;
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

    /// Everything that stands before the pages of RAM has come.
    fn begin_pages(&mut self) -> Result<(), ScanError> {
        if std::mem::replace(&mut self.has_pages, true) {
            return Ok(());
        }
        self.check_length()?;
        for (id, area) in std::mem::take(&mut self.areas) {
            self.mapped(id, &area)?;
        }
        Ok(())
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
}
