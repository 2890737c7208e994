//! What COLO needs of a VMM.

use std::error::Error;
use std::time::Instant;

use crate::cause::{ColoExit, Role};
use crate::report::CheckpointReport;
use crate::step::{Step, StepPhase};

/// The VM, as far as checkpoints go beyond its memory.
pub trait Vm {
    /// Device state that was parsed and checked and only waits to be installed.
    type Staged;

    /// The same once the devices have been reset for it.
    type Reset;

    /// Pauses all vCPUs and whatever else writes guest memory. When it returns, the dirty log can be
    /// read and devices can be saved. Without effect on a paused VM.
    ///
    /// # Errors
    /// The VM may still run.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets the VM run. Returns when it was let go, with which its pause ends: the threads of a VM
    /// that runs may keep the driver's from its processor before it can look at a clock itself.
    ///
    /// # Errors
    /// The VM is still stopped.
    fn resume(&mut self) -> Result<Instant, VmError>;

    /// Appends the state of all devices to `out`: a FULL section with its footer for each, and
    /// EOF. No stream header, no configuration, no vmdesc. The VM is stopped.
    ///
    /// # Errors
    /// A device could not be read.
    fn save_devices(&mut self, out: &mut Vec<u8>) -> Result<(), VmError>;

    /// Parses and checks what [`Vm::save_devices`] of the peer has written, without changing a
    /// device. What passes here must not be refused by [`Vm::install_devices`].
    ///
    /// # Errors
    /// The state is not whole, not sound, or not of this VM.
    fn stage_devices(&mut self, state: &[u8]) -> Result<Self::Staged, VmError>;

    /// Resets all devices, as before the load of a snapshot: without an event. May write guest
    /// memory; the flush comes after it.
    ///
    /// # Errors
    /// The VM is then in no defined state and is not run again.
    fn reset_devices(&mut self, staged: Self::Staged) -> Result<Self::Reset, VmError>;

    /// Puts staged state into the devices that were reset for it, guest memory being the
    /// checkpoint's already.
    ///
    /// # Errors
    /// As for [`Vm::reset_devices`].
    fn install_devices(&mut self, reset: Self::Reset) -> Result<(), VmError>;

    /// Optional, for observability only: a step begins, or has ended, whether it succeeded or not. Called in
    /// the driver's thread.
    fn on_step(&mut self, step: Step, phase: StepPhase) {
        let _ = (step, phase);
    }

    /// COLO has ended on this side (QMP event COLO_EXIT). Comes once.
    fn colo_exit(&mut self, exit: &ColoExit);

    /// A checkpoint is complete and the VM runs.
    fn checkpoint_done(&mut self, report: &CheckpointReport);
}

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
