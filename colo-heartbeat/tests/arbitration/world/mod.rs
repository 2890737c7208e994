//! A model of everything around the two deciders: time, beats on their way, a register that both
//! reach or do not, guests that take a moment to stop, and an environment that breaks things.
//!
//! Time goes in ticks of 50 ms. In each, something may happen; then beats are sent and arrive, each
//! side's requests to the register are carried out, one or as many as there are, and each side does
//! what it has decided. A guest that is to stop runs for as long as is promised that it may.
//!
//! [`World::step`] is one tick. Each part of it has its module: `mishaps`, `beats`, `register`,
//! `decision`; `outcome` says what must be true afterwards.

mod beats;
mod decision;
mod mishaps;
mod outcome;
mod register;
mod side;
mod time;

use colo_heartbeat::Role;
use colo_heartbeat::raw::{Colo, Entry, Want};

use self::mishaps::Happens;
pub use self::mishaps::{Budget, Label};
pub use self::outcome::End;
use self::register::PATIENT;
use self::side::Side;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    now: u16,
    primary: Side,
    secondary: Side,
    version: u64,
    entry: Option<Entry>,
    /// Replacements that nobody waits for any more.
    late: Vec<(u64, Entry)>,
    processes: u64,
    /// An operator has said that nothing else runs.
    overridden: bool,
    /// How many ticks longer a guest takes to stop than it may.
    dawdling: u16,
    pub budget: Budget,
}

fn other(role: Role) -> Role {
    match role {
        Role::Primary => Role::Secondary,
        Role::Secondary => Role::Primary,
    }
}

const ROLES: [Role; 2] = [Role::Primary, Role::Secondary];

impl World {
    /// A pair in COLO that has beaten for a while.
    pub fn new(budget: Budget, dawdling: u16) -> Self {
        let mut world = Self {
            now: 0,
            primary: Side::new(Role::Primary, 1, 0),
            secondary: Side::new(Role::Secondary, 2, 0),
            version: 0,
            entry: None,
            late: Vec::new(),
            processes: 2,
            overridden: false,
            dawdling,
            budget: Budget {
                mishaps: 0,
                ..budget
            },
        };
        world.primary.runs = true;
        world.primary.ask(Want::Hold, None, 0, PATIENT);
        let quietly = Label {
            happens: Happens::Nothing,
            first: Role::Primary,
            swift: false,
        };
        for _ in 0..8 {
            world = world.step(quietly).expect("a pair that begins");
            if world.primary.entitled {
                world.primary.colo = Colo::Within;
                world.secondary.colo = Colo::Within;
            }
        }
        assert_eq!(world.end(), End::Paired);
        world.budget = Budget {
            until: world.now + budget.until,
            ..budget
        };
        world
    }

    pub const fn now(&self) -> u16 {
        self.now
    }

    fn side(&self, role: Role) -> &Side {
        match role {
            Role::Primary => &self.primary,
            Role::Secondary => &self.secondary,
        }
    }

    fn side_mut(&mut self, role: Role) -> &mut Side {
        match role {
            Role::Primary => &mut self.primary,
            Role::Secondary => &mut self.secondary,
        }
    }

    /// The next tick.
    pub fn step(&self, label: Label) -> Result<Self, String> {
        let mut next = self.clone();
        next.now += 1;
        let deaf = next.happen(label.happens);
        for role in ROLES {
            next.beat(role);
        }
        for role in ROLES {
            next.hear(role);
        }
        for role in [label.first, other(label.first)] {
            let mut requests = if label.swift { 3 } else { 1 };
            while requests > 0 && next.consult(role, deaf == Some(role)) {
                requests -= 1;
            }
        }
        for role in ROLES {
            next.decide(role)?;
        }
        next.check()?;
        next.forget();
        Ok(next)
    }

    /// What would only make equal worlds look different.
    fn forget(&mut self) {
        let version = self.version;
        self.late.retain(|(of, _)| *of == version);
        for role in ROLES {
            if !self.side(role).up {
                let now = self.now;
                let (way, link, sent) = {
                    let side = self.side_mut(role);
                    (side.way, side.link, std::mem::take(&mut side.sent))
                };
                *self.side_mut(role) = Side {
                    up: false,
                    way,
                    link,
                    sent,
                    ..Side::new(role, 0, now)
                };
            }
        }
    }
}
