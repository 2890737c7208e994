//! What the environment can do in a tick, how often, and what that does.

use std::fmt;

use colo_heartbeat::raw::{Colo, Next, Requested, Want};
use colo_heartbeat::{Phase, Role};

use super::register::PATIENT;
use super::side::{Request, Side, Step, Way};
use super::time::at;
use super::{ROLES, World, other};

/// How much may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// All of these together.
    pub mishaps: u8,
    /// Ways between the sides that are cut, stuck or opened again.
    pub links: u8,
    /// The same, between a side and the register.
    pub outages: u8,
    /// Processes that end, and begin again.
    pub deaths: u8,
    /// What operators want.
    pub wishes: u8,
    /// Answers of the register that are lost.
    pub losses: u8,
    /// No more happens from this tick on.
    pub until: u16,
}

/// What happens in a tick beside what the system does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Happens {
    Nothing,
    Link(Role, Way),
    Register(Role, Way),
    /// COLO's own connection ends, which both see.
    ColoBreaks,
    /// The process is killed. Its peer sees COLO's connection end, or does not.
    Dies(Role, bool),
    /// The process ends in good order.
    Quits(Role),
    /// A primary's process is started again.
    Restarts,
    /// An operator wants this side to go on alone.
    Wish(Role),
    /// An operator has killed the other side and lets this one go on without the arbiter.
    Override(Role),
    /// The register carries a side's request out, and the answer is lost.
    AnswerLost(Role),
    /// What a side has sent long ago takes effect.
    Late(usize),
}

/// A transition: what happens, and whose request comes first in this tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Label {
    pub happens: Happens,
    pub first: Role,
    /// A request that follows from an answer is carried out in the same tick.
    pub swift: bool,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}; {} first, swift {}",
            self.happens, self.first, self.swift
        )
    }
}

impl World {
    /// Everything that may happen in the next tick.
    pub fn labels(&self) -> Vec<Label> {
        let mut happens = vec![Happens::Nothing];
        happens.extend((0..self.late.len()).map(Happens::Late));
        if self.budget.mishaps > 0 && self.now < self.budget.until {
            self.mishaps(&mut happens);
        }
        // Which comes first matters only to those that change something.
        let both = ROLES.iter().all(|role| {
            let side = self.side(*role);
            side.up && side.way != Way::Cut && !side.queue.is_empty()
        });
        let changes = ROLES.iter().any(|role| self.changes(*role));
        let firsts = &ROLES[..if both && changes { 2 } else { 1 }];
        let paces = &[false, true][..if changes { 2 } else { 1 }];
        let mut labels = Vec::new();
        for happens in happens {
            for &first in firsts {
                labels.extend(paces.iter().map(|&swift| Label {
                    happens,
                    first,
                    swift,
                }));
            }
        }
        labels
    }

    /// Does the request that a side is at change the register, or lead to one that does?
    fn changes(&self, role: Role) -> bool {
        let side = self.side(role);
        let now = at(self.now + 1);
        side.queue
            .front()
            .is_some_and(|request| match request.step {
                Step::Replace { .. } => true,
                Step::Deaf => false,
                Step::Read { sent } => {
                    let mut seat = side.seat.clone();
                    let next = seat.judge(request.want, self.version, self.entry, at(sent), now);
                    matches!(next, Next::Replace(_))
                }
            })
    }

    fn mishaps(&self, out: &mut Vec<Happens>) {
        let budget = &self.budget;
        for role in ROLES {
            let side = self.side(role);
            for way in [Way::Open, Way::Cut, Way::Stuck] {
                if budget.links > 0 && way != side.link {
                    out.push(Happens::Link(role, way));
                }
                if budget.outages > 0 && way != side.way {
                    out.push(Happens::Register(role, way));
                }
            }
            if !side.up {
                continue;
            }
            if budget.deaths > 0 {
                out.push(Happens::Dies(role, false));
                out.push(Happens::Dies(role, true));
                out.push(Happens::Quits(role));
            }
            if budget.wishes > 0 {
                out.push(Happens::Wish(role));
                if side.colo != Colo::TookOver && side.decider.phase() != Phase::Stopped {
                    out.push(Happens::Override(role));
                }
            }
            let replaces = matches!(
                side.queue.front(),
                Some(Request {
                    step: Step::Replace { .. },
                    ..
                })
            );
            if budget.losses > 0 && replaces && side.way == Way::Open {
                out.push(Happens::AnswerLost(role));
            }
        }
        let colo = [self.primary.colo, self.secondary.colo];
        if budget.links > 0 && colo == [Colo::Within; 2] {
            out.push(Happens::ColoBreaks);
        }
        if budget.deaths > 0 && !self.primary.up && !self.overridden {
            out.push(Happens::Restarts);
        }
    }

    /// Something happens; the result is the side that does not hear the register's answer.
    pub(super) fn happen(&mut self, happens: Happens) -> Option<Role> {
        let now = self.now;
        match happens {
            Happens::Nothing => return None,
            Happens::Late(index) => {
                let (version, entry) = self.late.remove(index);
                self.replace(version, entry);
                return None;
            }
            Happens::Link(..) | Happens::ColoBreaks => self.budget.links -= 1,
            Happens::Register(..) => self.budget.outages -= 1,
            Happens::Dies(..) | Happens::Quits(_) | Happens::Restarts => self.budget.deaths -= 1,
            Happens::Wish(_) | Happens::Override(_) => self.budget.wishes -= 1,
            Happens::AnswerLost(_) => self.budget.losses -= 1,
        }
        self.budget.mishaps -= 1;
        match happens {
            Happens::Link(role, way) => self.side_mut(role).link = way,
            Happens::Register(role, way) => self.side_mut(role).way = way,
            Happens::ColoBreaks => {
                self.primary.colo = Colo::Broken;
                self.secondary.colo = Colo::Broken;
            }
            Happens::Dies(role, seen) => self.die(role, seen),
            Happens::Quits(role) => {
                // It says so, and gives its lease up if that can be done at once.
                let side = self.side_mut(role);
                let beat = side.peer.beat_now(Phase::Stopped, at(now));
                side.send(beat);
                let (open, version, entry) = (side.way == Way::Open, self.version, self.entry);
                let seat = &mut self.side_mut(role).seat;
                let next = seat.judge(Want::Release, version, entry, at(now), at(now));
                if let Next::Replace(entry) = next
                    && open
                {
                    self.replace(version, entry);
                }
                self.die(role, true);
            }
            Happens::Restarts => {
                self.processes += 1;
                let (way, link) = (self.primary.way, self.primary.link);
                self.primary = Side {
                    way,
                    link,
                    ..Side::new(Role::Primary, self.processes, now)
                };
                self.primary.ask(Want::Hold, None, now, now + PATIENT);
            }
            Happens::Wish(role) => {
                let side = self.side_mut(role);
                let view = side.view();
                // Granted at once is only what was granted before.
                if side.decider.request(&view, at(now)) == Requested::Granted {
                    assert_ne!(side.decider.phase(), Phase::Paired);
                }
            }
            Happens::Override(role) => {
                self.die(other(role), true);
                self.overridden = true;
                let overruled = self.side_mut(role).decider.override_fence();
                assert_eq!(overruled, Requested::Granted);
            }
            Happens::AnswerLost(role) => return Some(role),
            Happens::Nothing | Happens::Late(_) => {}
        }
        None
    }

    fn die(&mut self, role: Role, seen: bool) {
        let side = self.side_mut(role);
        side.up = false;
        side.runs = false;
        side.stops = None;
        // What it has sent may take effect yet.
        let sent = side.queue.drain(..).find_map(|request| match request.step {
            Step::Replace { version, entry, .. } => Some((version, entry)),
            _ => None,
        });
        if side.way != Way::Cut {
            self.late.extend(sent);
        }
        let peer = self.side_mut(other(role));
        if seen && peer.colo == Colo::Within {
            peer.colo = Colo::Broken;
        }
    }
}
