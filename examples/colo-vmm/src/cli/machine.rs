//! The machine and its built-in guest, as options of several subcommands.

use std::error::Error;
use std::ops::RangeInclusive;
use std::sync::Arc;

use clap::Args;
use clap::builder::RangedU64ValueParser;

use crate::guest::WorkloadConfig;
use crate::machine::{
    CpuOptions, GuestImage, KvmMachine, Machine, MachineConfig, SerialSink, SimMachine,
};
use crate::memory::Memory;

/// Guest RAM that can be asked for, MiB: up to what page tables of four levels reach.
pub(crate) const MEMORY_MIB: RangeInclusive<u64> = 1..=(1 << 28) - 1;
/// How many vCPUs can be asked for. KVM may allow fewer.
pub(crate) const VCPUS: RangeInclusive<i64> = 1..=255;

/// Reads the value of `--max-device-state`, MiB.
pub(crate) fn max_device_state() -> RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=1 << 20)
}

/// Bytes of so many MiB.
pub(crate) fn mebibytes(count: u64) -> usize {
    usize::try_from(count).map_or(usize::MAX, |count| count.saturating_mul(1 << 20))
}

/// What a machine consists of.
#[derive(Clone, Debug, Args)]
pub struct MachineArgs {
    /// Guest RAM, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(MEMORY_MIB))]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(VCPUS))]
    pub vcpus: u8,
    /// Run a simulated guest in this process; needs no KVM, and runs only the workload.
    #[arg(long)]
    pub sim: bool,
}

impl MachineArgs {
    /// A stopped machine with `guest` in it, or an empty one for an incoming migration.
    ///
    /// # Errors
    /// See [`MachineError`](crate::machine::MachineError).
    pub fn build(
        &self,
        guest: Option<GuestImage>,
        serial: SerialSink,
        cpu: CpuOptions,
    ) -> Result<Box<dyn Machine>, Box<dyn Error>> {
        let config = MachineConfig {
            memory: Arc::new(Memory::new(self.memory.saturating_mul(1 << 20))?),
            vcpus: self.vcpus,
            guest,
            serial,
            cpu,
        };
        Ok(if self.sim {
            Box::new(SimMachine::new(config)?)
        } else {
            Box::new(KvmMachine::new(config)?)
        })
    }
}

/// The built-in guest's parameters.
#[derive(Clone, Debug, Args)]
pub struct WorkloadArgs {
    /// Pages that each vCPU of the workload dirties in a pass.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub dirty_pages: u32,
    /// Turns of an empty loop that each vCPU of the workload makes after a pass.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub pass_delay: u32,
    /// Before the workload begins every page of RAM is written to, so that none is zero. Above 4 GiB,
    /// where the guest does not reach, colo-vmm writes; the file of `colo-vmm guest` fills what is
    /// below 3 GiB.
    #[arg(long)]
    pub fill_ram: bool,
}

impl WorkloadArgs {
    /// The workload for a machine of this size.
    #[must_use]
    pub fn config(&self, memory_mib: u64, cpus: u8) -> WorkloadConfig {
        WorkloadConfig {
            memory_mib,
            dirty_pages: self.dirty_pages,
            pass_delay: self.pass_delay,
            cpus,
            fills_ram: self.fill_ram,
            ..WorkloadConfig::default()
        }
    }
}
