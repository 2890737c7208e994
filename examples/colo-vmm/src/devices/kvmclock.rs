//! The VM's paravirtual clock. It stands while the VM is stopped.

use std::sync::Arc;

use vmstate::{Device, DeviceError, VmState};

use crate::machine::Clocks;

/// The clock's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "kvmclock", version = 1)]
pub struct KvmClockState {
    /// Nanoseconds.
    pub clock: u64,
}

/// The clock as a device.
#[derive(Debug)]
pub struct KvmClock {
    clocks: Arc<Clocks>,
}

impl KvmClock {
    /// The clock of the machine that `clocks` belongs to.
    #[must_use]
    pub const fn new(clocks: Arc<Clocks>) -> Self {
        Self { clocks }
    }
}

impl Device for KvmClock {
    type State = KvmClockState;

    fn save(&mut self) -> Result<KvmClockState, DeviceError> {
        Ok(KvmClockState {
            clock: self.clocks.kvmclock(),
        })
    }

    fn check(&self, _state: &KvmClockState) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.clocks.set_kvmclock(0);
        Ok(())
    }

    fn install(&mut self, state: KvmClockState) -> Result<(), DeviceError> {
        self.clocks.set_kvmclock(state.clock);
        Ok(())
    }
}
