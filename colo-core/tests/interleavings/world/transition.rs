//! A step from one state to the next: who brings it about, and what it is.

use std::fmt;

use colo_core::Role;
use colo_core::raw::{Action, Event};

use super::World;

/// Who brings a transition about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The system itself: it goes on like this if nothing else happens.
    System,
    /// The environment, which may do it or not.
    Environment,
}

/// What happens in a transition.
#[derive(Clone, Copy)]
pub enum What {
    /// An action took effect in this way and ended with this event.
    Ends(Action, Way, Event),
    Happens(&'static str),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ends(action, Way::Whole, event) => write!(f, "{action}: {event:?}"),
            Self::Ends(action, way, event) => write!(f, "{action} ({way:?}): {event:?}"),
            Self::Happens(what) => f.write_str(what),
        }
    }
}

/// To which side, and what.
#[derive(Clone, Copy)]
pub struct Label(pub(super) Option<Role>, pub(super) What);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(role) => write!(f, "{role}: {}", self.1),
            None => self.1.fmt(f),
        }
    }
}

/// A transition: who brings it about, what happens, and where it leads.
pub struct Transition {
    pub by: By,
    pub label: Label,
    pub next: Result<World, String>,
}

impl Transition {
    /// Something beside the end of an action happens, to one side or to both.
    pub(super) fn happens(
        by: By,
        role: Option<Role>,
        what: &'static str,
        next: Result<World, String>,
    ) -> Self {
        Self {
            by,
            label: Label(role, What::Happens(what)),
            next,
        }
    }
}

/// Shows which of a step's ways to end is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// All of it took effect.
    Whole,
    /// As much took effect as can without the step being done.
    Part,
    /// Nothing did.
    Not,
}
