//! COLO (coarse-grained lock-stepping): a secondary VM that is kept in step with a primary by
//! checkpoints, and carries the guest on when the primary is lost. Wire-compatible with QEMU 11.1.
//!
//! The heart of the crate does no I/O. [`Primary`] and [`Secondary`] say what is to be done next and
//! are told how it went, so that every order of events can be tried in a test; `tests/interleavings`
//! tries all of them.
//!
//! ```
//! use colo_core::{Action, Event, OnPeerLoss, Outcome, Primary};
//!
//! // A driver is this loop, with real work in place of the closure.
//! fn drive(mut machine: Primary, mut perform: impl FnMut(Action) -> Event) -> Outcome {
//!     loop {
//!         let action = machine.action();
//!         if let Action::Finish(outcome) = action {
//!             return outcome;
//!         }
//!         let event = perform(action);
//!         machine.handle(event).expect("an event that belongs to the action");
//!     }
//! }
//!
//! // The operator fails the primary over before the secondary has ever said that it is ready.
//! let outcome = drive(Primary::new(OnPeerLoss::Wait), |action| match action {
//!     wait if wait.is_wait() => Event::FailoverRequested,
//!     _ => Event::Done,
//! });
//! assert_eq!(outcome, Outcome::TookOver);
//! ```
//! | module | what |
//! |---|---|
//! | [`primary`], [`secondary`] | the order of a checkpoint, one side each |
//! | [`driver`] | the machines over real channels, for an embedder's [`Vm`] |
//! | [`message`] | what the two sides say |
//! | [`schedule`], [`deadline`] | when a checkpoint is due, and how long the peer may take |
//! | [`report`] | what a checkpoint cost |
//!
//! Whether the peer lives, and which side may go on, is told by crate `colo-heartbeat`.
#![forbid(unsafe_code)]

mod cause;
pub mod deadline;
pub mod driver;
mod ending;
mod failover;
mod machine;
pub mod message;
mod pages;
mod plan;
pub mod primary;
pub mod report;
pub mod schedule;
pub mod secondary;
mod step;
mod store;
mod vm;

pub use cause::{Cause, ColoExit, ExitReason, OnPeerLoss, Outcome, Role};
pub use deadline::{Deadlines, Timekeeper};
pub use failover::{ColoMode, ColoStatus, FailoverHandle, RequestError, StatusReason};
pub use machine::{Machine, OutOfStep, Script};
pub use message::Message;
pub use pages::{EnterError, IncomingPages};
pub use plan::{Capabilities, MigrationPlan, PlanError};
pub use primary::{Primary, Resume};
pub use report::{CheckpointMeter, CheckpointReport};
pub use schedule::Schedule;
pub use secondary::Secondary;
pub use step::{Action, Bound, Event, Moment, PeerLoss, Step, Wait};
pub use store::{ColoStore, StoreError};
pub use vm::{NoGate, NoReplication, PacketGate, Replication, Vm, VmError};
