//! One side: its machine, what it has done so far, and what can be seen of it.

use colo_core::raw::{Action, Machine, Script};
use colo_core::{OnPeerLoss, Outcome, Step, Wait};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Request {
    None,
    Stored,
    Taken,
    /// Taken when the exit was being reported already.
    Late,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Side<S> {
    pub(super) machine: Machine<S>,
    pub(super) alive: bool,
    pub(super) connected: bool,
    pub(super) vm_runs: bool,
    pub(super) output_open: bool,
    pub(super) exits: u8,
    pub(super) request: Request,
    /// The last checkpoint reported.
    pub(super) completed: u8,
}

impl<S: Script> Side<S> {
    pub(super) fn new(machine: Machine<S>) -> Self {
        Self {
            machine,
            alive: true,
            connected: true,
            vm_runs: false,
            output_open: false,
            exits: 0,
            request: Request::None,
            completed: 0,
        }
    }

    pub(super) fn dead() -> Self {
        Self {
            alive: false,
            connected: false,
            ..Self::new(Machine::new(OnPeerLoss::Wait))
        }
    }

    pub(super) fn reachable(&self) -> bool {
        self.alive && self.connected
    }

    pub(super) fn waits_for(&self, wait: Wait) -> bool {
        self.alive && self.machine.action() == Action::Perform(Step::Await(wait))
    }

    fn outcome(&self) -> Option<Outcome> {
        match self.machine.action() {
            Action::Finish(outcome) => Some(outcome),
            _ => None,
        }
    }

    pub(super) fn carries_on(&self) -> bool {
        self.alive && self.outcome() == Some(Outcome::TookOver) && self.vm_runs && self.output_open
    }

    /// Neither running nor able to be told to.
    pub(super) fn is_lost(&self) -> bool {
        !self.alive || matches!(self.outcome(), Some(Outcome::Broken(_) | Outcome::Quit))
    }

    /// The signs that both sides show to a state check.
    pub(super) fn check(&self) -> Result<(), String> {
        let over = self.outcome().is_some() || self.waits_for(Wait::Decision);
        if self.exits > 1 || (over && self.exits != 1) {
            return Err(format!(
                "{} reported {} exits",
                self.machine.role(),
                self.exits
            ));
        }
        let broken = matches!(self.outcome(), Some(Outcome::Broken(_)));
        if broken && self.vm_runs && self.output_open {
            return Err("a broken vm carries on".into());
        }
        Ok(())
    }
}
