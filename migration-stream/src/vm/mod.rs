//! What a migration asks of a VMM beyond memory: pause and resume, and device state.
//!
//! Live migration, files and COLO ask for the same: [`VmControl`] and [`DeviceState`] are implemented once.
//!
//! ```text
//! source                                  target
//! save_early       before RAM      ->     parse
//! (pages, while the guest runs)
//! pause
//! save             after RAM       ->     parse ... stage
//!                                         reset
//!                                         (COLO: pages of the checkpoint reach the guest)
//!                                         install
//!                                  <-     (the target confirms)
//!                                         resume
//! ```

mod opaque;
mod sections;
#[cfg(feature = "vmstate")]
mod tree;

use std::convert::Infallible;
use std::time::Instant;

pub use sections::DeviceSections;

use crate::BoxError;
use crate::raw::device_blob::decode_device_blob;
use crate::raw::dirty_bitmap::{Chunk, MigratedBitmap};
use crate::{Escaped, SectionHeader};

/// Pauses and resumes a guest.
pub trait VmControl {
    /// Pauses all vCPUs, and whatever else writes guest memory. When this returns, the dirty log is
    /// complete and devices can be saved. Does nothing to a guest that is paused.
    ///
    /// # Errors
    /// The guest may still run.
    fn pause(&mut self) -> Result<(), BoxError>;

    /// Resumes the guest, and returns when it did: the end of its pause. A running vCPU can keep the
    /// caller from the processor before the caller can look at a clock.
    ///
    /// # Errors
    /// The guest is still paused.
    fn resume(&mut self) -> Result<Instant, BoxError>;
}

/// Saves and loads the state of all devices of a paused VM.
///
/// Received state passes through four types, of which each can be had from the one before only. No
/// device changes before [`DeviceState::reset`].
pub trait DeviceState {
    /// The state of one device, parsed and sound in itself.
    type Section;
    /// The state of all devices, checked against this VM. Installing it does not fail for what is in it.
    type Staged;
    /// The same, after all devices were reset for it.
    type Reset;

    /// Appends the devices whose state travels before RAM, while the guest still runs: what a target has to
    /// refuse early. Most VMs have none.
    ///
    /// # Errors
    /// A device could not be saved. The migration fails.
    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        let _ = out;
        Ok(())
    }

    /// Appends all other devices of the paused VM. If [`DeviceSections::wants_description`], describes
    /// these and the early ones, early ones first.
    ///
    /// # Errors
    /// A device could not be saved. The migration or the checkpoint fails.
    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError>;

    /// Parses the state of one device from the front of `body`, which may be cut short and may run over
    /// into what follows. It is called again from the start of the body, with more, after
    /// [`Parsed::NeedMore`]. No device changes.
    ///
    /// # Errors
    /// The device is unknown, or its state is not sound. The migration or the checkpoint fails.
    fn parse(
        &mut self,
        header: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<Self::Section>, BoxError>;

    /// Checks that the sections are the state of this VM: complete, each once, each fit for its device.
    /// No device changes.
    ///
    /// # Errors
    /// They are not. The migration or the checkpoint fails.
    fn stage(&mut self, sections: Vec<Self::Section>) -> Result<Self::Staged, BoxError>;

    /// Parses and stages the device state of a checkpoint: sections as [`DeviceSections`] has written
    /// them, and EOF. To be replaced only where sections cannot be told apart.
    ///
    /// # Errors
    /// As for [`DeviceState::parse`] and [`DeviceState::stage`].
    fn stage_checkpoint(&mut self, state: &[u8]) -> Result<Self::Staged, BoxError> {
        let mut sections = Vec::new();
        decode_device_blob(state, |header, rest| match self.parse(header, rest) {
            Ok(Parsed::Section(section, len)) => {
                sections.push(section);
                Ok(len)
            }
            Ok(Parsed::NeedMore) => Err(BoxError::from("the device state ends in this section")),
            Err(error) => Err(error),
        })?;
        self.stage(sections)
    }

    /// Resets all devices, without an event of the VMM's. May write guest memory: a checkpoint's
    /// pages reach it after this.
    ///
    /// # Errors
    /// The VM is in no defined state, and must not run.
    fn reset(&mut self, staged: Self::Staged) -> Result<Self::Reset, BoxError>;

    /// Gives the reset devices their state. Guest memory is the saved one's by now.
    ///
    /// # Errors
    /// The VM is in no defined state, and must not run.
    fn install(&mut self, reset: Self::Reset) -> Result<(), BoxError>;

    /// Takes a chunk of `bitmap` (the capability `dirty-bitmaps`), whose alias is its node's and its own
    /// name unless the source maps them. Chunks come while the guest still runs at the source. No bitmap
    /// in use may change before [`DeviceState::install`].
    ///
    /// # Errors
    /// The bitmap is not wanted, which is the answer unless this is replaced. The migration fails.
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        chunk: &Chunk,
    ) -> Result<(), BoxError> {
        let _ = chunk;
        Err(format!("dirty bitmap '{}' of '{}'", bitmap.name, bitmap.node).into())
    }
}

/// A VM without devices.
impl DeviceState for () {
    type Section = Infallible;
    type Staged = ();
    type Reset = ();

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        let _ = out;
        Ok(())
    }

    fn parse(
        &mut self,
        header: &SectionHeader,
        _body: &[u8],
    ) -> Result<Parsed<Infallible>, BoxError> {
        Err(format!("this VM has no device '{}'", Escaped(header.idstr.as_str())).into())
    }

    fn stage(&mut self, _sections: Vec<Infallible>) -> Result<(), BoxError> {
        Ok(())
    }

    fn reset(&mut self, (): ()) -> Result<(), BoxError> {
        Ok(())
    }

    fn install(&mut self, (): ()) -> Result<(), BoxError> {
        Ok(())
    }
}

/// A device's answer to the bytes it was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<S> {
    /// The state, and the length of its body in bytes.
    Section(S, usize),
    /// The body is longer than the bytes shown.
    NeedMore,
}

/// A VM put together from its control and its devices.
///
/// A VMM whose devices are in `vmstate`'s `DeviceTree` (the feature `vmstate`) implements [`VmControl`]
/// alone.
#[derive(Clone, Copy, Debug)]
pub struct Vm<C, D> {
    /// Pauses and resumes.
    pub control: C,
    /// The devices.
    pub devices: D,
}

impl<C: VmControl, D> VmControl for Vm<C, D> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.control.pause()
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        self.control.resume()
    }
}

impl<C, D: DeviceState> DeviceState for Vm<C, D> {
    type Section = D::Section;
    type Staged = D::Staged;
    type Reset = D::Reset;

    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        self.devices.save_early(out)
    }

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        self.devices.save(out)
    }

    fn parse(
        &mut self,
        header: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<Self::Section>, BoxError> {
        self.devices.parse(header, body)
    }

    fn stage(&mut self, sections: Vec<Self::Section>) -> Result<Self::Staged, BoxError> {
        self.devices.stage(sections)
    }

    fn stage_checkpoint(&mut self, state: &[u8]) -> Result<Self::Staged, BoxError> {
        self.devices.stage_checkpoint(state)
    }

    fn reset(&mut self, staged: Self::Staged) -> Result<Self::Reset, BoxError> {
        self.devices.reset(staged)
    }

    fn install(&mut self, reset: Self::Reset) -> Result<(), BoxError> {
        self.devices.install(reset)
    }

    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        chunk: &Chunk,
    ) -> Result<(), BoxError> {
        self.devices.load_dirty_bitmap(bitmap, chunk)
    }
}
