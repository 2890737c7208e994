//! The heartbeat of a COLO pair, and the decision which side goes on when one side is lost.
//!
//! Both sides send a beat every 50 ms on a connection of their own. QEMU has no heartbeat, so the format is
//! this project's ([`raw::Beat`]). [`raw::Peer`] (liveness) and [`raw::Decider`] (decisions) have no I/O.
//! [`Heartbeat`] runs them in threads of its own, so neither a checkpoint nor a paused guest delays a beat.
//! All times are of a monotonic clock.
//!
//! # Liveness
//! - The peer is lost when three beats in a row were not received, or not answered. The number is configurable.
//! - A connection that breaks is made again. Only missing beats count as a loss, unless
//!   [`Rhythm::closed_is_loss`] is set.
//! - A side does not count time in which it was not scheduled itself. Its thread raises its priority where
//!   that is permitted.
//!
//! # Ownership
//! Without a heartbeat nobody notices a frozen host. A primary that was frozen (`SIGSTOP`, a host that sleeps)
//! while its secondary took over is a second guest when it wakes. With [`OnHeartbeatLoss::TakeOver`] on the
//! secondary the primary's guest runs until its heartbeat thread has received the secondary's beat. Only an
//! arbiter excludes that time.
//!
//! With [`OnHeartbeatLoss::Ask`] and a leasing arbiter the two guests never both run after the arbiter has
//! decided, as long as a guest can be stopped within a quarter of the term and of the timeout. A *process*
//! that is stopped for longer cannot do that: its guest may run, after it is woken, until its heartbeat
//! thread is scheduled.
//!
//! # Trust
//! Beats carry the guest's UUID and the process's number, and no secret. The heartbeat belongs on a network
//! that only the pair can reach. A flood of connections delays no beat, and keeps no peer out.
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
