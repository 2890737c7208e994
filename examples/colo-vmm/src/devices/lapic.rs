//! A vCPU's local APIC, in the kernel.
//!
//! While the VM is stopped its timer is held by [`Clocks`]: KVM's own is not armed, and the
//! counts in the state are those at which it was stopped.

use std::sync::Arc;

use kvm_bindings::kvm_lapic_state;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};
use crate::machine::{Clocks, LapicTimer};
use crate::vcpu::Vcpu;

const BYTES: usize = 1024;
/// Register offsets in the APIC page.
const VERSION: usize = 0x30;
const TIMER_INITIAL_COUNT: usize = 0x380;
const TIMER_CURRENT_COUNT: usize = 0x390;

/// The APIC's registers.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "lapic", version = 1)]
pub struct LapicState {
    /// The first KiB of the APIC page: a little-endian 32-bit register every 16 bytes.
    pub registers: [u8; BYTES],
}

/// The local APIC of one vCPU as a device.
#[derive(Debug)]
pub struct Lapic {
    vcpu: Arc<Vcpu>,
    clocks: Arc<Clocks>,
    power_on: LapicState,
}

impl Lapic {
    /// The local APIC of `vcpu`, which is at power-on.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vcpu: Arc<Vcpu>, clocks: Arc<Clocks>) -> Result<Self, KvmDeviceError> {
        let power_on = LapicState {
            registers: vcpu
                .fd()?
                .get_lapic()
                .map_err(kvm("KVM_GET_LAPIC"))?
                .regs
                .map(i8::cast_unsigned),
        };
        Ok(Self {
            vcpu,
            clocks,
            power_on,
        })
    }

    fn write(&self, state: &LapicState) -> Result<(), KvmDeviceError> {
        let regs = kvm_lapic_state {
            regs: state.registers.map(u8::cast_signed),
        };
        self.clocks
            .set_lapic_timer(self.vcpu.index(), timer_of(&regs));
        let stopped = with_timer(regs, LapicTimer::default());
        self.vcpu
            .fd()?
            .set_lapic(&stopped)
            .map_err(kvm("KVM_SET_LAPIC"))
    }
}

impl Device for Lapic {
    type State = LapicState;

    fn save(&mut self) -> Result<LapicState, DeviceError> {
        let regs = self.vcpu.fd()?.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        let regs = with_timer(regs, self.clocks.lapic_timer(self.vcpu.index()));
        Ok(LapicState {
            registers: regs.regs.map(i8::cast_unsigned),
        })
    }

    fn check(&self, state: &LapicState) -> Result<(), DeviceError> {
        let (theirs, ours) = (state.registers[VERSION], self.power_on.registers[VERSION]);
        if theirs != ours {
            return Err(KvmDeviceError::Value {
                field: "apic version",
                value: theirs.into(),
                expected: "the version of this host's",
            }
            .into());
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(self.write(&self.power_on)?)
    }

    fn install(&mut self, state: LapicState) -> Result<(), DeviceError> {
        Ok(self.write(&state)?)
    }
}

fn register(regs: &kvm_lapic_state, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    for (byte, reg) in bytes.iter_mut().zip(&regs.regs[offset..]) {
        *byte = reg.cast_unsigned();
    }
    u32::from_le_bytes(bytes)
}

fn set_register(regs: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (reg, byte) in regs.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *reg = byte.cast_signed();
    }
}

/// The timer's counts in the registers.
pub fn timer_of(regs: &kvm_lapic_state) -> LapicTimer {
    LapicTimer {
        initial: register(regs, TIMER_INITIAL_COUNT),
        current: register(regs, TIMER_CURRENT_COUNT),
    }
}

/// The registers with these counts in them.
pub fn with_timer(mut regs: kvm_lapic_state, timer: LapicTimer) -> kvm_lapic_state {
    set_register(&mut regs, TIMER_INITIAL_COUNT, timer.initial);
    set_register(&mut regs, TIMER_CURRENT_COUNT, timer.current);
    regs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_is_cut_out_and_put_back() {
        let timer = LapicTimer {
            initial: 0xdead_beef,
            current: 0x8000_0001,
        };
        let regs = with_timer(kvm_lapic_state::default(), timer);
        assert_eq!(timer_of(&regs), timer);
        assert_eq!(
            with_timer(regs, LapicTimer::default()),
            kvm_lapic_state::default()
        );
    }
}
