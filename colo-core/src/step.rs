//! The steps of COLO, and how long each may take.

use std::{fmt, io};

use crate::message::Message;

/// One step of COLO.
///
/// A step *on the wire* talks to the peer and has a deadline. Any other step is local. All sent bytes must be on
/// their way before a step begins that sends nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Wire: send a message without a payload, or [`Message::VmstateSend`].
    Send(Message),
    /// Wire: wait.
    Await(Wait),
    /// Wire: send the RAM as a section stream that ends with EOF. The RAM is the paused VM's, or the copy of
    /// [`Step::FreezeRam`].
    SendRam,
    /// Wire: send [`Message::VmstateSize`], the size, and the saved device state.
    SendDevices,
    /// Wire: read the section stream with the RAM into the cache. No page of it may reach the guest.
    ReceiveRam,
    /// Wire: read the size ([`decode_device_size`](crate::message::decode_device_size)) and the
    /// device state into a buffer.
    ReceiveDevices,
    /// Pause the VM.
    PauseVm,
    /// Resume the VM.
    ResumeVm,
    /// Wire: begin to log which pages the secondary's guest writes, and have pages belong to
    /// checkpoints from here on, when every channel has ended the packet that it is in. RAM and
    /// cache differ from here on.
    StartDirtyLog,
    /// Save the state of all devices into a buffer, with the VM paused.
    SaveDevices,
    /// Copy written RAM while the guest runs. The pause then copies only pages that are written again.
    CopyRam,
    /// Copy the RAM written since, with the VM paused. [`Step::SendRam`] sends the RAM of this moment, and the VM
    /// may run.
    FreezeRam,
    /// Parse and check all of the received device state without touching a device, and check that
    /// the received RAM is complete. No foreseeable error may come after this.
    StageDevices,
    /// Reset all devices. Before [`Step::Flush`], because a reset may write RAM.
    Reset,
    /// Copy every page that either side has written since the last checkpoint from cache to RAM.
    Flush,
    /// Put the staged device state into the devices.
    InstallDevices,
    /// Start disk replication on this side.
    StartReplication,
    /// Ask disk replication for errors since the last checkpoint.
    CheckReplication,
    /// Tell disk replication that this is a checkpoint.
    CheckpointReplication,
    /// Stop disk replication.
    StopReplication {
        /// This side's disk becomes the disk: buffered writes are committed.
        failover: bool,
    },
    /// Hold the guest's output from now on.
    HoldOutput,
    /// Mark the guest's output so far as older than the checkpoint, with the VM paused.
    CutOutput,
    /// Release the guest's output from before the checkpoint.
    ReleaseOutput,
    /// Drop the guest's held output: the primary's state has replaced the state it came from.
    DiscardOutput,
    /// Release all output, and hold nothing any more.
    OpenOutput,
    /// A checkpoint is complete: report it and count the delay to the next.
    ReportCheckpoint,
    /// Shut both directions of every connection to the peer, so that it learns of the end at once.
    Disconnect,
}

impl Step {
    /// Returns the bound of the step; `None` for a local one.
    #[must_use]
    pub(crate) const fn bound(self) -> Option<Bound> {
        match self {
            Self::Send(_) | Self::StartDirtyLog => Some(Bound::Message),
            Self::Await(wait) => Some(wait.bound()),
            Self::SendRam | Self::SendDevices | Self::ReceiveRam | Self::ReceiveDevices => {
                Some(Bound::Checkpoint)
            }
            _ => None,
        }
    }

    /// Returns whether this is the first step of a checkpoint on its side.
    #[must_use]
    pub(crate) const fn begins_checkpoint(self) -> bool {
        matches!(
            self,
            Self::Send(Message::CheckpointRequest | Message::CheckpointReply)
        )
    }

    /// Returns whether this is the wait between two checkpoints, in which the background transfer goes on, on other
    /// channels than the main one. A secondary takes these pages into its cache. Its guest sees none of them before
    /// that checkpoint is complete.
    #[must_use]
    pub(crate) const fn is_background(self) -> bool {
        matches!(self, Self::Await(Wait::CheckpointDue))
    }

    /// Returns whether the step can fail on its own side. Releasing and reporting cannot.
    #[must_use]
    pub(crate) const fn may_fail(self) -> bool {
        !matches!(
            self,
            Self::OpenOutput | Self::ReportCheckpoint | Self::Disconnect
        )
    }

    /// Returns whether the step talks to the peer.
    #[must_use]
    pub(crate) const fn is_on_the_wire(self) -> bool {
        self.bound().is_some()
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Send(message) => return write!(f, "sending {message}"),
            Self::Await(wait) => return write!(f, "waiting for {wait}"),
            Self::SendRam => "sending ram",
            Self::SendDevices => "sending device state",
            Self::ReceiveRam => "receiving ram",
            Self::ReceiveDevices => "receiving device state",
            Self::PauseVm => "stopping the vm",
            Self::ResumeVm => "resuming the vm",
            Self::StartDirtyLog => "starting the dirty log",
            Self::SaveDevices => "saving device state",
            Self::CopyRam => "copying ram of the running vm",
            Self::FreezeRam => "keeping ram",
            Self::StageDevices => "checking received device state",
            Self::Reset => "resetting devices",
            Self::Flush => "flushing the ram cache",
            Self::InstallDevices => "installing device state",
            Self::StartReplication => "starting replication",
            Self::CheckReplication => "checking replication",
            Self::CheckpointReplication => "checkpointing replication",
            Self::StopReplication { failover: false } => "stopping replication",
            Self::StopReplication { failover: true } => "failing over replication",
            Self::HoldOutput => "holding output",
            Self::CutOutput => "marking output",
            Self::ReleaseOutput => "releasing output",
            Self::DiscardOutput => "discarding output",
            Self::OpenOutput => "opening output",
            Self::ReportCheckpoint => "reporting the checkpoint",
            Self::Disconnect => "disconnecting",
        })
    }
}

/// The two ends of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StepPhase {
    /// The step has not begun.
    Begins,
    /// The step is done, or has failed.
    Ended,
}

impl fmt::Display for StepPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begins => "begins",
            Self::Ended => "ended",
        })
    }
}

/// The object of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Wait {
    /// This message.
    Message(Message),
    /// The next checkpoint to become due (primary). The peer sends nothing meanwhile, but its loss must be noticed.
    CheckpointDue,
    /// A decision which side goes on ([`OnPeerLoss::Wait`](crate::OnPeerLoss::Wait)).
    Decision,
}

impl Wait {
    const fn bound(self) -> Bound {
        match self {
            Self::Message(Message::CheckpointRequest) => Bound::Idle,
            // The peer works before it sends these.
            Self::Message(
                Message::CheckpointReady | Message::VmstateReceived | Message::VmstateLoaded,
            ) => Bound::Checkpoint,
            Self::Message(_) => Bound::Message,
            Self::CheckpointDue => Bound::Schedule,
            Self::Decision => Bound::Operator,
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(message) => message.fmt(f),
            Self::CheckpointDue => f.write_str("the next checkpoint"),
            Self::Decision => f.write_str("a decision which side goes on"),
        }
    }
}

/// What bounds a step on the wire. [`Timekeeper`](crate::deadline::Timekeeper) makes an instant
/// of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Bound {
    /// The deadline of a message the peer owes at once.
    Message,
    /// The deadline of the whole checkpoint.
    Checkpoint,
    /// The deadline of the secondary for the next request.
    Idle,
    /// No bound for the peer: the driver wakes when the checkpoint is due.
    Schedule,
    /// No bound: this waits for an operator. The VM stays in its state.
    Operator,
}

/// How the peer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerLoss {
    /// It closed the connection, or its host did because the process has ended.
    Closed,
    /// The connection failed.
    Io(io::ErrorKind),
}

impl fmt::Display for PeerLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("connection closed"),
            Self::Io(kind) => kind.fmt(f),
        }
    }
}
