//! Compares two dumps of device state as declared (QEMU's `-dump-vmstate`, `vmstate`'s
//! [`Dump`](vmstate::Dump)) and says whether a stream of the one loads in the other.
//!
//! ```
//! use vmstate::VmState;
//! use vmstate_check::{Dump, check, is_compatible};
//!
//! /// What the last release had, kept for the test.
//! #[derive(VmState)]
//! #[vmstate(name = "pit", version = 1)]
//! struct OldPit {
//!     count: u32,
//! }
//!
//! #[derive(VmState)]
//! #[vmstate(name = "pit", version = 2, minimum_version = 1)]
//! struct Pit {
//!     count: u32,
//!     #[vmstate(since = 2)]
//!     latch: u16,
//! }
//!
//! # fn main() -> Result<(), vmstate_check::DumpError> {
//! let old = Dump::try_from(&vmstate::Dump::new("board").section::<OldPit>("pit"))?;
//! let new = Dump::try_from(&vmstate::Dump::new("board").section::<Pit>("pit"))?;
//! assert!(is_compatible(&check(&old, &new)));
//!
//! let backward = check(&new, &old);
//! assert_eq!(
//!     backward[0].to_string(),
//!     "error: pit > pit: version 2 in the source is newer than the destination's 1"
//! );
//! # Ok(())
//! # }
//! ```
//!
//! What is compared is what QEMU 11.1's loader (`migration/vmstate.c`) does with a stream: which
//! fields are in it at its version, which are read at that version, and which subsections are known
//! by name.
//!
//! | module | what |
//! |---|---|
//! | [`dump`] | a dump, read from its JSON |
//! | [`check()`] | the comparison |
//! | [`finding`] | what it finds |
//! | `fields` | the fields of a description, in the order of their bytes |
//! | `renames` | what QEMU has given another name without changing the stream |
//! | [`cli`] | the program |
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod check;
pub mod cli;
pub mod dump;
mod fields;
pub mod finding;
mod renames;

pub use check::check;
pub use dump::{Dump, DumpError};
pub use finding::{Difference, Finding, Severity, is_compatible};
