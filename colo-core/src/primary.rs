//! The primary: its VM is the one the world sees, and its state is copied.
//!
//! ```text
//!   primary                          main channel / return path           secondary
//!   (precopy is over, both VMs stopped in the same state)
//!                                  <------------ checkpoint-ready ------  its VM runs
//!   hold output, start replication
//!   resume the vm
//! ,-> wait until a checkpoint is due
//! |                                -- checkpoint-request -------------->
//! |                                <------------ checkpoint-reply ------  stops its VM
//! | stop the vm
//! | mark what was put out so far
//! | save devices
//! |                                -- vmstate-send, RAM ... EOF ------->  into the cache
//! |                                -- vmstate-size, size, devices ----->  into a buffer
//! |                                                                       all here, all sound?
//! |                                <------------ vmstate-received ------  commit begins
//! | release output                                                        reset, flush, install
//! |                                <------------ vmstate-loaded --------  commit is over
//! | resume the vm                                                         resumes its VM
//! `-- report the checkpoint
//! ```
//!
//! - The VM stops only when the reply has come: a secondary that does not answer costs no pause.
//! - Devices are saved before RAM is sent although they travel after it, because saving may still
//!   write guest memory (a queue that is drained), and those pages belong to this checkpoint.
//! - Output of the time before the checkpoint is released when the secondary has received all of it
//!   and not before: then a survivor on either side knows what the world has seen.
//! - The primary's VM is sound at every moment, so the script can be left after any step.

use crate::cause::Role;
use crate::machine::{Machine, Script, sealed};
use crate::message::Message;
use crate::step::{Step, Wait};

/// The primary's machine.
pub type Primary = Machine<PrimaryScript>;

/// The primary's steps, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each names the step it stands for")]
pub enum PrimaryScript {
    AwaitReady,
    HoldOutput,
    StartReplication,
    Start,
    AwaitCheckpoint,
    SendRequest,
    AwaitReply,
    StopVm,
    CutOutput,
    CheckReplication,
    CheckpointReplication,
    SaveDevices,
    SendVmstate,
    SendRam,
    SendDevices,
    AwaitReceived,
    ReleaseOutput,
    AwaitLoaded,
    Resume,
    Report,
}

impl sealed::Sealed for PrimaryScript {}

impl Script for PrimaryScript {
    const ROLE: Role = Role::Primary;

    const FIRST: Self = Self::AwaitReady;

    fn step(self) -> Step {
        match self {
            Self::AwaitReady => Step::Await(Wait::Message(Message::CheckpointReady)),
            Self::HoldOutput => Step::HoldOutput,
            Self::StartReplication => Step::StartReplication,
            Self::Start => Step::ResumeVm,
            Self::AwaitCheckpoint => Step::Await(Wait::CheckpointDue),
            Self::SendRequest => Step::Send(Message::CheckpointRequest),
            Self::AwaitReply => Step::Await(Wait::Message(Message::CheckpointReply)),
            Self::StopVm => Step::StopVm,
            Self::CutOutput => Step::CutOutput,
            Self::CheckReplication => Step::CheckReplication,
            Self::CheckpointReplication => Step::CheckpointReplication,
            Self::SaveDevices => Step::SaveDevices,
            Self::SendVmstate => Step::Send(Message::VmstateSend),
            Self::SendRam => Step::SendRam,
            Self::SendDevices => Step::SendDevices,
            Self::AwaitReceived => Step::Await(Wait::Message(Message::VmstateReceived)),
            Self::ReleaseOutput => Step::ReleaseOutput,
            Self::AwaitLoaded => Step::Await(Wait::Message(Message::VmstateLoaded)),
            Self::Resume => Step::ResumeVm,
            Self::Report => Step::ReportCheckpoint,
        }
    }

    fn next(self) -> Self {
        match self {
            Self::AwaitReady => Self::HoldOutput,
            Self::HoldOutput => Self::StartReplication,
            Self::StartReplication => Self::Start,
            Self::Start | Self::Report => Self::AwaitCheckpoint,
            Self::AwaitCheckpoint => Self::SendRequest,
            Self::SendRequest => Self::AwaitReply,
            Self::AwaitReply => Self::StopVm,
            Self::StopVm => Self::CutOutput,
            Self::CutOutput => Self::CheckReplication,
            Self::CheckReplication => Self::CheckpointReplication,
            Self::CheckpointReplication => Self::SaveDevices,
            Self::SaveDevices => Self::SendVmstate,
            Self::SendVmstate => Self::SendRam,
            Self::SendRam => Self::SendDevices,
            Self::SendDevices => Self::AwaitReceived,
            Self::AwaitReceived => Self::ReleaseOutput,
            Self::ReleaseOutput => Self::AwaitLoaded,
            Self::AwaitLoaded => Self::Resume,
            Self::Resume => Self::Report,
        }
    }

    fn is_commit(self) -> bool {
        false
    }
}
