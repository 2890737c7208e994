//! A VMM of which only the loading of devices matters.

use migration_stream::precopy::{Settled, Target, TargetError};
use migration_stream::ram::NoMultifd;
use migration_stream::raw::dirty_bitmap::{Chunk, MigratedBitmap};
use migration_stream::{BoxError, DeviceSections, DeviceState, PageStore, Parsed, SectionHeader};

/// Loads devices.
pub trait Loads {
    /// As [`DeviceState::parse`].
    fn load_device(&mut self, section: &SectionHeader, body: &[u8])
    -> Result<Parsed<()>, BoxError>;

    /// As [`DeviceState::load_dirty_bitmap`].
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        _chunk: &Chunk,
    ) -> Result<(), BoxError> {
        Err(format!("no bitmap {}", bitmap.name).into())
    }
}

/// What loads devices, as the device state of a VM.
pub struct Only<'a>(pub &'a mut dyn Loads);

impl DeviceState for Only<'_> {
    type Section = ();
    type Staged = ();
    type Reset = ();

    fn save(&mut self, _: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        Err("this VM is only loaded".into())
    }
    fn parse(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Parsed<()>, BoxError> {
        self.0.load_device(header, body)
    }
    fn stage(&mut self, _: Vec<()>) -> Result<(), BoxError> {
        Ok(())
    }
    fn reset(&mut self, (): ()) -> Result<(), BoxError> {
        Ok(())
    }
    fn install(&mut self, (): ()) -> Result<(), BoxError> {
        Ok(())
    }
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        chunk: &Chunk,
    ) -> Result<(), BoxError> {
        self.0.load_dirty_bitmap(bitmap, chunk)
    }
}

/// Loads a stream without channels into `ram`, as far as a confirmation may follow.
#[allow(dead_code)] // each test file uses a part of this one
pub fn load<S: PageStore>(
    target: Target,
    ram: S,
    vm: &mut dyn Loads,
) -> Result<Settled<S>, TargetError> {
    let mut devices = Only(vm);
    target
        .load((ram, NoMultifd), &mut devices)?
        .settle(&mut devices)
}
