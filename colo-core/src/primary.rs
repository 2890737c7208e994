//! The primary.

use crate::cause::{OnPeerLoss, Role};
use crate::machine::{Machine, Script, sealed};
use crate::message::Message;
use crate::step::{Step, Wait};

/// The primary's machine.
///
/// The primary's VM is the one the world sees, and its state is copied.
///
/// ```text
///   primary                          main channel / return path           secondary
///   (precopy is over, both VMs stopped in the same state)
///                                  <------------ checkpoint-ready ------  its VM runs
///   hold output, start replication
///   resume the vm
/// ,-> wait until a checkpoint is due
/// |                                -- checkpoint-request -------------->
/// |                                <------------ checkpoint-reply ------  stops its VM
/// | stop the vm
/// | mark what was put out so far
/// | save devices
/// |                                -- vmstate-send, RAM ... EOF ------->  into the cache
/// |                                -- vmstate-size, size, devices ----->  into a buffer
/// |                                                                       all here, all sound?
/// |                                <------------ vmstate-received ------  commit begins
/// | release output                                                        reset, flush, install
/// |                                <------------ vmstate-loaded --------  commit is over
/// | resume the vm                                                         resumes its VM
/// `-- report the checkpoint
/// ```
///
/// With [`Resume::OnReceived`] the last steps are in another order: the commit that the secondary
/// has promised is not waited for.
///
/// ```text
/// |                                <------------ vmstate-received ------  commit begins
/// | release output                                                        reset, flush, install
/// | resume the vm
/// |                                <------------ vmstate-loaded --------  resumes its VM
/// `-- report the checkpoint
/// ```
///
/// With [`Resume::OnLocalCopy`] the VM runs again as soon as its state is safe on this side:
///
/// ```text
/// ,-> wait until a checkpoint is due
/// |                                -- checkpoint-request -------------->
/// |                                <------------ checkpoint-reply ------  stops its VM
/// | copy ram, the vm runs
/// | stop the vm
/// | mark what was put out so far
/// | save devices
/// | copy what ram was written since
/// | resume the vm
/// |                                -- vmstate-send, RAM ... EOF ------->  into the cache
/// |                                -- vmstate-size, size, devices ----->  into a buffer
/// |                                <------------ vmstate-received ------  commit begins
/// | release output up to the mark
/// |                                <------------ vmstate-loaded --------  resumes its VM
/// `-- report the checkpoint
/// ```
///
/// - The VM stops only when the reply has come: a secondary that does not answer costs no pause.
/// - Devices are saved before RAM is sent although they travel after it, because saving may still
///   write guest memory (a queue that is drained), and those pages belong to this checkpoint.
/// - Output of the time before the checkpoint is released when the secondary has received all of it
///   and not before: then a survivor on either side knows what the world has seen.
/// - The primary's VM is sound at every moment, so the script can be left after any step.
/// - *vmstate-received* is a secondary's promise to carry the checkpoint on whatever becomes of the
///   primary, so a guest that runs from then on is in no other danger than one that runs from
///   *vmstate-loaded* on: a secondary whose commit fails is lost as if it had died a moment later, and
///   the primary goes on alone. Its own VM begins to run later than the primary's by its commit.
/// - With local-copy resume the guest may be ahead of a checkpoint that comes to nothing. The primary
///   goes on with it as it is. What it has put out since the mark is held until the *next*
///   checkpoint has been received, so a secondary that goes on from an older one contradicts
///   nothing that the world has heard. Without a gate that holds output (as with
///   [`NoGate`](crate::NoGate)) the world has heard all of it, with local-copy resume and without.
/// - A checkpoint does not begin before the one before it was loaded, whenever the VM resumes.
/// - Pages may be sent between checkpoints: while the primary waits for a checkpoint to
///   become due, and at no other time. Between the last synchronisation of a checkpoint and
///   *vmstate-loaded* the secondary's cache is flushed, and holds nothing but that checkpoint.
pub type Primary = Machine<PrimaryScript>;

/// When the primary's VM runs again in a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Resume {
    /// When the secondary has loaded the checkpoint, as in QEMU.
    #[default]
    OnLoaded,
    /// When the secondary has received the checkpoint: while it loads it.
    OnReceived,
    /// When its state was copied on this side.
    OnLocalCopy,
}

impl Primary {
    /// A primary whose VM runs again in every checkpoint when `resume` says.
    #[must_use]
    pub fn resuming(resume: Resume, on_loss: OnPeerLoss) -> Self {
        let first = PrimaryScript {
            resume,
            ..PrimaryScript::FIRST
        };
        Self::at(first, on_loss)
    }
}

/// The primary's steps, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrimaryScript {
    at: At,
    resume: Resume,
}

/// Each names the step it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    AwaitReady,
    HoldOutput,
    StartReplication,
    Start,
    AwaitCheckpoint,
    SendRequest,
    AwaitReply,
    CopyRam,
    PauseVm,
    CutOutput,
    CheckReplication,
    CheckpointReplication,
    SaveDevices,
    FreezeRam,
    SendVmstate,
    SendRam,
    SendDevices,
    AwaitReceived,
    ReleaseOutput,
    AwaitLoaded,
    Resume,
    Report,
}

impl At {
    fn next(self, resume: Resume) -> Self {
        match (self, resume) {
            (Self::AwaitReady, _) => Self::HoldOutput,
            (Self::HoldOutput, _) => Self::StartReplication,
            (Self::StartReplication, _) => Self::Start,
            (Self::Start | Self::Report, _) => Self::AwaitCheckpoint,
            (Self::AwaitCheckpoint, _) => Self::SendRequest,
            (Self::SendRequest, _) => Self::AwaitReply,
            (Self::AwaitReply, Resume::OnLocalCopy) => Self::CopyRam,
            (Self::AwaitReply | Self::CopyRam, _) => Self::PauseVm,
            (Self::PauseVm, _) => Self::CutOutput,
            (Self::CutOutput, _) => Self::CheckReplication,
            (Self::CheckReplication, _) => Self::CheckpointReplication,
            (Self::CheckpointReplication, _) => Self::SaveDevices,
            (Self::SaveDevices, Resume::OnLocalCopy) => Self::FreezeRam,
            (Self::SaveDevices, _) | (Self::Resume, Resume::OnLocalCopy) => Self::SendVmstate,
            (Self::SendVmstate, _) => Self::SendRam,
            (Self::SendRam, _) => Self::SendDevices,
            (Self::SendDevices, _) => Self::AwaitReceived,
            (Self::AwaitReceived, _) => Self::ReleaseOutput,
            (Self::ReleaseOutput, Resume::OnLoaded | Resume::OnLocalCopy)
            | (Self::Resume, Resume::OnReceived) => Self::AwaitLoaded,
            (Self::AwaitLoaded, Resume::OnLoaded)
            | (Self::ReleaseOutput, Resume::OnReceived)
            | (Self::FreezeRam, _) => Self::Resume,
            (Self::AwaitLoaded, Resume::OnReceived | Resume::OnLocalCopy)
            | (Self::Resume, Resume::OnLoaded) => Self::Report,
        }
    }
}

impl sealed::Sealed for PrimaryScript {}

impl Script for PrimaryScript {
    const ROLE: Role = Role::Primary;

    const FIRST: Self = Self {
        at: At::AwaitReady,
        resume: Resume::OnLoaded,
    };

    fn step(self) -> Step {
        match self.at {
            At::AwaitReady => Step::Await(Wait::Message(Message::CheckpointReady)),
            At::HoldOutput => Step::HoldOutput,
            At::StartReplication => Step::StartReplication,
            At::Start | At::Resume => Step::ResumeVm,
            At::AwaitCheckpoint => Step::Await(Wait::CheckpointDue),
            At::SendRequest => Step::Send(Message::CheckpointRequest),
            At::AwaitReply => Step::Await(Wait::Message(Message::CheckpointReply)),
            At::CopyRam => Step::CopyRam,
            At::PauseVm => Step::PauseVm,
            At::CutOutput => Step::CutOutput,
            At::CheckReplication => Step::CheckReplication,
            At::CheckpointReplication => Step::CheckpointReplication,
            At::SaveDevices => Step::SaveDevices,
            At::FreezeRam => Step::FreezeRam,
            At::SendVmstate => Step::Send(Message::VmstateSend),
            At::SendRam => Step::SendRam,
            At::SendDevices => Step::SendDevices,
            At::AwaitReceived => Step::Await(Wait::Message(Message::VmstateReceived)),
            At::ReleaseOutput => Step::ReleaseOutput,
            At::AwaitLoaded => Step::Await(Wait::Message(Message::VmstateLoaded)),
            At::Report => Step::ReportCheckpoint,
        }
    }

    fn next(self) -> Self {
        Self {
            at: self.at.next(self.resume),
            ..self
        }
    }

    fn is_commit(self) -> bool {
        false
    }
}
