//! A guest that nobody runs at the moment.

use std::sync::Arc;

use migration_stream::configuration::Configuration;
use migration_stream::dirty_bitmap::BitmapSections;
use migration_stream::early::EarlySections;
use migration_stream::opaque_tail::Tail;
use migration_stream::section::SectionId;

use crate::memory::Memory;
use migration_stream::machine::MachineVersion;

/// All that a stream says of a guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its memory.
    pub memory: Arc<Memory>,
    /// The source's configuration section; `None` if it sends none (`send-configuration=off`), and the
    /// destination then takes none either.
    pub configuration: Option<Configuration>,
    /// Devices whose state goes before memory, as they came.
    pub early: EarlySections,
    /// Its other devices, as they came.
    pub devices: Devices,
}

/// The state of a guest's devices, and what is known of its disks.
#[derive(Clone, Debug)]
pub struct Devices {
    /// Device sections and their description.
    pub tail: Tail,
    /// Dirty bitmaps of the disks, if their source sends them.
    pub bitmaps: BitmapSections,
}

impl Devices {
    /// Appends the sections, and EOF, as a source does that numbers its sections from `first` on.
    pub fn encode(&self, first: SectionId, out: &mut Vec<u8>) {
        let mut next = first;
        if !self.bitmaps.is_empty() {
            self.bitmaps.encode_sections(first, out);
            next = SectionId(first.0.saturating_add(1));
        }
        self.tail.encode_sections(next, out);
    }
}

/// The version of a machine type: what the name says, or else `unnamed`, or else the current.
pub(crate) fn version(
    configuration: Option<&Configuration>,
    unnamed: Option<MachineVersion>,
) -> MachineVersion {
    configuration
        .and_then(|configuration| MachineVersion::of(&configuration.machine))
        .or(unnamed)
        .unwrap_or(MachineVersion::CURRENT)
}
