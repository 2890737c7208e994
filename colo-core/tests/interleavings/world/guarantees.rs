//! What must hold in every state, and in those in which nothing more happens.

use colo_core::{Message, Role, Wait};

use super::setting::Budget;
use super::side::Request;
use super::{Content, World};

/// What a quiet world, one that does nothing by itself, has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiet {
    /// Both run, in step after this many checkpoints.
    InStep(u8),
    /// This side carries on alone.
    Alone(Role),
    /// A decision is waited for.
    Undecided,
    /// Both sides are lost, by one fault on each.
    Lost,
}

impl World {
    /// What must hold in every state.
    pub fn check(&self) -> Result<(), String> {
        self.primary.check()?;
        self.secondary.check()?;
        let owns_output = |alive: bool, open: bool| alive && open;
        if owns_output(self.primary.alive, self.primary.output_open)
            && owns_output(self.secondary.alive, self.secondary.output_open)
        {
            return Err("both sides own the output".into());
        }
        if self.secondary.output_open {
            match self.ram {
                Content::Checkpoint(base) | Content::Own(base) if base >= self.released => {}
                other => {
                    return Err(format!(
                        "output of checkpoint {} is out, the survivor has {other:?}",
                        self.released
                    ));
                }
            }
        }
        Ok(())
    }

    /// What a world has come to in which the system has nothing left to do.
    pub fn check_quiet(&self) -> Result<Quiet, String> {
        let (p, s) = (&self.primary, &self.secondary);
        let idle = p.waits_for(Wait::CheckpointDue)
            && s.waits_for(Wait::Message(Message::CheckpointRequest));
        if idle {
            let same = p.completed == s.completed && self.ram == Content::Own(p.completed);
            return if same && p.vm_runs && s.vm_runs {
                Ok(Quiet::InStep(p.completed))
            } else {
                Err("both idle, but not in step".into())
            };
        }
        for (waits, lost, done) in [
            (p.waits_for(Wait::Decision), p.is_lost(), p.carries_on()),
            (s.waits_for(Wait::Decision), s.is_lost(), s.carries_on()),
        ] {
            if !(waits || lost || done) {
                return Err("stuck".into());
            }
        }
        match (p.carries_on(), s.carries_on()) {
            (true, true) => Err("both sides carry on".into()),
            (true, false) => Ok(Quiet::Alone(Role::Primary)),
            (false, true) => Ok(Quiet::Alone(Role::Secondary)),
            (false, false) if p.is_lost() && s.is_lost() => Ok(Quiet::Lost),
            (false, false) => Ok(Quiet::Undecided),
        }
    }

    /// How many of the environment's grave interferences have come about, given how many could.
    pub fn faults(&self, budget: Budget) -> u8 {
        let spent = |all: fn(&Budget) -> u8| all(&budget) - all(&self.budget);
        spent(|budget| budget.deaths)
            + spent(|budget| budget.failures)
            + spent(|budget| budget.requests)
    }

    /// Has the operator failed a side over?
    pub fn is_decided(&self) -> bool {
        self.primary.request != Request::None || self.secondary.request != Request::None
    }
}
