//! Both sides' state machines without I/O: for drivers other than [`driver`](crate::driver)'s, and for
//! tests that try every order of events. Semantic versioning does not cover this module.
//!
//! A driver performs a machine's [`Action`], and hands it the [`Event`] that the action ended with.
//!
//! ```
//! use colo_core::raw::{Action, Event, Primary};
//! use colo_core::{OnPeerLoss, Outcome};
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

pub use crate::action::{Action, Event};
pub use crate::deadline::Timekeeper;
pub use crate::failover::FailoverSlot;
pub use crate::machine::{Machine, Script};
pub use crate::message::{
    DEVICE_SIZE_LEN, DeviceStateTooLarge, MESSAGE_LEN, UnknownMessage, decode_device_size,
    decode_message, encode_message, encode_vmstate_size,
};
pub use crate::primary::{Primary, PrimaryScript};
pub use crate::schedule::{DEFAULT_DELAY, DEFAULT_MIN_GAP, Schedule};
pub use crate::secondary::{Secondary, SecondaryScript};
pub use crate::store::{enter_colo, flush, guest_stopped, reclaim};
