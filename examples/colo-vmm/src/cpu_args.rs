//! What the command line says of the guest's CPUs and clocks.

use clap::{ArgAction, Args, ValueEnum};

use crate::machine::{ClockPolicy, CpuMask, CpuOptions, Pause};

/// The guest's CPUs and clocks. A simulated guest has neither.
#[derive(Clone, Debug, Args)]
pub struct CpuArgs {
    /// What kvmclock does while the guest stands still: a pause, a checkpoint, a migration. `follows`:
    /// it goes on with real time, and the guest sees a jump. `stands`: the guest sees none, and is
    /// behind by the pause for ever.
    #[arg(long, value_enum, default_value_t = PauseArg::Follows)]
    clock: PauseArg,
    /// The same for the TSC, which a guest may read without asking anybody. Timers that are set to a
    /// value of the TSC follow it.
    #[arg(long, value_enum, default_value_t = PauseArg::Stands)]
    tsc: PauseArg,
    /// Leave only these bits of a register of CPUID, or leave out a model-specific register (msr:NUMBER),
    /// so that hosts of unlike CPUs have a guest in common. Say so on both sides.
    #[arg(
        long,
        value_name = "LEAF.SUBLEAF.REGISTER=BITS,...",
        value_delimiter = ','
    )]
    cpu_mask: Vec<CpuMask>,
    /// Do not tell the other side what CPU this guest has, nor compare: for a peer that does not know
    /// how. An unlike CPU is then found out when the guest stands still, or by the guest.
    #[arg(long, action = ArgAction::SetTrue)]
    no_cpu_check: bool,
    /// Tell and compare these bits of CPUID inverted; for tests.
    #[arg(long, value_name = "LEAF.SUBLEAF.REGISTER=BITS", hide = true)]
    cpu_pretend: Vec<CpuMask>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PauseArg {
    Stands,
    Follows,
}

impl From<PauseArg> for Pause {
    fn from(arg: PauseArg) -> Self {
        match arg {
            PauseArg::Stands => Self::Stands,
            PauseArg::Follows => Self::Follows,
        }
    }
}

impl CpuArgs {
    /// The same for a machine.
    #[must_use]
    pub fn options(&self) -> CpuOptions {
        CpuOptions {
            clocks: ClockPolicy {
                kvmclock: self.clock.into(),
                tsc: self.tsc.into(),
            },
            masks: self.cpu_mask.clone(),
            compare: !self.no_cpu_check,
            pretend: self.cpu_pretend.clone(),
        }
    }
}
