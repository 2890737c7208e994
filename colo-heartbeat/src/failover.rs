//! COLO as the heartbeat sees it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// The two sides of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The side whose guest is copied.
    Primary,
    /// The side that receives the copies.
    Secondary,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        })
    }
}

/// Whether this side is in COLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColoState {
    /// COLO has not begun, or has ended.
    Outside,
    /// COLO goes on, or its end is being carried out.
    Within,
    /// COLO has ended by an error, and waits for a decision which side goes on.
    Undecided,
}

/// Whether this side's guest runs when COLO has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColoEnd {
    /// The guest runs on this side, alone.
    TookOver,
    /// The guest does not run on this side.
    Stopped,
}

/// Why COLO did not take a failover request. Several operators may be told of one refusal.
pub(crate) type Refusal = Arc<dyn Error + Send + Sync>;

/// COLO's failover on this side, as the heartbeat requests it.
///
/// With feature `colo-core`, `colo_core::FailoverHandle` implements it. Every method is called by the
/// heartbeat's thread and must return at once.
pub trait Failover: Send {
    /// Returns whether this side is in COLO.
    fn state(&self) -> ColoState;

    /// Asks this side to go on alone.
    ///
    /// # Errors
    /// Outside COLO, a failover is under way already, or this side's guest cannot run.
    fn request(&self) -> Result<(), Arc<dyn Error + Send + Sync>>;

    /// Tells that this side's guest was stopped and never runs again: COLO ends, and every later request is
    /// refused. Called after [`Guest::stop_for_good`](crate::Guest::stop_for_good).
    fn stop_for_good(&self);
}

#[cfg(feature = "colo-core")]
mod of_colo_core {
    use std::sync::Arc;

    use colo_core::{ColoMode, FailoverHandle, Outcome, StatusReason};

    use super::{ColoEnd, ColoState, Failover, Refusal, Role};

    impl From<colo_core::Role> for Role {
        fn from(role: colo_core::Role) -> Self {
            match role {
                colo_core::Role::Primary => Self::Primary,
                colo_core::Role::Secondary => Self::Secondary,
            }
        }
    }

    impl From<Outcome> for ColoEnd {
        fn from(outcome: Outcome) -> Self {
            match outcome {
                Outcome::TookOver => Self::TookOver,
                Outcome::Quit | Outcome::Broken(_) => Self::Stopped,
            }
        }
    }

    impl Failover for FailoverHandle {
        fn state(&self) -> ColoState {
            let status = self.status();
            match (status.mode, status.reason) {
                (ColoMode::None, _) => ColoState::Outside,
                (_, StatusReason::Error) => ColoState::Undecided,
                _ => ColoState::Within,
            }
        }

        fn request(&self) -> Result<(), Refusal> {
            Self::request(self).map_err(|error| Arc::new(error) as Refusal)
        }

        fn stop_for_good(&self) {
            Self::stop_for_good(self);
        }
    }
}
