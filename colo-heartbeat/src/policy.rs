//! What a side does when it has lost its peer.

use std::fmt;

/// What a side does when it has lost its peer.
///
/// Both sides of a pair ask, or neither does; at most one takes over. Sides that do not fit refuse
/// each other's beats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnHeartbeatLoss {
    /// It goes on alone. Where the hosts can lose each other and both live, for a time both guests
    /// may run: until the other side has noticed too, and stopped.
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
