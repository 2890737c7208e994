//! What a machine asks of its driver, and what the driver tells it.

use std::fmt;

use crate::cause::{ColoExit, Outcome};
use crate::message::Message;
use crate::step::{PeerLoss, Step};

/// What the driver has to do now.
///
/// There is one action at a time, because how it ends decides what comes next. The driver carries
/// it out and hands the machine the one [`Event`] it ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Carry out a step.
    Perform(Step),
    /// Tell the world that COLO has ended on this side (QMP event COLO_EXIT). Comes exactly once in
    /// the life of a machine; answered by [`Event::Done`].
    EmitExit(ColoExit),
    /// The machine is at its end and takes no more events.
    Finish(Outcome),
}

impl Action {
    /// Is this a wait, which a request ends (see [`Event::FailoverRequested`])?
    #[must_use]
    pub const fn is_wait(&self) -> bool {
        matches!(self, Self::Perform(Step::Await(_)))
    }

    /// Does this talk to the peer?
    #[must_use]
    pub const fn is_on_the_wire(&self) -> bool {
        matches!(self, Self::Perform(step) if step.is_on_the_wire())
    }

    /// May pages be sent on other channels than the main one meanwhile, for the checkpoint to come? A secondary
    /// takes them into its cache, of which its guest sees nothing before that checkpoint is complete.
    #[must_use]
    pub const fn is_background(&self) -> bool {
        matches!(self, Self::Perform(step) if step.is_background())
    }

    /// Can this fail on its own side ([`Event::Failed`])?
    #[must_use]
    pub const fn may_fail(&self) -> bool {
        matches!(self, Self::Perform(step) if step.may_fail())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Perform(step) => step.fmt(f),
            Self::EmitExit(exit) => write!(f, "reporting that {exit}"),
            Self::Finish(outcome) => write!(f, "finished: {outcome}"),
        }
    }
}

/// What the driver tells a machine.
///
/// Every action ends with exactly one event. A local step: [`Event::Done`] or, if it
/// [may fail](Action::may_fail), [`Event::Failed`].
/// A step on the wire that is no wait: also [`Event::PeerLost`] or [`Event::DeadlineExpired`]. A
/// wait: what was waited for, or any event but `Done`. [`Event::FailoverRequested`] and
/// [`Event::Quit`] may in addition be handed over during any action. They end a wait; during
/// anything else the machine keeps them in mind and the action still owes its own event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The action has been carried out.
    Done,
    /// It failed through no loss of the peer: the VMM's error, or received data that is not sound.
    Failed,
    /// A message was received.
    Message(Message),
    /// What was received is the number of no message.
    UnknownMessage(u32),
    /// A checkpoint is due.
    CheckpointDue,
    /// The connection to the peer is broken.
    PeerLost(PeerLoss),
    /// The bound of the step has passed.
    DeadlineExpired,
    /// This side was told to go on alone (QMP `x-colo-lost-heartbeat`). Always handed over before
    /// the event an action ended with, so that a connection broken *by* the request is never taken
    /// for the reason of the end.
    FailoverRequested,
    /// The VM ends: it was told to quit or the guest has shut down.
    Quit,
}

/// The driver handed over an event that the present action cannot end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {event:?} does not belong to {action}")]
pub struct ProtocolMisuse {
    /// The present action.
    pub(crate) action: Action,
    /// The event.
    pub(crate) event: Event,
}
