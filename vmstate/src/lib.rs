//! Versioned device state in QEMU's VMState byte format.
#![forbid(unsafe_code)]

// The derive names this crate by its name, and is used in its own tests.
extern crate self as vmstate;

#[cfg(any(test, feature = "test-utils"))]
pub mod conformance;
mod device;
mod error;
mod field;
mod json;
mod nested;
mod reader;
mod state;
mod tree;
pub mod types;
mod vmdesc;
mod writer;

pub use device::{Device, DeviceError, PoisonedLock};
pub use error::{LoadError, Location, SaveError};
pub use field::{Field, FieldType};
pub use nested::Nested;
pub use reader::{Reader, SubsectionHeader};
pub use state::{VmState, from_bytes, is_subsection_name, to_bytes, to_bytes_described};
pub use tree::{
    DeviceStep, DeviceTree, Parsed, Priority, SavedSection, Staged, StagedSection, TreeError,
};
pub use types::{Bitmap, Timer, Unused};
pub use vmdesc::{Description, Vmdesc};
#[cfg(feature = "derive")]
pub use vmstate_derive::VmState;
pub use writer::Writer;

/// The byte before a subsection.
pub(crate) const SUBSECTION: u8 = 0x05;
