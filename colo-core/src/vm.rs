//! The traits that a VMM implements for COLO.

use std::error::Error;

use migration_stream::{DeviceState, Vm, VmControl};

use crate::cause::{ColoExit, Role};
use crate::report::CheckpointReport;
use crate::step::{Step, StepPhase};

/// Watches COLO. Optional: an implementation without a method is complete.
pub trait ColoObserver {
    /// Tells that a step begins, or has ended with success or failure.
    fn on_step(&mut self, step: Step, phase: StepPhase) {
        let _ = (step, phase);
    }

    /// Tells that COLO has ended on this side (QMP event COLO_EXIT). Called once.
    fn colo_exit(&mut self, exit: &ColoExit) {
        let _ = exit;
    }

    /// Tells that a checkpoint is complete and the VM runs.
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

/// A VM that COLO can protect: control, device state and observer in one.
///
/// Guest memory belongs to the link. [`DeviceState::reset`] comes before the checkpoint's pages reach the
/// guest, [`DeviceState::install`] after them.
pub trait ColoVm: VmControl + DeviceState + ColoObserver {}

impl<V: VmControl + DeviceState + ColoObserver> ColoVm for V {}

/// Disk replication: the secondary's writes are buffered until a checkpoint replaces them by the primary's.
pub trait Replication {
    /// Starts: COLO begins.
    ///
    /// # Errors
    /// COLO ends.
    fn start(&mut self, role: Role) -> Result<(), VmError>;

    /// Returns an error that occurred since the last call. Called in every checkpoint while the checkpoint can
    /// still be dropped.
    ///
    /// # Errors
    /// COLO ends.
    fn check(&mut self) -> Result<(), VmError>;

    /// Makes both disks the same: the secondary drops its own writes.
    ///
    /// On the primary the VM is paused. With another [`Resume`](crate::Resume) than `OnLoaded` it runs before the
    /// secondary has done this step. Its writes then belong to the next checkpoint, and must not reach the
    /// secondary's disk with this one.
    ///
    /// # Errors
    /// On the primary COLO ends. The secondary's VM is not resumed.
    fn checkpoint(&mut self) -> Result<(), VmError>;

    /// Stops: COLO is over. With `failover` this side's disk becomes the disk. Without effect if replication was not
    /// started.
    ///
    /// # Errors
    /// With `failover` the secondary's VM is not resumed.
    fn stop(&mut self, failover: bool) -> Result<(), VmError>;
}

/// No replication: the VM has no disk, or both sides see the same disk.
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

/// Holds and releases the guest's output.
pub trait PacketGate {
    /// Holds output from now on.
    ///
    /// # Errors
    /// COLO ends.
    fn hold(&mut self) -> Result<(), VmError>;

    /// Primary: marks the output so far. The VM is paused for a checkpoint that will contain the state this output
    /// came from. The output stays held, apart from later output.
    ///
    /// # Errors
    /// COLO ends.
    fn cut(&mut self) -> Result<(), VmError>;

    /// Primary: releases the output up to the last [`PacketGate::cut`], and no more: the other side has the state it
    /// came from. The guest may run by now.
    ///
    /// # Errors
    /// COLO ends.
    fn release(&mut self) -> Result<(), VmError>;

    /// Secondary: drops the held output. The state it came from was replaced.
    ///
    /// # Errors
    /// The secondary's VM is not resumed.
    fn discard(&mut self) -> Result<(), VmError>;

    /// Releases all held output and holds nothing any more: this side goes on alone. Output that cannot be released
    /// is lost. Without effect if output was not held.
    fn open(&mut self);
}

/// No gate: output is never held. After a failover, output since the last checkpoint may come twice or differ.
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
    /// What was attempted, for the log.
    pub what: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

impl VmError {
    /// Returns an error of the attempt `what`.
    pub fn new(what: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            what,
            source: source.into(),
        }
    }
}
