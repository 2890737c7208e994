//! A small KVM VMM that outlives its host: the example of the migration crates.
//!
//! Build a machine, let it run, stop it, save it:
//!
//! ```
//! use std::sync::Arc;
//!
//! use colo_vmm::guest::WorkloadConfig;
//! use colo_vmm::machine::{CpuOptions, GuestImage, Machine, MachineConfig, SimMachine};
//! use colo_vmm::memory::Memory;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // `KvmMachine` takes the same configuration.
//! let mut machine = SimMachine::new(MachineConfig {
//!     memory: Arc::new(Memory::new(16 << 20)?),
//!     vcpus: 1,
//!     guest: Some(GuestImage::Workload(WorkloadConfig::default())),
//!     serial: Box::new(std::io::sink()),
//!     cpu: CpuOptions::default(),
//! })?;
//! machine.resume()?;
//! machine.stop()?;
//! for section in machine.devices()?.save_all()? {
//!     println!("{} {}: {} bytes", section.idstr, section.instance_id, section.body.len());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! - [`machine`]: what can be run, stopped, saved, loaded and resumed, on KVM or simulated
//! - [`memory`]: guest RAM, as the guest and as migration see it
//! - [`dirty_log`]: which pages were written
//! - [`vcpu`]: threads in the guest
//! - [`devices`]: one file each, with its state
//! - [`loader`] and [`guest`]: what runs
//! - [`vm`] and [`console`]: the machine with its run state, and the guest's output with its gate
//! - [`lossy_writer`]: writes to readers that may be slow
//! - [`migration`]: the crates at work, live migration and COLO
//! - [`heartbeat`]: whether the other side lives; [`arbiter`]: who says which side goes on
//! - [`metrics`]: figures for Prometheus
//! - [`monitor`], [`operator`] and [`qmp`]: what an operator can ask for, and how
//! - [`lifecycle`]: a pair's life in one command each; [`demo`]: an operator of a pair, played
//! - [`standby`]: guests of QEMU that are held, and restored when their primary is lost
//! - [`cli`] and [`event_loop`]: the program; [`error_chain`]: what it says of an error

pub mod arbiter;
pub mod cli;
pub mod console;
mod cpu_args;
pub mod demo;
pub mod devices;
pub mod dirty_log;
pub mod error_chain;
pub mod event_loop;
pub(crate) mod figures;
pub mod guest;
pub mod heartbeat;
pub mod lifecycle;
pub mod loader;
pub mod lossy_writer;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod migration;
pub mod monitor;
pub mod operator;
pub mod qmp;
pub mod standby;
pub mod vcpu;
pub mod vm;
