//! A guest of QEMU that is held and does not run: what COLO's secondary keeps of it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use colo_core::{CheckpointReport, ColoExit, ColoObserver};
use migration_stream::ram::BlockId;
use migration_stream::raw::early::EarlySections;
use migration_stream::{
    BoxError, DeviceSections, DeviceState, DirtyLog, MemoryError, Parsed, SectionHeader, VmControl,
};
use stream_relay::guest::{Devices, Guest};

use super::Standby;

/// The guest as of its last complete checkpoint. Its memory is what was flushed out of the RAM cache
/// in the same commit that puts the device state here, so the two are never of different checkpoints.
pub(super) struct HeldVm {
    standby: Arc<Standby>,
    guest: Guest,
}

impl HeldVm {
    /// The guest as its primary was when COLO began.
    pub(super) const fn new(standby: Arc<Standby>, guest: Guest) -> Self {
        Self { standby, guest }
    }

    /// The guest, when COLO is over.
    pub(super) fn into_guest(self) -> Guest {
        self.guest
    }
}

impl VmControl for HeldVm {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

/// The devices of a checkpoint.
#[derive(Debug)]
pub(super) struct Next {
    early: EarlySections,
    devices: Devices,
}

impl DeviceState for HeldVm {
    type Section = Infallible;
    type Staged = Next;
    type Reset = Next;

    fn save(&mut self, _: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        // A secondary is not asked.
        Err("a guest that is held has none of its own".into())
    }

    fn parse(
        &mut self,
        header: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<Infallible>, BoxError> {
        self.guest.devices.parse(header, body)
    }

    fn stage(&mut self, _: Vec<Infallible>) -> Result<Next, BoxError> {
        Err("the devices are not known here".into())
    }

    fn stage_checkpoint(&mut self, state: &[u8]) -> Result<Next, BoxError> {
        let (early, state) = self.guest.early.followed_by(state)?;
        let devices = self.guest.devices.stage_checkpoint(state)?;
        Ok(Next { early, devices })
    }

    fn reset(&mut self, staged: Next) -> Result<Next, BoxError> {
        Ok(staged)
    }

    fn install(&mut self, next: Next) -> Result<(), BoxError> {
        self.guest.early = next.early;
        self.guest.devices.install(next.devices)
    }
}

impl ColoObserver for HeldVm {
    fn colo_exit(&mut self, exit: &ColoExit) {
        self.standby.colo_exit(exit);
    }

    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        self.standby.checkpoint_done(report);
    }
}

/// Nothing writes the memory of a guest that does not run.
#[derive(Debug)]
pub(super) struct Untouched;

impl DirtyLog for Untouched {
    fn start(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn sync(&mut self, _: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}
