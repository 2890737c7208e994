//! The secondary.

use crate::cause::Role;
use crate::machine::{Machine, Script, sealed};
use crate::message::Message;
use crate::step::{Step, Wait};

/// The secondary's machine.
///
/// The secondary's VM runs the same guest, unseen, and takes the primary's state over at every
/// checkpoint.
///
/// ```text
///   primary                          main channel / return path           secondary
///   (precopy is over, both VMs stopped in the same state)
///                                                                         hold output
///                                                                         start the dirty log
///                                                                         start replication
///                                                                         resume the vm
///   resumes its VM                 <------------ checkpoint-ready ------
///                                  -- checkpoint-request -------------->  <----------------.
///                                  <------------ checkpoint-reply ------                   |
///   stops its VM                                                          stop the vm      |
///                                  -- vmstate-send, RAM ... EOF ------->  into the cache   |
///                                  -- vmstate-size, size, devices ----->  into a buffer    |
///                                                                         check both       |
///   releases output                <------------ vmstate-received ------  ---- commit      |
///                                                                         reset devices    |
///                                                                         flush the cache  |
///                                                                         install devices  |
///                                                                         replication      |
///                                                                         discard output   |
///                                                                         ---- committed   |
///   resumes its VM                 <------------ vmstate-loaded --------                   |
///                                                                         resume the vm    |
///                                                                         report  ---------'
/// ```
///
/// - A checkpoint is all or nothing. Until all of it has arrived and was checked, neither guest RAM
///   nor a device has changed: whatever happens, the checkpoint is dropped and the VM goes on from
///   its own state.
/// - *vmstate-received* is the promise to carry this checkpoint on, since the primary lets out the
///   output that belongs to it. So the commit begins with the attempt to send it, from which
///   nobody can tell whether the primary has read it; and a failover requested in the commit takes
///   effect after it. (QEMU calls that a relaunch.)
/// - A commit that breaks off half way leaves a VM that is neither the old nor the new one. It
///   never runs again.
/// - The reply is sent before the VM stops: the primary need not wait until the secondary's vCPUs
///   have stopped, which only the dirty log and the flush need.
pub type Secondary = Machine<SecondaryScript>;

/// The secondary's steps, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each names the step it stands for")]
pub enum SecondaryScript {
    HoldOutput,
    StartDirtyLog,
    StartReplication,
    Start,
    SendReady,
    AwaitRequest,
    SendReply,
    PauseVm,
    AwaitVmstate,
    ReceiveRam,
    AwaitVmstateSize,
    ReceiveDevices,
    StageDevices,
    CheckReplication,
    // The commit.
    SendReceived,
    Reset,
    Flush,
    InstallDevices,
    CheckpointReplication,
    DiscardOutput,
    // Committed.
    SendLoaded,
    Resume,
    Report,
}

impl sealed::Sealed for SecondaryScript {}

impl Script for SecondaryScript {
    const ROLE: Role = Role::Secondary;

    const FIRST: Self = Self::HoldOutput;

    fn step(self) -> Step {
        match self {
            Self::HoldOutput => Step::HoldOutput,
            Self::StartDirtyLog => Step::StartDirtyLog,
            Self::StartReplication => Step::StartReplication,
            Self::Start => Step::ResumeVm,
            Self::SendReady => Step::Send(Message::CheckpointReady),
            Self::AwaitRequest => Step::Await(Wait::Message(Message::CheckpointRequest)),
            Self::SendReply => Step::Send(Message::CheckpointReply),
            Self::PauseVm => Step::PauseVm,
            Self::AwaitVmstate => Step::Await(Wait::Message(Message::VmstateSend)),
            Self::ReceiveRam => Step::ReceiveRam,
            Self::AwaitVmstateSize => Step::Await(Wait::Message(Message::VmstateSize)),
            Self::ReceiveDevices => Step::ReceiveDevices,
            Self::StageDevices => Step::StageDevices,
            Self::CheckReplication => Step::CheckReplication,
            Self::SendReceived => Step::Send(Message::VmstateReceived),
            Self::Reset => Step::Reset,
            Self::Flush => Step::Flush,
            Self::InstallDevices => Step::InstallDevices,
            Self::CheckpointReplication => Step::CheckpointReplication,
            Self::DiscardOutput => Step::DiscardOutput,
            Self::SendLoaded => Step::Send(Message::VmstateLoaded),
            Self::Resume => Step::ResumeVm,
            Self::Report => Step::ReportCheckpoint,
        }
    }

    fn next(self) -> Self {
        match self {
            Self::HoldOutput => Self::StartDirtyLog,
            Self::StartDirtyLog => Self::StartReplication,
            Self::StartReplication => Self::Start,
            Self::Start => Self::SendReady,
            Self::SendReady | Self::Report => Self::AwaitRequest,
            Self::AwaitRequest => Self::SendReply,
            Self::SendReply => Self::PauseVm,
            Self::PauseVm => Self::AwaitVmstate,
            Self::AwaitVmstate => Self::ReceiveRam,
            Self::ReceiveRam => Self::AwaitVmstateSize,
            Self::AwaitVmstateSize => Self::ReceiveDevices,
            Self::ReceiveDevices => Self::StageDevices,
            Self::StageDevices => Self::CheckReplication,
            Self::CheckReplication => Self::SendReceived,
            Self::SendReceived => Self::Reset,
            Self::Reset => Self::Flush,
            Self::Flush => Self::InstallDevices,
            Self::InstallDevices => Self::CheckpointReplication,
            Self::CheckpointReplication => Self::DiscardOutput,
            Self::DiscardOutput => Self::SendLoaded,
            Self::SendLoaded => Self::Resume,
            Self::Resume => Self::Report,
        }
    }

    fn is_commit(self) -> bool {
        matches!(
            self,
            Self::SendReceived
                | Self::Reset
                | Self::Flush
                | Self::InstallDevices
                | Self::CheckpointReplication
                | Self::DiscardOutput
        )
    }
}
