//! A guest of QEMU that is held and does not run: what COLO's secondary keeps of it.

use std::sync::Arc;
use std::time::Instant;

use colo_core::{CheckpointReport, ColoExit, Vm, VmError};
use migration_stream::dirty_bitmap::BitmapSections;
use migration_stream::early::EarlySections;
use migration_stream::opaque_tail::Tail;
use migration_stream::ram::BlockId;
use migration_stream::{DirtyLog, MemoryError};
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

/// The devices of a checkpoint.
#[derive(Debug)]
pub(super) struct Next {
    early: EarlySections,
    tail: Tail,
}

impl Vm for HeldVm {
    type Staged = Next;
    type Reset = Next;

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, VmError> {
        Ok(Instant::now())
    }

    fn save_devices(&mut self, _: &mut Vec<u8>) -> Result<(), VmError> {
        // A secondary is not asked.
        Err(VmError::new(
            "saving the devices",
            "a guest that is held has none of its own",
        ))
    }

    fn stage_devices(&mut self, state: &[u8]) -> Result<Next, VmError> {
        const WHAT: &str = "telling the device sections apart";
        let early = self.guest.early.followed_by(state);
        let (early, state) = early.map_err(|e| VmError::new(WHAT, e))?;
        let tail = self.guest.devices.tail.followed_by(state);
        let tail = tail.map_err(|e| VmError::new(WHAT, e))?;
        Ok(Next { early, tail })
    }

    fn reset_devices(&mut self, staged: Next) -> Result<Next, VmError> {
        Ok(staged)
    }

    fn install_devices(&mut self, next: Next) -> Result<(), VmError> {
        self.guest.early = next.early;
        self.guest.devices = Devices {
            tail: next.tail,
            bitmaps: BitmapSections::new(),
        };
        Ok(())
    }

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
