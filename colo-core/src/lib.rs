//! COLO (coarse-grained lock-stepping): a secondary VM that is kept in step with a primary by
//! checkpoints, and carries the guest on when the primary is lost. Wire-compatible with QEMU 11.1.
//!
//! An embedder implements [`ColoVm`], and runs a driver when a migration has switched over:
//!
//! ```
//! use std::error::Error;
//! use std::time::Duration;
//!
//! use colo_core::driver::{ColoControl, DriverConfig, Hooks, SecondaryLink, run_secondary};
//! use colo_core::{ColoVm, FailoverHandle, NoGate, NoReplication, Outcome, Role};
//! use migration_stream::DirtyLog;
//!
//! fn secondary<V: ColoVm>(
//!     vm: V,
//!     link: SecondaryLink<impl DirtyLog>,
//!     failover: &FailoverHandle,
//!     shut_connections: impl Fn() + Send + Sync + 'static,
//! ) -> Result<Outcome, Box<dyn Error>> {
//!     let control = ColoControl::new(Role::Secondary, failover.clone(), Duration::ZERO, shut_connections)?;
//!     let mut hooks = Hooks { vm, replication: NoReplication, gate: NoGate };
//!     // Other threads may now call `failover.request()`, and clones of `control`.
//!     Ok(run_secondary(link, &mut hooks, &control, DriverConfig::default())?)
//! }
//! ```
//!
//! | where | what |
//! |---|---|
//! | [`ColoVm`], [`Replication`], [`PacketGate`] | what a VMM implements |
//! | [`driver`] | both sides over real channels, and [`ColoControl`](driver::ColoControl) for other threads |
//! | [`FailoverHandle`] | an operator's request and the status |
//! | [`ColoStore`] | the secondary's memory |
//! | [`MigrationPlan`] | which capabilities go together |
//! | [`raw`] | the state machines without I/O, and the sequence diagrams ([`raw::Primary`], [`raw::Secondary`]); not covered by semantic versioning |
//!
//! Crate `colo-heartbeat` finds out whether the peer lives, and decides which side goes on.
#![forbid(unsafe_code)]

mod action;
mod cause;
mod deadline;
pub mod driver;
mod ending;
mod failover;
mod machine;
mod message;
mod plan;
mod primary;
pub mod raw;
mod report;
mod schedule;
mod secondary;
mod step;
mod store;
mod vm;

pub use action::ProtocolMisuse;
pub use cause::{Cause, ColoExit, ExitReason, OnPeerLoss, Outcome, Role};
pub use deadline::Deadlines;
pub use failover::{ColoMode, ColoStatus, FailoverHandle, RequestError, StatusReason};
pub use message::Message;
pub use plan::{Capabilities, MigrationPlan, PlanError};
pub use primary::Resume;
pub use report::CheckpointReport;
pub use step::{PeerLoss, Step, StepPhase, Wait};
pub use store::{ColoStore, StoreError};
pub use vm::{ColoObserver, ColoVm, NoGate, NoReplication, PacketGate, Replication, VmError};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
