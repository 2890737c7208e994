//! Every transition of a state: what the sides, their guests and the environment can do next.

use colo_core::raw::{Action, Event};
use colo_core::{PeerLoss, Role, Step, Wait};

use super::setting::{Ahead, Budget};
use super::side::Request;
use super::transition::{By, Label, Transition, Way, What};
use super::{Item, World, Written, other};

impl World {
    pub fn transitions(&self) -> Vec<Transition> {
        let mut out = Vec::new();
        for role in [Role::Primary, Role::Secondary] {
            self.of_side(role, &mut out);
            self.of_environment(role, &mut out);
        }
        self.of_guest(&mut out);
        if self.budget.may(|budget| budget.cuts) && self.link_up {
            let mut next = self.clone();
            next.budget.spend(|budget| &mut budget.cuts);
            next.link_up = false;
            let cut = Transition::happens(By::Environment, None, "link cut", Ok(next));
            out.push(cut);
        }
        out
    }

    /// What the primary's guest writes again, and what of it is sent ahead and lands.
    fn of_guest(&self, out: &mut Vec<Transition>) {
        let mut add = |by, role, what, next| {
            out.push(Transition::happens(by, Some(role), what, Ok(next)));
        };
        let is_open = match (self.ahead, self.primary.machine.action()) {
            (Ahead::Never, _) => false,
            (Ahead::Always, _) => true,
            (_, action) => action.is_background(),
        };
        for half in [0, 1] {
            let runs = self.primary.alive && self.primary.vm_runs;
            if runs && is_open && self.dirty[half] && self.budget.ahead > 0 {
                let mut next = self.clone();
                next.budget.ahead -= 1;
                next.dirty[half] = false;
                if next.link_up && !next.is_cut_off(Role::Primary) {
                    next.beside[half].push(next.guest[half]);
                }
                let what = "sends half of ram ahead";
                add(By::Environment, Role::Primary, what, next);
            }
            // Before that nobody can tell the difference.
            if runs && !self.dirty[half] && self.budget.writes > 0 {
                let mut next = self.clone();
                next.budget.writes -= 1;
                next.dirty[half] = true;
                next.guest[half] = Written {
                    epoch: self.captured + 1,
                    again: self.guest[half].again + 1,
                };
                add(By::Environment, Role::Primary, "writes again", next);
            }
            if self.secondary.alive && self.secondary.connected && !self.beside[half].is_empty() {
                let mut next = self.clone();
                next.cache[half] = next.beside[half].remove(0);
                let what = "receives half of ram ahead";
                add(By::System, Role::Secondary, what, next);
            }
        }
    }

    /// Kills, quits and operators.
    fn of_environment(&self, role: Role, out: &mut Vec<Transition>) {
        let mut add = |what, next| {
            out.push(Transition::happens(By::Environment, Some(role), what, next));
        };
        if self.is_alive(role) && self.budget.may(|budget| budget.deaths) {
            let mut killed = self.clone();
            killed.budget.spend(|budget| &mut budget.deaths);
            killed.kill(role);
            add("killed", Ok(killed));
            if self.request_of(role) != Request::Stored && !self.is_finished(role) {
                let mut quits = self.clone();
                quits.budget.spend(|budget| &mut budget.deaths);
                let handled = quits.hand(role, Event::Quit);
                add("quits", handled.map(|_| quits));
            }
        }
        if self.is_alive(role)
            && self.budget.requests > 0
            && !self.is_finished(role)
            && self.request_of(role) == Request::None
        {
            let mut asked = self.clone();
            asked.budget.requests -= 1;
            asked.kill(other(role));
            asked.store_request(role);
            add("the other is killed, failover requested", Ok(asked));
        }
    }

    /// What a live side can do next.
    fn of_side(&self, role: Role, out: &mut Vec<Transition>) {
        if !self.is_alive(role) || self.is_finished(role) {
            return;
        }
        if self.request_of(role) == Request::Stored {
            let mut next = self.clone();
            next.take_request(role);
            let handled = next.hand(role, Event::FailoverRequested);
            let next = handled.map(|_| next);
            let taken = Transition::happens(By::System, Some(role), "takes the request", next);
            out.push(taken);
            return;
        }
        let action = self.action_of(role);
        let mut add = |by, way, event: Event, pay: fn(&mut Budget)| {
            let mut next = self.clone();
            pay(&mut next.budget);
            let result = next
                .take_effect(role, action, way)
                .and_then(|()| next.hand(role, event));
            out.push(Transition {
                by,
                label: Label(Some(role), What::Ends(action, way, event)),
                next: result.map(|_| next),
            });
        };
        let free: fn(&mut Budget) = |_| {};
        let step = match action {
            Action::EmitExit(_) => return add(By::System, Way::Whole, Event::Done, free),
            Action::Finish(_) => return,
            Action::Perform(step) => step,
        };
        if action.is_on_the_wire() && self.is_cut_off(role) && step != Step::Await(Wait::Decision) {
            let lost = Event::PeerLost(PeerLoss::Closed);
            add(By::System, Way::Not, lost, free);
            add(By::System, Way::Part, lost, free);
        }
        let timed = action.is_on_the_wire()
            && !matches!(step, Step::Await(Wait::CheckpointDue | Wait::Decision));
        if timed && self.budget.may(|budget| budget.deadlines) {
            let pay: fn(&mut Budget) = |budget| budget.spend(|budget| &mut budget.deadlines);
            add(By::Environment, Way::Not, Event::DeadlineExpired, pay);
            add(By::Environment, Way::Part, Event::DeadlineExpired, pay);
        }
        if self.budget.may(|budget| budget.failures) && action.may_fail() && !action.is_wait() {
            let pay: fn(&mut Budget) = |budget| budget.spend(|budget| &mut budget.failures);
            add(By::Environment, Way::Not, Event::Failed, pay);
            add(By::Environment, Way::Part, Event::Failed, pay);
        }
        let inbox = match role {
            Role::Primary => &self.to_primary,
            Role::Secondary => &self.to_secondary,
        };
        let readable = inbox.first().filter(|_| self.is_connected(role));
        match (step, readable) {
            (Step::Await(Wait::Decision), _) => {}
            (Step::Await(wait), Some(Item::Message(message)))
                if wait == Wait::Message(*message) =>
            {
                add(By::System, Way::Whole, Event::Message(*message), free);
            }
            (Step::Await(Wait::CheckpointDue), None) if self.budget.checkpoints > 0 => {
                let pay: fn(&mut Budget) = |budget| budget.checkpoints -= 1;
                add(By::Environment, Way::Whole, Event::CheckpointDue, pay);
            }
            // In order with what was sent ahead, which is not looked at here.
            (Step::ReceiveRam, Some(&Item::HalfOfRam(half, _)))
                if self.ahead != Ahead::InGapUnordered && !self.beside[half].is_empty() => {}
            (Step::ReceiveRam, Some(Item::EndOfRam)) if self.beside != [[], []] => {}
            (Step::ReceiveRam, Some(&Item::HalfOfRam(half, written))) => {
                let mut next = self.clone();
                next.cache[half] = written;
                next.to_secondary.remove(0);
                let what = "receives half of ram";
                out.push(Transition::happens(By::System, Some(role), what, Ok(next)));
            }
            (Step::ReceiveRam, Some(Item::EndOfRam))
            | (Step::ReceiveDevices, Some(Item::Devices(_))) => {
                add(By::System, Way::Whole, Event::Done, free);
            }
            (Step::Await(_) | Step::ReceiveRam | Step::ReceiveDevices, None) => {}
            (Step::Await(_) | Step::ReceiveRam | Step::ReceiveDevices, Some(item)) => {
                let wrong = Err(format!("{item:?} while {step}"));
                out.push(Transition::happens(By::System, Some(role), "reads", wrong));
            }
            // What is sent into a broken link may vanish without an error.
            _ if !action.is_on_the_wire() || self.is_connected(role) => {
                add(By::System, Way::Whole, Event::Done, free);
            }
            _ => {}
        }
    }
}
