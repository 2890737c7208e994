//! The heartbeat of a pair: a connection of its own on which both sides say, every 50 ms, that they
//! live, and what is done when one of them is not heard any more.
//!
//! QEMU has no heartbeat, so the format is this project's ([`raw::Beat`]). The parts without I/O are
//! [`raw::Peer`] (who was heard when), and [`raw::Decider`] (what to do about it); [`Heartbeat`] runs them in
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
//! cannot stop its guest in that time: when it is resumed, its guest may run until its heartbeat
//! thread is scheduled, a moment later.
//!
//! | module | what |
//! |---|---|
//! | [`arbiter`] | which side may run the guest: lock file, etcd, any register |
//! | [`raw`] | the parts without I/O, for other drivers and tests; not covered by semantic versioning |
//!
//! | feature | what |
//! |---|---|
//! | `colo-core` | `colo_core::FailoverHandle` as a [`Failover`]; on by default |
//! | `etcd` | the arbiter in etcd, over HTTP; off by default |
//! | `etcd-tls` | that over HTTPS as well; off by default |
#![forbid(unsafe_code)]

pub mod arbiter;
mod arbitration;
mod beat;
mod decision;
mod driver;
mod failover;
mod link;
mod peer;
mod policy;
pub mod raw;

pub use arbitration::{HoldError, TakeOverError};
pub use beat::Phase;
pub use decision::StopReason;
pub use driver::{Guest, Heartbeat, HeartbeatReport};
pub use failover::{ColoEnd, ColoState, Failover, Role};
pub use link::Endpoint;
pub use peer::{PeerState, Rhythm};
pub use policy::OnHeartbeatLoss;

#[cfg(all(doctest, feature = "colo-core"))]
#[doc = include_str!("../README.md")]
struct Readme;
