//! The VM's paravirtual clock. While the VM is stopped its value is that of the stop; whether it has gone
//! on meanwhile shows when the VM resumes.

use std::sync::Arc;

use vmstate::{Device, DeviceError, VmState};

use crate::machine::Clocks;

/// The clock's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "kvmclock", version = 1)]
pub struct KvmClockState {
    /// Nanoseconds.
    pub clock: u64,
    /// When it was that, where it is to go on by real time.
    #[vmstate(subsection)]
    pub read_at: Option<KvmClockReadAt>,
}

/// When the clock and the TSCs were read. A source before this one, or one whose clocks all stand, has
/// none, and then they stand until the guest runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "kvmclock/read-at", version = 1)]
pub struct KvmClockReadAt {
    /// Real time (`CLOCK_REALTIME`), nanoseconds.
    pub realtime: u64,
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
            read_at: (self.clocks.read_at()).map(|realtime| KvmClockReadAt { realtime }),
        })
    }

    fn check(&self, _state: &KvmClockState) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.clocks.set_kvmclock(0, None);
        Ok(())
    }

    fn install(&mut self, state: KvmClockState) -> Result<(), DeviceError> {
        let read_at = state.read_at.map(|read_at| read_at.realtime);
        self.clocks.set_kvmclock(state.clock, read_at);
        Ok(())
    }
}
