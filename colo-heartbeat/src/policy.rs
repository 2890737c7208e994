//! The policy of a side that has lost its peer.

use std::fmt;

/// What a side does when it has lost its peer.
///
/// Both sides of a pair ask, or neither does. At most one takes over. Sides whose policies do not fit refuse
/// each other's beats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnHeartbeatLoss {
    /// It goes on alone. Where both hosts can live and lose each other, both guests may run until the other
    /// side has noticed the loss and stopped.
    TakeOver,
    /// It asks the arbiter.
    Ask,
    /// It stops its guest for good.
    #[default]
    Stop,
}

impl fmt::Display for OnHeartbeatLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TakeOver => "take-over",
            Self::Ask => "ask",
            Self::Stop => "stop",
        })
    }
}
