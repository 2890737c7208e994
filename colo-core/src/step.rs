//! The steps of COLO, and how long each may take.

use std::{fmt, io};

use crate::message::Message;

/// One step of COLO.
///
/// A step *on the wire* talks to the peer and has a deadline; any other is local. What was sent
/// must be on its way before a step begins that sends nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Wire: send a message that nothing follows, or [`Message::VmstateSend`].
    Send(Message),
    /// Wire: wait.
    Await(Wait),
    /// Wire: send the RAM as a section stream that ends with EOF: as it is, with the VM stopped, or
    /// as it was kept by [`Step::FreezeRam`].
    SendRam,
    /// Wire: send [`Message::VmstateSize`], the size, and the device state that was saved.
    SendDevices,
    /// Wire: read the section stream with the RAM into the cache. No page of it may reach the guest.
    ReceiveRam,
    /// Wire: read the size ([`decode_device_size`](crate::message::decode_device_size)) and the
    /// device state into a buffer.
    ReceiveDevices,
    /// Stop the VM.
    PauseVm,
    /// Let the VM run.
    ResumeVm,
    /// Wire: begin to log which pages the secondary's guest writes, and have pages belong to
    /// checkpoints from here on, when every channel has ended the packet that it is in. RAM and
    /// cache differ from here on.
    StartDirtyLog,
    /// Save the state of all devices into a buffer, with the VM stopped.
    SaveDevices,
    /// Copy RAM that the guest has written, while it runs on: all that is copied now need not be
    /// when it stands still, unless it is written again.
    CopyRam,
    /// Copy what the guest has written since, with the VM stopped: [`Step::SendRam`] sends the RAM
    /// of this moment, and the VM may run.
    FreezeRam,
    /// Parse and check all of the received device state without touching a device, and check that
    /// the received RAM is complete. After this nothing that can be foreseen may fail.
    StageDevices,
    /// Reset all devices. Before [`Step::Flush`], because a reset may write RAM.
    Reset,
    /// Copy every page that either side has written since the last checkpoint from cache to RAM.
    Flush,
    /// Put the staged device state into the devices.
    InstallDevices,
    /// Start disk replication on this side.
    StartReplication,
    /// Ask disk replication whether it has met an error since.
    CheckReplication,
    /// Tell disk replication that this is a checkpoint.
    CheckpointReplication,
    /// Stop disk replication.
    StopReplication {
        /// This side's disk becomes the disk: what is only buffered is committed.
        failover: bool,
    },
    /// Hold the guest's output back from now on.
    HoldOutput,
    /// Take note, with the VM stopped, that what the guest has put out so far came before the
    /// checkpoint.
    CutOutput,
    /// Let out what the guest has put out before the checkpoint.
    ReleaseOutput,
    /// Forget what the guest has put out: its state was replaced by the primary's, which puts out
    /// its own.
    DiscardOutput,
    /// Let everything out, and hold nothing back any more.
    OpenOutput,
    /// A checkpoint is complete: report it and count the delay to the next.
    ReportCheckpoint,
    /// Shut both directions of every connection to the peer, so that it learns of the end at once.
    Disconnect,
}

impl Step {
    /// How long the step may take; `None` for a local one.
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

    /// Is this the first step of a checkpoint on its side?
    #[must_use]
    pub(crate) const fn begins_checkpoint(self) -> bool {
        matches!(
            self,
            Self::Send(Message::CheckpointRequest | Message::CheckpointReply)
        )
    }

    /// Is this the wait between two checkpoints, in which the background transfer goes on, on other
    /// channels than the main one? A secondary takes them into its cache, of which its
    /// guest sees nothing before that checkpoint is complete.
    #[must_use]
    pub(crate) const fn is_background(self) -> bool {
        matches!(self, Self::Await(Wait::CheckpointDue))
    }

    /// Can the step fail on its own side? Letting go of something cannot, nor can reporting.
    #[must_use]
    pub(crate) const fn may_fail(self) -> bool {
        !matches!(
            self,
            Self::OpenOutput | Self::ReportCheckpoint | Self::Disconnect
        )
    }

    /// Does the step talk to the peer?
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
    /// Nothing of it was done yet.
    Begins,
    /// All of it was done, or it failed.
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

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Wait {
    /// This message.
    Message(Message),
    /// The next checkpoint to become due (primary). The peer says nothing meanwhile, but its going
    /// away must be noticed.
    CheckpointDue,
    /// Somebody to decide which side goes on ([`OnPeerLoss::Wait`](crate::OnPeerLoss::Wait)).
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
    /// None of the peer's: the driver wakes when the checkpoint is due.
    Schedule,
    /// None: this waits for a person or a management layer, the VM in the state it was in.
    Operator,
}

/// How the peer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerLoss {
    /// It closed the connection, or its host did because the process is gone.
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
