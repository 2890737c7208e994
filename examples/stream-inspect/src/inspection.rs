//! What was found in a stream.

use std::time::Duration;

use migration_stream::ram::RamBlock;
use migration_stream::raw::command::CommandNumber;
use migration_stream::raw::dirty_bitmap::MigratedBitmap;
use migration_stream::{Configuration, SectionHeader, SectionId};

/// A part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Header and configuration section.
    Configuration,
    /// Commands, payloads included.
    Commands,
    /// The list of RAM blocks.
    Setup,
    /// Pages, and what the RAM sections around them are made of.
    Pages,
    /// Dirty bitmaps of the guest's disks.
    Bitmaps,
    /// Device sections.
    Devices,
    /// The description of the device sections.
    Description,
}

impl Part {
    /// All of them, in the order of a stream.
    pub const ALL: [Self; 7] = [
        Self::Configuration,
        Self::Commands,
        Self::Setup,
        Self::Pages,
        Self::Bitmaps,
        Self::Devices,
        Self::Description,
    ];

    /// What it is called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::Commands => "commands",
            Self::Setup => "ram set-up",
            Self::Pages => "ram pages",
            Self::Bitmaps => "dirty bitmaps",
            Self::Devices => "devices",
            Self::Description => "description",
        }
    }
}

/// What a part takes up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of the stream, or of the file.
    pub bytes: u64,
    /// How long they took to come.
    pub time: Duration,
}

/// What came of a RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The block, as announced.
    pub block: RamBlock,
    /// Its memory is not in the stream: both sides share it (`x-ignore-shared`).
    pub is_ignored: bool,
    /// Pages with all their bytes, as often as they came.
    pub normal: u64,
    /// Pages that are zero, as often as they came.
    pub zero: u64,
    /// Pages as differences, as often as they came.
    pub xbzrle: u64,
    /// Different pages that came.
    pub unique: u64,
}

/// A device section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its header.
    pub header: SectionHeader,
    /// Its body.
    pub body: Vec<u8>,
    /// What it takes up, with header and footer.
    pub extent: Extent,
}

/// A section that a stream announces, in the order of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section {
    /// RAM, which is in [`Inspection::blocks`].
    Ram(SectionId),
    /// A device.
    Device(Device),
}

/// Commands of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commands {
    /// Which.
    pub number: CommandNumber,
    /// How many there are.
    pub count: u64,
}

/// What was found in a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inspection {
    /// The configuration section, if there is one.
    pub configuration: Option<Configuration>,
    /// Each part and what it takes up, in the order of [`Part::ALL`].
    pub parts: [Extent; Part::ALL.len()],
    /// Commands, in the order in which they first appear.
    pub commands: Vec<Commands>,
    /// RAM blocks, in the source's order.
    pub blocks: Vec<Block>,
    /// RAM sections: the first one, those with pages, the last one.
    pub ram_sections: u64,
    /// Dirty bitmaps of the guest's disks (the capability `dirty-bitmaps`).
    pub bitmaps: Vec<MigratedBitmap>,
    /// Sections, in the order of the stream.
    pub sections: Vec<Section>,
    /// The description's text; empty where the source sends none (`suppress-vmdesc`), and the device
    /// sections are then one piece of [`Part::Devices`].
    pub description: String,
}

impl Inspection {
    /// What a part takes up.
    #[must_use]
    pub fn part(&self, part: Part) -> Extent {
        self.parts.get(part as usize).copied().unwrap_or_default()
    }

    /// What all of it takes up.
    #[must_use]
    pub fn total(&self) -> Extent {
        self.parts
            .iter()
            .fold(Extent::default(), |sum, part| Extent {
                bytes: sum.bytes + part.bytes,
                time: sum.time + part.time,
            })
    }

    /// The device sections, in their order.
    pub fn devices(&self) -> impl Iterator<Item = &Device> + '_ {
        self.sections.iter().filter_map(|section| match section {
            Section::Device(device) => Some(device),
            Section::Ram(_) => None,
        })
    }
}
