//! What COLO needs of a VMM.

use std::error::Error;

use migration_stream::{DeviceState, Vm, VmControl};

use crate::cause::{ColoExit, Role};
use crate::report::CheckpointReport;
use crate::step::{Step, StepPhase};

/// Watches COLO. A VM that wants to hear of nothing implements this without a method.
pub trait ColoObserver {
    /// A step begins, or has ended, whether it succeeded or not.
    fn on_step(&mut self, step: Step, phase: StepPhase) {
        let _ = (step, phase);
    }

    /// COLO has ended on this side (QMP event COLO_EXIT). Comes once.
    fn colo_exit(&mut self, exit: &ColoExit) {
        let _ = exit;
    }

    /// A checkpoint is complete and the VM runs.
    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        let _ = report;
    }
}

impl<C: ColoObserver, D> ColoObserver for Vm<C, D> {
    fn on_step(&mut self, step: Step, phase: StepPhase) {
        self.control.on_step(step, phase);
    }

    fn colo_exit(&mut self, exit: &ColoExit) {
        self.control.colo_exit(exit);
    }

    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        self.control.checkpoint_done(report);
    }
}

/// A VM that COLO can protect: it is paused and resumed, its devices are saved and loaded, and it is told.
///
/// Guest memory is the link's. [`DeviceState::reset`] comes before the checkpoint's pages reach the
/// guest, [`DeviceState::install`] after them.
pub trait ColoVm: VmControl + DeviceState + ColoObserver {}

impl<V: VmControl + DeviceState + ColoObserver> ColoVm for V {}

/// Disk replication: the secondary's writes are buffered until a checkpoint shows that they were
/// the primary's too.
pub trait Replication {
    /// COLO begins.
    ///
    /// # Errors
    /// COLO ends.
    fn start(&mut self, role: Role) -> Result<(), VmError>;

    /// An error met since the last call, if any. Asked in every checkpoint while it can still be
    /// dropped.
    ///
    /// # Errors
    /// COLO ends.
    fn check(&mut self) -> Result<(), VmError>;

    /// The disks are the same from here: the secondary drops its own writes.
    ///
    /// On the primary the VM is stopped. Unless with [`Resume::OnLoaded`](crate::Resume::OnLoaded)
    /// it runs before the secondary has done this step: what it writes then belongs to the next
    /// checkpoint, and must not become part of the secondary's disk with this one.
    ///
    /// # Errors
    /// On the primary COLO ends; the secondary's VM is not run again.
    fn checkpoint(&mut self) -> Result<(), VmError>;

    /// COLO is over; with `failover` this side's disk becomes the disk. Without effect if
    /// replication was not started.
    ///
    /// # Errors
    /// With `failover` the secondary's VM is not run again.
    fn stop(&mut self, failover: bool) -> Result<(), VmError>;
}

/// A VM whose disks need no replication: it has none, or both sides see the same.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoReplication;

impl Replication for NoReplication {
    fn start(&mut self, _role: Role) -> Result<(), VmError> {
        Ok(())
    }

    fn check(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn stop(&mut self, _failover: bool) -> Result<(), VmError> {
        Ok(())
    }
}

/// What stands between the guest's output and the world.
pub trait PacketGate {
    /// Holds output back from now on.
    ///
    /// # Errors
    /// COLO ends.
    fn hold(&mut self) -> Result<(), VmError>;

    /// Primary: the VM has stopped for a checkpoint, which will contain the state that all output
    /// so far came from. It is held on, and told apart from what the guest puts out from now on.
    ///
    /// # Errors
    /// COLO ends.
    fn cut(&mut self) -> Result<(), VmError>;

    /// Primary: lets out what was held at the last [`PacketGate::cut`], and no more: the other side
    /// has the state it came from. The guest may run by now.
    ///
    /// # Errors
    /// COLO ends.
    fn release(&mut self) -> Result<(), VmError>;

    /// Secondary: forgets what is held. The state it came from is gone.
    ///
    /// # Errors
    /// The secondary's VM is not run again.
    fn discard(&mut self) -> Result<(), VmError>;

    /// Lets out what is held and holds nothing back any more: this side is the VM, and goes on even
    /// if what was held cannot be let out. Without effect if output was not held.
    fn open(&mut self);
}

/// A VM whose output is not held back. What it has put out since the last checkpoint may come twice
/// or differ after a failover.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGate;

impl PacketGate for NoGate {
    fn hold(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn cut(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn release(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn discard(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn open(&mut self) {}
}

/// An error of the VMM's own.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct VmError {
    /// What was attempted, in the words of the VMM's log.
    pub what: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

impl VmError {
    /// An error of the attempt `what`.
    pub fn new(what: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            what,
            source: source.into(),
        }
    }
}
