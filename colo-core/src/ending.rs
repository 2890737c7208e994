//! The end of COLO, the same on both sides.
//!
//! ```text
//! disconnect -> report COLO_EXIT -+-> (undecided) wait for a decision -+
//!                                 |                                    v
//!                                 +-> (take over) stop the vm -> replication.stop(failover)
//!                                 |               -> open the output -> resume the vm -> TookOver
//!                                 +-> (quit)      stop the vm -> replication.stop -> Quit
//!                                 +-> (broken)    replication.stop -> Broken
//! ```
//! The VM is stopped for the change of disks, as in QEMU. The report comes first: what fails later
//! changes the outcome, never whether there was one report.

use crate::action::{Action, Event, ProtocolMisuse};
use crate::cause::{Cause, ColoExit, OnPeerLoss, Outcome, Role};
use crate::step::{Step, Wait};

/// What is to become of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fate {
    TakeOver,
    Undecided,
    Quit,
    Broken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Disconnect,
    EmitExit,
    AwaitDecision,
    PauseVm,
    StopReplication,
    OpenOutput,
    ResumeVm,
    Finished(Outcome),
}

/// The way out of COLO.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ending {
    exit: ColoExit,
    fate: Fate,
    vm_runs: bool,
    at: At,
}

impl Ending {
    /// COLO ends on a side whose VM is sound.
    pub(crate) const fn begin(
        role: Role,
        cause: Cause,
        on_loss: OnPeerLoss,
        vm_runs: bool,
    ) -> Self {
        let fate = match (cause, on_loss) {
            (Cause::Quit, _) => Fate::Quit,
            (Cause::FailoverRequested, _) | (_, OnPeerLoss::TakeOver) => Fate::TakeOver,
            (_, OnPeerLoss::Wait) => Fate::Undecided,
        };
        Self {
            exit: ColoExit { role, cause },
            fate,
            vm_runs,
            at: At::Disconnect,
        }
    }

    /// COLO ends on a side whose stopped VM has been left half way between two states.
    pub(crate) const fn broken(role: Role, cause: Cause) -> Self {
        Self {
            exit: ColoExit { role, cause },
            fate: Fate::Broken,
            vm_runs: false,
            at: At::Disconnect,
        }
    }

    pub(crate) const fn is_broken(&self) -> bool {
        matches!(self.fate, Fate::Broken) || matches!(self.at, At::Finished(Outcome::Broken(_)))
    }

    pub(crate) const fn action(&self) -> Action {
        Action::Perform(match self.at {
            At::Disconnect => Step::Disconnect,
            At::EmitExit => return Action::EmitExit(self.exit),
            At::AwaitDecision => Step::Await(Wait::Decision),
            At::PauseVm => Step::PauseVm,
            At::StopReplication => Step::StopReplication {
                failover: matches!(self.fate, Fate::TakeOver),
            },
            At::OpenOutput => Step::OpenOutput,
            At::ResumeVm => Step::ResumeVm,
            At::Finished(outcome) => return Action::Finish(outcome),
        })
    }

    /// Takes an event; `Ok(true)` if the action is over.
    pub(crate) fn handle(&mut self, event: Event) -> Result<bool, ProtocolMisuse> {
        match (self.at, event) {
            (At::Finished(_), _) => Err(self.misuse(event)),
            (At::AwaitDecision, Event::FailoverRequested) => {
                self.fate = Fate::TakeOver;
                self.at = self.first_of_fate();
                Ok(true)
            }
            (At::AwaitDecision, Event::Quit) => {
                self.fate = Fate::Quit;
                self.at = self.first_of_fate();
                Ok(true)
            }
            (_, Event::FailoverRequested) => {
                if matches!(self.fate, Fate::Undecided | Fate::TakeOver) {
                    self.decide(Fate::TakeOver, Cause::FailoverRequested);
                }
                Ok(false)
            }
            // A take-over that has begun ends in a moment with a plain VM, which then quits in the
            // plain way.
            (_, Event::Quit) => {
                if matches!(self.fate, Fate::Undecided) {
                    self.decide(Fate::Quit, Cause::Quit);
                }
                Ok(false)
            }
            (At::AwaitDecision, _) => Err(self.misuse(event)),
            (_, Event::Done) => {
                self.at = self.after(true);
                Ok(true)
            }
            (At::PauseVm | At::StopReplication | At::ResumeVm, Event::Failed) => {
                self.at = self.after(false);
                Ok(true)
            }
            _ => Err(self.misuse(event)),
        }
    }

    /// A decision before the wait for it. It is also the reason of the exit, unless that is being
    /// reported already.
    fn decide(&mut self, fate: Fate, cause: Cause) {
        self.fate = fate;
        if self.at == At::Disconnect {
            self.exit.cause = cause;
        }
    }

    const fn first_of_fate(&self) -> At {
        match self.fate {
            Fate::Undecided => At::AwaitDecision,
            Fate::TakeOver | Fate::Quit if self.vm_runs => At::PauseVm,
            Fate::TakeOver | Fate::Quit | Fate::Broken => At::StopReplication,
        }
    }

    /// Where to go from a step that was done or has failed.
    fn after(&mut self, done: bool) -> At {
        let broken = |step| At::Finished(Outcome::Broken(Cause::StepFailed(step)));
        match (self.at, self.fate) {
            (At::Disconnect, _) => At::EmitExit,
            (At::EmitExit | At::AwaitDecision, _) => self.first_of_fate(),
            (At::PauseVm, Fate::TakeOver) if !done => broken(Step::PauseVm),
            (At::PauseVm, _) => {
                self.vm_runs = !done;
                At::StopReplication
            }
            // The secondary's disk lacks what was not committed, the primary's was always its own.
            (At::StopReplication, Fate::TakeOver) if !done && self.exit.role == Role::Secondary => {
                broken(Step::StopReplication { failover: true })
            }
            (At::StopReplication, Fate::TakeOver | Fate::Undecided) => At::OpenOutput,
            (At::StopReplication, Fate::Quit) => At::Finished(Outcome::Quit),
            (At::StopReplication, Fate::Broken) => At::Finished(Outcome::Broken(self.exit.cause)),
            (At::OpenOutput, _) => At::ResumeVm,
            (At::ResumeVm, _) if !done => broken(Step::ResumeVm),
            (At::ResumeVm, _) => At::Finished(Outcome::TookOver),
            (finished @ At::Finished(_), _) => finished,
        }
    }

    const fn misuse(&self, event: Event) -> ProtocolMisuse {
        ProtocolMisuse {
            action: self.action(),
            event,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::PeerLoss;

    const LOST: Cause = Cause::PeerLost {
        during: Step::SendRam,
        loss: PeerLoss::Closed,
    };

    /// Answers every action with `answer` until a wait or the end, and lists them.
    fn run(ending: &mut Ending, answer: impl Fn(Action) -> Event) -> Vec<Action> {
        let mut actions = Vec::new();
        loop {
            let action = ending.action();
            actions.push(action);
            if action.is_wait() || matches!(action, Action::Finish(_)) {
                return actions;
            }
            assert!(ending.handle(answer(action)).unwrap());
        }
    }

    #[test]
    fn a_secondary_whose_disk_cannot_be_committed_never_runs() {
        let failing = Step::StopReplication { failover: true };
        let mut ending = Ending::begin(
            Role::Secondary,
            Cause::FailoverRequested,
            OnPeerLoss::Wait,
            true,
        );
        let actions = run(&mut ending, |action| {
            if action == Action::Perform(failing) {
                Event::Failed
            } else {
                Event::Done
            }
        });
        assert!(!actions.contains(&Action::Perform(Step::ResumeVm)));
        let broken = Outcome::Broken(Cause::StepFailed(failing));
        assert_eq!(actions.last(), Some(&Action::Finish(broken)));
    }

    #[test]
    fn a_request_while_the_link_is_being_closed_is_the_reason_of_the_exit() {
        let mut ending = Ending::begin(Role::Primary, LOST, OnPeerLoss::Wait, true);
        assert!(!ending.handle(Event::FailoverRequested).unwrap());
        let actions = run(&mut ending, |_| Event::Done);
        assert_eq!(
            actions,
            [
                Action::Perform(Step::Disconnect),
                Action::EmitExit(ColoExit {
                    role: Role::Primary,
                    cause: Cause::FailoverRequested
                }),
                Action::Perform(Step::PauseVm),
                Action::Perform(Step::StopReplication { failover: true }),
                Action::Perform(Step::OpenOutput),
                Action::Perform(Step::ResumeVm),
                Action::Finish(Outcome::TookOver),
            ]
        );
    }

    #[test]
    fn an_undecided_side_may_quit_without_a_second_exit() {
        let mut ending = Ending::begin(Role::Secondary, LOST, OnPeerLoss::Wait, false);
        let actions = run(&mut ending, |_| Event::Done);
        assert_eq!(
            actions.last(),
            Some(&Action::Perform(Step::Await(Wait::Decision)))
        );
        assert!(ending.handle(Event::Quit).unwrap());
        assert_eq!(
            run(&mut ending, |_| Event::Done),
            [
                Action::Perform(Step::StopReplication { failover: false }),
                Action::Finish(Outcome::Quit)
            ]
        );
    }

    #[test]
    fn nothing_is_taken_after_the_end() {
        let mut ending = Ending::broken(Role::Secondary, LOST);
        run(&mut ending, |_| Event::Done);
        assert!(ending.handle(Event::FailoverRequested).is_err());
    }
}
