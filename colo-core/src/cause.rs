//! Why and how COLO ends.

use std::fmt;

use crate::message::Message;
use crate::step::{PeerLoss, Step};

/// The two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The side whose state is copied.
    Primary,
    /// The side that receives it.
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

/// What a side does when COLO has ended without a request.
///
/// A side whose connection breaks cannot know whether the peer is dead or only unreachable. So **at most one of the
/// two sides may be set to [`OnPeerLoss::TakeOver`]**: with both, a broken link leaves two running VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnPeerLoss {
    /// Report COLO_EXIT and wait for a failover request. The VM and its held output stay as they are. QEMU does
    /// only this.
    #[default]
    Wait,
    /// Report COLO_EXIT and go on alone.
    TakeOver,
}

/// The `reason` of COLO_EXIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitReason {
    /// A failover was requested.
    Request,
    /// Something failed.
    Error,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Request => "request",
            Self::Error => "error",
        })
    }
}

/// What ended COLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// A failover request.
    #[error("failover was requested")]
    FailoverRequested,
    /// The VM ends.
    #[error("the vm quits")]
    Quit,
    /// The connection broke.
    #[error("peer lost while {during}: {loss}")]
    PeerLost {
        /// The step that was carried out.
        during: Step,
        /// How the loss was noticed.
        loss: PeerLoss,
    },
    /// The peer did not answer, send or take data in time.
    #[error("deadline passed while {during}")]
    DeadlineExpired {
        /// The step that was carried out.
        during: Step,
    },
    /// The peer sent a message out of place.
    #[error("unexpected colo message {got}, expected {}", .expected.map_or("none", Message::name))]
    UnexpectedMessage {
        /// The message received.
        got: Message,
        /// The message expected; `None` where the peer has nothing to send.
        expected: Option<Message>,
    },
    /// The peer sent a number that is no message.
    #[error("unknown colo message {number:#x}")]
    UnknownMessage {
        /// What was read.
        number: u32,
    },
    /// A step failed on this side. The driver has the error itself.
    #[error("failed while {0}")]
    StepFailed(Step),
    /// The driver made a mistake ([`ProtocolMisuse`](crate::ProtocolMisuse)), which no peer can make it do.
    #[error("a mistake of the driver")]
    Mistake,
}

impl Cause {
    /// Returns the reason that belongs to it.
    #[must_use]
    pub(crate) const fn reason(self) -> ExitReason {
        match self {
            Self::FailoverRequested | Self::Quit => ExitReason::Request,
            _ => ExitReason::Error,
        }
    }
}

/// COLO has ended on this side: the content of COLO_EXIT, and the cause for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ColoExit {
    /// Which side this is: `mode`.
    pub role: Role,
    /// What ended COLO.
    pub cause: Cause,
}

impl ColoExit {
    /// The event's `reason`.
    #[must_use]
    pub const fn reason(&self) -> ExitReason {
        self.cause.reason()
    }
}

impl fmt::Display for ColoExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "colo ended on the {}: {}", self.role, self.cause)
    }
}

/// Whether this side's VM runs after COLO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It runs, alone.
    TookOver,
    /// It is paused, because [`ColoControl::quit`](crate::driver::ColoControl::quit) was called.
    Quit,
    /// It is paused and must never run again: the install of a checkpoint broke off half way, or
    /// it could not be resumed.
    Broken(Cause),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TookOver => f.write_str("this side goes on alone"),
            Self::Quit => f.write_str("the vm quits"),
            Self::Broken(cause) => write!(f, "this vm must not run: {cause}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unexpected_message_is_named_beside_the_expected_one() {
        let cause = |expected| Cause::UnexpectedMessage {
            got: Message::VmstateLoaded,
            expected,
        };
        assert_eq!(
            cause(Some(Message::CheckpointReply)).to_string(),
            "unexpected colo message vmstate-loaded, expected checkpoint-reply"
        );
        assert_eq!(
            cause(None).to_string(),
            "unexpected colo message vmstate-loaded, expected none"
        );
    }
}
