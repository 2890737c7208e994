//! The parts without I/O that the heartbeat and the arbiters are made of: for other drivers, and for tests
//! that try every order of events. Semantic versioning does not cover this module.

pub use crate::arbiter::record::{Lease, Record, RecordError, TEXT_LEN, Verdict, claim, hold};
pub use crate::arbiter::register::{ENTRY_LEN, Entry, Mark, Next, Seat, Want};
pub use crate::beat::{BEAT_LEN, Beat, BeatError};
pub use crate::decision::{Colo, Decider, Order, Requested, View};
pub use crate::peer::{Peer, Silence};
