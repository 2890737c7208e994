//! Versioned device state in QEMU's VMState byte format: a derive for the state of a device, and a
//! tree of devices that is saved in section order and loaded all or none.
//!
//! ```
//! use vmstate::{Device, DeviceError, DeviceTree, Priority, VmState};
//!
//! #[derive(VmState, Clone, Default)]
//! #[vmstate(name = "serial", version = 3, minimum_version = 2)]
//! struct SerialState {
//!     divider: u16,
//!     #[vmstate(since = 3)]
//!     fcr: u8,
//!     fifo: [u8; 16],
//!     #[vmstate(subsection)]
//!     timeout: Option<TimeoutState>,
//! }
//!
//! #[derive(VmState, Clone, Default)]
//! #[vmstate(name = "serial/timeout", version = 1)]
//! struct TimeoutState {
//!     expiry: vmstate::Timer,
//! }
//!
//! #[derive(Default)]
//! struct Serial {
//!     state: SerialState,
//! }
//!
//! impl Device for Serial {
//!     type State = SerialState;
//!
//!     fn save(&mut self) -> Result<SerialState, DeviceError> {
//!         Ok(self.state.clone())
//!     }
//!     fn reset(&mut self) -> Result<(), DeviceError> {
//!         self.state = SerialState::default();
//!         Ok(())
//!     }
//!     fn install(&mut self, state: SerialState) -> Result<(), DeviceError> {
//!         self.state = state;
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (mut source, mut target) = (DeviceTree::new(), DeviceTree::new());
//! source.register("serial", 0, Priority::Default, Serial::default())?;
//! target.register("serial", 0, Priority::Default, Serial::default())?;
//!
//! let mut sections = Vec::new();
//! for s in source.save_all()? {
//!     let parsed = target.parse_section(&s.idstr, s.instance_id, s.version, &s.body, true)?;
//!     sections.push(parsed.section);
//! }
//! let staged = target.stage(sections)?; // every device is there and agrees; none was touched
//! target.reset_then_install(staged)?;
//! # Ok(())
//! # }
//! ```
//!
//! The bytes are those of QEMU 11.1 (`migration/vmstate.c` and `vmstate-types.c` there):
//! a description is its fields, big endian, without tags or lengths, and then its subsections.
//!
//! # Features
//! * `derive` (default): `#[derive(VmState)]`, explained at [`VmState`].
//! * `test-utils`: `conformance`, a check for the tests of devices.
#![forbid(unsafe_code)]

// The derive names this crate by its name, and is used in its own tests.
extern crate self as vmstate;

#[cfg(any(test, feature = "test-utils"))]
pub mod conformance;
mod device;
mod dump;
mod error;
mod field;
mod field_type;
mod json;
mod members;
mod nested;
mod pointee;
mod reader;
mod schema;
mod spec;
mod state;
mod tree;
mod tree_key;
pub mod types;
mod vmdesc;
mod writer;

pub use device::{Device, DeviceError, PoisonedLock};
pub use dump::Dump;
pub use error::{LoadError, Location, SaveError};
pub use field::Field;
pub use field_type::FieldType;
pub use nested::Nested;
pub use pointee::Pointee;
pub use reader::{Reader, SubsectionHeader};
pub use schema::{Schema, SchemaBuilder};
pub use spec::FieldSpec;
pub use state::{VmState, from_bytes, is_subsection_name, to_bytes, to_bytes_described};
pub use tree::{
    DeviceStep, DeviceTree, Parsed, Priority, ResetDone, SavedSection, Staged, StagedSection,
    TreeError,
};
pub use tree_key::TreeKey;
pub use types::{Bitmap, Bits, ByteArray, Capability, CpuDouble, Timer, Unused};
pub use vmdesc::{Description, Vmdesc};
#[cfg(feature = "derive")]
pub use vmstate_derive::VmState;
pub use writer::Writer;

/// The byte before a subsection.
pub(crate) const SUBSECTION: u8 = 0x05;

/// The byte of a pointer that is NULL in an array of pointers.
pub(crate) const NULL_POINTER: u8 = b'0';
/// The byte before the element of a pointer that is not, where every pointer has one.
pub(crate) const VALID_POINTER: u8 = b'1';

/// A count of whatever integer type, for the derive; one that 128 bits cannot say is no count.
#[doc(hidden)]
pub fn count(n: impl TryInto<i128>) -> i128 {
    n.try_into().unwrap_or(-1)
}

/// Whether a part lies within an array, for the derive.
#[doc(hidden)]
#[must_use]
pub const fn is_part(start: usize, end: usize, len: usize) -> bool {
    start <= end && end <= len
}

/// The length of a part, for the derive.
#[doc(hidden)]
#[must_use]
pub const fn part_len(start: usize, end: usize) -> usize {
    end.saturating_sub(start)
}

/// Compiles and runs the example of the README.
#[cfg(all(doctest, feature = "derive"))]
#[doc = include_str!("../README.md")]
struct Readme;
