//! What must hold after every tick, and what a world has come to.

use colo_heartbeat::{Phase, Role};

use super::side::{Side, Way};
use super::{Budget, ROLES, World};

/// What a world has come to that was left alone for a long time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// Both are one of two.
    Paired,
    /// This side's guest runs alone.
    Alone(Role),
    /// No guest runs, and a side still asks.
    Asking,
    /// No guest runs, for good.
    Nobody,
}

impl World {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.primary.is_running(self.now) && self.secondary.is_running(self.now) {
            return Err("two guests run".into());
        }
        let alone = |side: &Side| side.up && side.decider.phase() == Phase::Alone;
        if alone(&self.primary) && alone(&self.secondary) {
            return Err("both sides own the guest for good".into());
        }
        Ok(())
    }

    /// Has a process ended?
    pub const fn has_died(&self, budget: Budget) -> bool {
        // An operator who lets a side go on without the arbiter has killed the other.
        self.overridden || self.budget.deaths < budget.deaths
    }

    /// Nothing will ever change any more.
    pub fn is_settled(&self) -> bool {
        let over = self.budget.mishaps == 0 || self.now >= self.budget.until;
        over && self.late.is_empty()
            && ROLES.iter().all(|role| {
                let side = self.side(*role);
                let decided = matches!(side.decider.phase(), Phase::Alone | Phase::Stopped);
                !side.up || (decided && side.queue.is_empty() && side.stops.is_none())
            })
    }

    /// What it has come to.
    pub fn end(&self) -> End {
        for role in ROLES {
            let side = self.side(role);
            if side.up && side.runs && side.decider.phase() == Phase::Alone {
                return End::Alone(role);
            }
        }
        if self.primary.is_running(self.now) {
            return End::Paired;
        }
        let asking = [Phase::Asking, Phase::Suspended];
        let asks = |side: &Side| side.up && asking.contains(&side.decider.phase());
        if self.secondary.up && self.secondary.is_running(self.now) {
            return End::Alone(Role::Secondary);
        }
        if asks(&self.primary) || asks(&self.secondary) {
            End::Asking
        } else {
            End::Nobody
        }
    }

    /// A side that nobody has stopped could have gone on: it is up, and the register is open to it.
    pub fn could_go_on(&self) -> bool {
        ROLES.iter().any(|role| {
            let side = self.side(*role);
            side.up && side.way == Way::Open && side.decider.phase() != Phase::Stopped
        })
    }
}
