//! A guest that nobody runs at the moment.

use std::convert::Infallible;
use std::sync::Arc;

use migration_stream::raw::dirty_bitmap::BitmapSections;
use migration_stream::raw::early::EarlySections;
use migration_stream::{
    BoxError, Configuration, DeviceSections, DeviceState, Parsed, SectionHeader, Tail,
};

use crate::memory::Memory;
use migration_stream::MachineVersion;

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

/// Sections are saved as they came. A checkpoint's are told apart by what they were like before, and it
/// has no bitmaps.
impl DeviceState for Devices {
    type Section = Infallible;
    type Staged = Self;
    type Reset = Self;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        if !self.bitmaps.is_empty() {
            out.append(|id, out| self.bitmaps.encode_sections(id, out));
        }
        self.tail.save(out)
    }

    fn parse(
        &mut self,
        header: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<Infallible>, BoxError> {
        self.tail.parse(header, body)
    }

    fn stage(&mut self, sections: Vec<Infallible>) -> Result<Self, BoxError> {
        Ok(Self::without_bitmaps(self.tail.stage(sections)?))
    }

    fn stage_checkpoint(&mut self, state: &[u8]) -> Result<Self, BoxError> {
        Ok(Self::without_bitmaps(self.tail.followed_by(state)?))
    }

    fn reset(&mut self, staged: Self) -> Result<Self, BoxError> {
        Ok(staged)
    }

    fn install(&mut self, reset: Self) -> Result<(), BoxError> {
        *self = reset;
        Ok(())
    }
}

impl Devices {
    /// Returns devices of a guest whose disks have no dirty bitmaps.
    #[must_use]
    pub const fn without_bitmaps(tail: Tail) -> Self {
        let bitmaps = BitmapSections::new();
        Self { tail, bitmaps }
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
