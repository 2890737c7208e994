//! What the tests across crates share: real QEMU processes, their QMP sockets, captured streams,
//! guests with known memory, and a harness that says why a test was not run.
//!
//! ```no_run
//! use tests::harness::{self, Needs};
//! use tests::qemu::Machine;
//!
//! fn main() -> std::process::ExitCode {
//!     let qemu = Needs::NOTHING.qemu((11, 1));
//!     harness::run([qemu.test_qemu("a_stopped_guest_is_stopped", |qemu| {
//!         let mut vm = Machine::new("q35", 16).start(qemu)?;
//!         vm.wait_status("prelaunch")?;
//!         Ok(())
//!     })])
//! }
//! ```
#![forbid(unsafe_code)]

pub mod capture;
pub mod certificates;
pub mod contents;
pub mod disk;
pub mod etcd;
pub mod gate;
pub mod guest;
pub mod harness;
pub mod hosts;
pub mod huge_pages;
pub mod linux;
pub mod metrics;
pub mod moments;
pub mod narrow;
pub mod netns;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod relay;
pub mod resident;
pub mod sample;
pub mod scripts;
pub mod store;
pub mod stored;
pub mod succession;
pub mod vmm;
pub mod written;

use std::time::Duration;

/// Why a helper could not do its part; a trial that returns it fails with its text.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// What helpers return.
pub type Result<T> = std::result::Result<T, Error>;

/// How long a test waits for another process before it fails: far beyond what a busy machine
/// needs, far below what a person takes for a hang.
pub const PATIENCE: Duration = Duration::from_secs(60);
