//! The machines over real channels: what carries their steps out.
//!
//! A driver runs in a thread of its own, blocks on nothing without a deadline, and takes requests
//! from other threads through a [`ColoControl`]. It holds no lock while it waits, so that a peer
//! that stalls stalls nothing but the checkpoint.

mod background;
mod control;
mod primary;
mod secondary;
mod session;
#[cfg(test)]
mod tests;
mod wake;

use std::io;
use std::time::Instant;

use migration_stream::precopy::{SourceError, TargetError};
use migration_stream::{TransportError, WhenToCompare};
use multifd::ChannelError;

pub use background::BackgroundTransfer;
pub use control::ColoControl;
pub use primary::{LinkError, PrimaryLink, run_primary};
pub use secondary::{SecondaryLink, run_secondary};

use self::session::Session;
use crate::action::{Action, Event, ProtocolMisuse};
use crate::deadline::Timekeeper;
use crate::machine::{Machine, Script};
use crate::message::decode_message;
use crate::report::CheckpointMeter;
use crate::step::{PeerLoss, Step, StepPhase, Wait};
use crate::store::StoreError;
use crate::{
    ColoVm, Deadlines, NoGate, NoReplication, OnPeerLoss, Outcome, PacketGate, Replication, VmError,
};

/// How a driver runs one side of COLO. Made by `default`, which suits both sides.
#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    deadlines: Deadlines,
    on_loss: OnPeerLoss,
    max_device_state: usize,
    background: Option<BackgroundTransfer>,
    elide_unchanged: Option<WhenToCompare>,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            deadlines: Deadlines::default(),
            on_loss: OnPeerLoss::default(),
            max_device_state: 64 << 20,
            background: None,
            elide_unchanged: None,
        }
    }
}

impl DriverConfig {
    /// Limits how long the peer may take. A limit that passes ends COLO on this side, so a short one takes a slow
    /// host for a lost one. Defaults: see [`Deadlines`].
    #[must_use]
    pub const fn deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// Sets what this side does when COLO has ended without a request; the default is
    /// [`OnPeerLoss::Wait`]. With [`OnPeerLoss::TakeOver`] on both sides a broken link leaves two running
    /// guests.
    #[must_use]
    pub const fn on_loss(mut self, on_loss: OnPeerLoss) -> Self {
        self.on_loss = on_loss;
        self
    }

    /// Secondary: accepts at most `bytes` of device state in a checkpoint; the default is 64 MiB. A hostile
    /// primary can make this side take that much memory. A checkpoint with more ends COLO.
    #[must_use]
    pub const fn max_device_state(mut self, bytes: usize) -> Self {
        self.max_device_state = bytes;
        self
    }

    /// Primary: sends pages between checkpoints. By default pages are sent in checkpoints only. Costs
    /// bandwidth for pages that are written again, and shortens the pause.
    #[must_use]
    pub fn background(mut self, transfer: impl Into<Option<BackgroundTransfer>>) -> Self {
        self.background = transfer.into();
        self
    }

    /// Primary: leaves pages out of checkpoints that the secondary has already, which takes a comparison
    /// of dirty pages. By default none are compared. See [`migration_stream::raw::unchanged`].
    #[must_use]
    pub fn elide_unchanged(mut self, when: impl Into<Option<WhenToCompare>>) -> Self {
        self.elide_unchanged = when.into();
        self
    }
}

/// The VM and what stands around it, in a driver's hands.
#[derive(Debug)]
pub struct Hooks<V, R, G> {
    /// The VM.
    pub vm: V,
    /// Its disks.
    pub replication: R,
    /// Its output.
    pub gate: G,
}

impl<V> Hooks<V, NoReplication, NoGate> {
    /// A VM whose disks nobody replicates, and whose output nobody holds.
    pub const fn alone(vm: V) -> Self {
        Self {
            vm,
            replication: NoReplication,
            gate: NoGate,
        }
    }
}

/// Why a step failed, with the error that the machine does not keep.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    DeviceState(#[from] crate::message::DeviceStateTooLarge),
}

impl StepError {
    /// What the error means to a machine in `step`. Only what the transport itself reports is a
    /// lost peer; anything that was wrong with what it carried is a failure, and so is whatever
    /// ends a local step.
    fn event(&self, step: Step) -> Event {
        if !step.is_on_the_wire() {
            return Event::Failed;
        }
        let kind = match self {
            Self::Io(e)
            | Self::Source(SourceError::Stream(e))
            | Self::Target(TargetError::Stream { source: e, .. } | TargetError::ReturnPath(e)) => {
                e.kind()
            }
            Self::Source(SourceError::Transport(e)) | Self::Target(TargetError::Transport(e)) => {
                match transport_kind(e) {
                    Some(kind) => kind,
                    None => return Event::Failed,
                }
            }
            _ => return Event::Failed,
        };
        match kind {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Event::DeadlineExpired,
            io::ErrorKind::InvalidData => Event::Failed,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::WriteZero => {
                Event::PeerLost(PeerLoss::Closed)
            }
            kind => Event::PeerLost(PeerLoss::Io(kind)),
        }
    }
}

/// The I/O error at the bottom of a transport's error, or what multifd's own words amount to as
/// one; `None` if the transport did its work.
fn transport_kind(error: &TransportError) -> Option<io::ErrorKind> {
    match error.source.downcast_ref() {
        Some(ChannelError::Stalled { .. } | ChannelError::NoFlush { .. }) => {
            return Some(io::ErrorKind::TimedOut);
        }
        Some(ChannelError::Eof { .. } | ChannelError::Ended) => {
            return Some(io::ErrorKind::UnexpectedEof);
        }
        _ => {}
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*error.source);
    while let Some(error) = cause {
        if let Some(e) = error.downcast_ref::<io::Error>() {
            return Some(e.kind());
        }
        cause = error.source();
    }
    None
}

/// How a step came back to the driver.
enum Performed {
    /// It is over.
    Ended(Event),
    /// A wait was woken, for a request or for a new schedule. It begins again unless a request has
    /// ended it.
    Woken,
}

impl From<Event> for Performed {
    fn from(event: Event) -> Self {
        Self::Ended(event)
    }
}

/// What one side does with its connections.
trait Wire<V: ColoVm, R, G> {
    /// Carries out a step that only this side has, or that talks to the peer. A wait that is over gives
    /// its own event.
    fn perform(
        &mut self,
        step: Step,
        deadline: Option<Instant>,
        hooks: &mut Hooks<V, R, G>,
        meter: &mut CheckpointMeter,
    ) -> Result<Performed, StepError>;

    /// The VM is about to be let run, if it does not run already.
    fn before_resume(&mut self, _vm: &V) {}

    /// Shuts every connection.
    fn disconnect(&mut self);
}

/// Runs a machine to its end.
fn run<S, V, R, G>(
    mut machine: Machine<S>,
    wire: &mut impl Wire<V, R, G>,
    hooks: &mut Hooks<V, R, G>,
    control: &ColoControl,
    config: DriverConfig,
) -> Result<Outcome, ProtocolMisuse>
where
    S: Script,
    V: ColoVm,
    R: Replication,
    G: PacketGate,
{
    let mut time = Timekeeper::new(config.deadlines);
    let mut meter = CheckpointMeter::new();
    let mut session = Session::new(control);
    // What was asked for before this began has woken nobody.
    let mut next =
        take_requests(&mut machine, control).map(|next| next.unwrap_or_else(|| machine.action()));
    loop {
        let action = match next {
            Ok(action) => action,
            Err(mistake) => {
                tracing::error!(role = %control.role(), %mistake, "colo ends");
                wire.disconnect();
                session.mistake(&mut hooks.vm);
                return Err(mistake);
            }
        };
        if machine.is_broken() {
            control.slot().unfit();
        }
        let performed = match action {
            Action::Finish(outcome) => return Ok(outcome),
            Action::EmitExit(exit) => {
                session.exit(&mut hooks.vm, &exit);
                Event::Done.into()
            }
            Action::Perform(step) => {
                let began = Instant::now();
                let deadline = time.begin(step, began);
                control.step_begins(step, began);
                hooks.vm.on_step(step, StepPhase::Begins);
                let performed = perform(step, deadline, wire, hooks, control, &mut meter)
                    .unwrap_or_else(|error| {
                        let event = error.event(step);
                        let error: &dyn std::error::Error = &error;
                        tracing::warn!(role = %control.role(), %step, error, ?event, "colo step failed");
                        event.into()
                    });
                let ended = Instant::now();
                meter.step(step, began, ended);
                control.step_ended(step, ended);
                hooks.vm.on_step(step, StepPhase::Ended);
                performed
            }
        };
        next = deliver(&mut machine, performed, control);
    }
}

/// Hands requests over first, then the event the action ended with, unless a request has ended it. A
/// wait that was only woken goes on.
fn deliver<S: Script>(
    machine: &mut Machine<S>,
    performed: Performed,
    control: &ColoControl,
) -> Result<Action, ProtocolMisuse> {
    if let Some(next) = take_requests(machine, control)? {
        return Ok(next);
    }
    match performed {
        Performed::Woken => Ok(machine.action()),
        Performed::Ended(event) => Ok(machine.handle(event)?.unwrap_or_else(|| machine.action())),
    }
}

/// Hands over what was asked for; the next action if that has ended the present one.
fn take_requests<S: Script>(
    machine: &mut Machine<S>,
    control: &ColoControl,
) -> Result<Option<Action>, ProtocolMisuse> {
    let requests = [
        control.take_quit().then_some(Event::Quit),
        control
            .slot()
            .take_request()
            .then_some(Event::FailoverRequested),
    ];
    for request in requests.into_iter().flatten() {
        if let Some(next) = machine.handle(request)? {
            return Ok(Some(next));
        }
    }
    Ok(None)
}

/// Steps that are the same on both sides; the others are the wire's.
fn perform<V, R, G>(
    step: Step,
    deadline: Option<Instant>,
    wire: &mut impl Wire<V, R, G>,
    hooks: &mut Hooks<V, R, G>,
    control: &ColoControl,
    meter: &mut CheckpointMeter,
) -> Result<Performed, StepError>
where
    V: ColoVm,
    R: Replication,
    G: PacketGate,
{
    match step {
        Step::PauseVm => (hooks.vm)
            .pause()
            .map_err(|e| VmError::new("pausing the guest", e))?,
        Step::ResumeVm => {
            wire.before_resume(&hooks.vm);
            let resumed = hooks.vm.resume();
            meter.resumed(resumed.map_err(|e| VmError::new("resuming the guest", e))?);
        }
        Step::StartReplication => hooks.replication.start(control.role())?,
        Step::CheckReplication => hooks.replication.check()?,
        Step::CheckpointReplication => hooks.replication.checkpoint()?,
        Step::StopReplication { failover } => hooks.replication.stop(failover)?,
        Step::HoldOutput => hooks.gate.hold()?,
        Step::CutOutput => hooks.gate.cut()?,
        Step::ReleaseOutput => hooks.gate.release()?,
        Step::DiscardOutput => hooks.gate.discard()?,
        Step::OpenOutput => hooks.gate.open(),
        Step::ReportCheckpoint => {
            let report = meter.complete();
            hooks.vm.checkpoint_done(&report);
        }
        Step::Disconnect => wire.disconnect(),
        Step::Await(Wait::Decision) => control.wait_for_request(),
        _ => return wire.perform(step, deadline, hooks, meter),
    }
    Ok(match step {
        // A decision is a request, which is looked for next.
        Step::Await(_) => Performed::Woken,
        _ => Event::Done.into(),
    })
}

/// The event of a message's four bytes.
fn message_event(bytes: [u8; crate::message::MESSAGE_LEN]) -> Event {
    decode_message(bytes).map_or_else(|e| Event::UnknownMessage(e.number), Event::Message)
}
