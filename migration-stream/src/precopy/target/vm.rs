//! The devices of a VMM, as the walk through the stream sees them.

use crate::raw::dirty_bitmap::{Chunk, MigratedBitmap};
use crate::{BoxError, DeviceState, Parsed, SectionHeader};

/// Takes device sections in.
pub(super) trait SectionLoader {
    /// Parses the body at the front of `body`, and returns its length; `None` if it is longer.
    fn load(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Option<usize>, BoxError>;

    /// Takes a chunk of a dirty bitmap in.
    fn load_dirty_bitmap(&mut self, bitmap: &MigratedBitmap, chunk: &Chunk)
    -> Result<(), BoxError>;
}

/// Keeps what the devices have parsed.
pub(super) struct Collector<'a, D: DeviceState> {
    devices: &'a mut D,
    sections: Vec<D::Section>,
}

impl<'a, D: DeviceState> Collector<'a, D> {
    pub(super) const fn new(devices: &'a mut D) -> Self {
        let sections = Vec::new();
        Self { devices, sections }
    }

    /// Stages what was collected.
    pub(super) fn stage(self) -> Result<D::Staged, BoxError> {
        self.devices.stage(self.sections)
    }
}

impl<D: DeviceState> SectionLoader for Collector<'_, D> {
    fn load(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Option<usize>, BoxError> {
        match self.devices.parse(header, body)? {
            Parsed::Section(section, len) => {
                self.sections.push(section);
                Ok(Some(len))
            }
            Parsed::NeedMore => Ok(None),
        }
    }

    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        chunk: &Chunk,
    ) -> Result<(), BoxError> {
        self.devices.load_dirty_bitmap(bitmap, chunk)
    }
}
