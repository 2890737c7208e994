//! The engine under [`Primary`](crate::raw::Primary) and [`Secondary`](crate::raw::Secondary): it walks
//! their scripts, and leaves them for the [end](crate::ending) when something ends COLO.
//!
//! A script is the order of the steps when all goes well. What can go wrong is the same everywhere
//! and is decided here: a failed step, a lost peer, a passed deadline, a wrong message, a failover
//! request or a quit each end COLO at the end of the step they come in, except during the *commit*
//! of a script, which is gone through to its end first.

use std::fmt;

use crate::action::{Action, Event, ProtocolMisuse};
use crate::cause::{Cause, OnPeerLoss, Role};
use crate::ending::Ending;
use crate::step::{Step, Wait};

/// The order of one side's steps. Implemented by the scripts of this crate only.
pub trait Script: Copy + fmt::Debug + sealed::Sealed {
    /// Which side this is.
    const ROLE: Role;

    /// Where the script begins.
    const FIRST: Self;

    /// The step to do here.
    fn step(self) -> Step;

    /// Where to go when it is done.
    #[must_use]
    fn next(self) -> Self;

    /// Is this side's VM being replaced here? Once begun, that is finished whatever happens to the
    /// peer, and if it fails the VM must never run.
    fn is_commit(self) -> bool;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// One side of COLO, without I/O.
///
/// ```
/// use colo_core::raw::{Action, Event, Secondary};
/// use colo_core::{OnPeerLoss, Step};
///
/// let mut machine = Secondary::new(OnPeerLoss::Wait);
/// assert_eq!(machine.action(), Action::Perform(Step::HoldOutput));
/// let next = machine.handle(Event::Done)?;
/// assert_eq!(next, Some(Action::Perform(Step::StartDirtyLog)));
/// # Ok::<(), colo_core::ProtocolMisuse>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine<S> {
    state: State<S>,
    on_loss: OnPeerLoss,
    vm_runs: bool,
    pending: Pending,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State<S> {
    At(S),
    Ending(Ending),
}

/// What will end COLO as soon as the script may be left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Pending {
    quit: bool,
    failover: bool,
    failure: Option<Cause>,
}

impl Pending {
    /// The cause to act on. What somebody asked for comes before what went wrong: asking shuts the
    /// connection, so the error that follows says nothing.
    const fn cause(&self) -> Option<Cause> {
        if self.quit {
            Some(Cause::Quit)
        } else if self.failover {
            Some(Cause::FailoverRequested)
        } else {
            self.failure
        }
    }
}

/// What an event means for the step it came in.
enum Answer {
    Done,
    Failed(Cause),
    Quit,
    Failover,
}

impl<S: Script> Machine<S> {
    /// A machine at its beginning: precopy is over, the VM is stopped and in step with the peer's.
    #[must_use]
    pub fn new(on_loss: OnPeerLoss) -> Self {
        Self::at(S::FIRST, on_loss)
    }

    /// A machine that begins at `first`.
    pub(crate) fn at(first: S, on_loss: OnPeerLoss) -> Self {
        Self {
            state: State::At(first),
            on_loss,
            vm_runs: false,
            pending: Pending::default(),
        }
    }

    /// Which side this is.
    #[must_use]
    pub fn role(&self) -> Role {
        S::ROLE
    }

    /// Whether this side's VM must never run again, whatever anybody asks for.
    #[must_use]
    pub const fn is_broken(&self) -> bool {
        match &self.state {
            State::At(_) => false,
            State::Ending(ending) => ending.is_broken(),
        }
    }

    /// What is to be done now.
    #[must_use]
    pub fn action(&self) -> Action {
        match &self.state {
            State::At(at) => Action::Perform(at.step()),
            State::Ending(ending) => ending.action(),
        }
    }

    /// Takes an event and returns the action it leads to; `None` if the present action is not over
    /// ([`Event::FailoverRequested`] or [`Event::Quit`] during anything but a wait).
    ///
    /// # Errors
    /// [`ProtocolMisuse`] if the present action cannot end like that. It is the driver's mistake; the
    /// machine has not moved.
    pub fn handle(&mut self, event: Event) -> Result<Option<Action>, ProtocolMisuse> {
        let at = match &mut self.state {
            State::At(at) => *at,
            State::Ending(ending) => {
                let over = ending.handle(event)?;
                return Ok(over.then(|| self.action()));
            }
        };
        let step = at.step();
        match answer(step, event)? {
            Answer::Done => match step {
                Step::PauseVm => self.vm_runs = false,
                Step::ResumeVm => self.vm_runs = true,
                _ => {}
            },
            Answer::Failed(cause) if at.is_commit() && !step.is_on_the_wire() => {
                self.state = State::Ending(Ending::broken(S::ROLE, cause));
                return Ok(Some(self.action()));
            }
            Answer::Failed(cause) => {
                self.pending.failure.get_or_insert(cause);
            }
            Answer::Quit => self.pending.quit = true,
            Answer::Failover => self.pending.failover = true,
        }
        let is_request = matches!(event, Event::Quit | Event::FailoverRequested);
        if is_request && !self.action().is_wait() {
            return Ok(None);
        }
        let next = at.next();
        self.state = match self.pending.cause() {
            Some(cause) if !(at.is_commit() && next.is_commit()) => {
                State::Ending(Ending::begin(S::ROLE, cause, self.on_loss, self.vm_runs))
            }
            _ => State::At(next),
        };
        Ok(Some(self.action()))
    }
}

fn answer(step: Step, event: Event) -> Result<Answer, ProtocolMisuse> {
    let is_wait = matches!(step, Step::Await(_));
    Ok(match (step, event) {
        (_, Event::Quit) => Answer::Quit,
        (_, Event::FailoverRequested) => Answer::Failover,
        (Step::Await(Wait::CheckpointDue), Event::CheckpointDue) => Answer::Done,
        (Step::Await(Wait::Message(expected)), Event::Message(got)) if got == expected => {
            Answer::Done
        }
        (Step::Await(wait), Event::Message(got)) => Answer::Failed(Cause::UnexpectedMessage {
            got,
            expected: match wait {
                Wait::Message(expected) => Some(expected),
                Wait::CheckpointDue | Wait::Decision => None,
            },
        }),
        (Step::Await(_), Event::UnknownMessage(number)) => {
            Answer::Failed(Cause::UnknownMessage { number })
        }
        (_, Event::Done) if !is_wait => Answer::Done,
        (_, Event::Failed) if step.may_fail() => Answer::Failed(Cause::StepFailed(step)),
        (_, Event::PeerLost(loss)) if step.is_on_the_wire() => {
            Answer::Failed(Cause::PeerLost { during: step, loss })
        }
        (_, Event::DeadlineExpired) if step.is_on_the_wire() => {
            Answer::Failed(Cause::DeadlineExpired { during: step })
        }
        _ => {
            return Err(ProtocolMisuse {
                action: Action::Perform(step),
                event,
            });
        }
    })
}
