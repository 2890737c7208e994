//! The heartbeat of a pair: a connection of its own on which both sides say, every 50 ms, that they
//! live, and what is done when one of them is not heard any more.
//!
//! QEMU has no heartbeat, so the format is this project's ([`beat`]). The parts without I/O are
//! [`Peer`] (who was heard when), and [`Decider`] (what to do about it); [`Heartbeat`] runs them in
//! threads of its own, so that neither a checkpoint nor a stopped guest starves them. Time is
//! monotonic everywhere: setting a host's clock changes nothing.
//!
//! What is lost: three beats in a row (configurable) were not heard, or were not answered. A
//! connection that breaks is made again, and counts only by the beats that are missing meanwhile,
//! unless [`Rhythm::closed_is_loss`] says otherwise. A side judges its peer by what it has read at its
//! last look, and does not count time in which it should have looked and was not scheduled. Its
//! thread asks for the highest priority there is without being a real-time one, so that it is not late
//! itself on a host that is busy; who may not have that priority goes on without.
//!
//! Without a heartbeat nobody notices a host that was frozen. A primary that stands still for longer than
//! its secondary waits (`SIGSTOP`, a host that sleeps), and wakes when the secondary has taken over, is a
//! second guest. With [`OnHeartbeatLoss::TakeOver`] on the secondary and a heartbeat it runs until its
//! thread has heard that the secondary goes on alone; only an arbiter rules that time out.
//!
//! Whoever can connect can beat: beats carry the guest's UUID and the process's number, and no
//! secret. The heartbeat belongs on a network that only the pair can reach. A flood of connections
//! that do not beat delays no beat, and keeps no peer out.
//!
//! What is promised with [`OnHeartbeatLoss::Ask`] and a leasing arbiter: the two guests never both
//! run after the arbiter has decided, as long as a guest can be stopped within a quarter of the term
//! and of the timeout. A *process* that does not run for longer (`SIGSTOP`, a host that sleeps)
//! cannot stop its guest in that time: when it is let go on, its guest may run until its heartbeat
//! thread is scheduled, a moment later.

mod arbitration;
pub mod beat;
mod decision;
mod driver;
mod link;
mod peer;

use std::fmt;

pub use arbitration::{HoldError, TakeOverError};
pub use beat::{BEAT_LEN, Beat, BeatError, Phase};
pub use decision::{Colo, Decider, Order, Requested, StopReason, View};
pub use driver::{Guest, Heartbeat, HeartbeatConfig, HeartbeatReport};
pub use link::Endpoint;
pub use peer::{Peer, PeerState, Rhythm, Silence};

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
