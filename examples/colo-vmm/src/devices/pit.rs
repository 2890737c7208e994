//! The 8254 interval timer, in the kernel.
//!
//! KVM remembers when each counter was loaded, by the host's clock, and begins anew whenever
//! state is set. So the time is not part of the state, and a counter that is running begins its
//! period again when the VM resumes: a tick may come late by up to one period.
//!
//! While the VM is stopped KVM's timer is off: with the flag that hands channel 0 over to an HPET
//! (which this machine does not have) KVM keeps the registers and lets nothing fire.

use std::sync::Arc;

use kvm_bindings::{
    KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};

/// KVM's mode of a channel that nobody has programmed.
const MODE_NONE: u8 = 0xff;

/// The timer's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "i8254", version = 1)]
pub struct PitState {
    /// The three counters.
    #[vmstate(nested)]
    pub channels: [PitChannelState; 3],
    /// Whether the speaker's data bit is on.
    pub speaker: bool,
}

/// One counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "i8254-channel", version = 1)]
pub struct PitChannelState {
    /// The count it was loaded with, 1 to 65536.
    pub count: u32,
    /// A count that was latched.
    pub latched_count: u16,
    /// How many bytes of it are to be read.
    pub count_latched: u8,
    /// Whether the status was latched.
    pub status_latched: u8,
    /// The status.
    pub status: u8,
    /// Which byte the next read gives.
    pub read_state: u8,
    /// Which byte the next write is.
    pub write_state: u8,
    /// The first byte of two written.
    pub write_latch: u8,
    /// Which bytes are accessed.
    pub rw_mode: u8,
    /// Mode 0 to 5; 0xff before it is programmed.
    pub mode: u8,
    /// Counts in BCD.
    pub bcd: u8,
    /// The gate input.
    pub gate: u8,
}

/// The 8254 as a device.
#[derive(Debug)]
pub struct Pit {
    vm: Arc<VmFd>,
    power_on: PitState,
}

impl Pit {
    /// The timer of `vm`, at power-on.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, KvmDeviceError> {
        let power_on = read(&vm)?;
        Ok(Self { vm, power_on })
    }

    /// Stops the ticks of `vm`'s timer, if it ticks.
    pub(crate) fn stop_ticks(vm: &VmFd) -> Result<(), KvmDeviceError> {
        let mut state = vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?;
        if ticks(&state) {
            state.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
            vm.set_pit2(&state).map_err(kvm("KVM_SET_PIT2"))?;
        }
        Ok(())
    }

    /// Lets the timer tick again, if it did.
    pub(crate) fn start_ticks(vm: &VmFd) -> Result<(), KvmDeviceError> {
        let mut state = vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?;
        if state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0 {
            state.flags &= !KVM_PIT_FLAGS_HPET_LEGACY;
            vm.set_pit2(&state).map_err(kvm("KVM_SET_PIT2"))?;
        }
        Ok(())
    }
}

const fn ticks(state: &kvm_pit_state2) -> bool {
    state.channels[0].mode != MODE_NONE && state.flags & KVM_PIT_FLAGS_HPET_LEGACY == 0
}

impl Device for Pit {
    type State = PitState;

    fn save(&mut self) -> Result<PitState, DeviceError> {
        Ok(read(&self.vm)?)
    }

    fn check(&self, state: &PitState) -> Result<(), DeviceError> {
        for channel in &state.channels {
            if channel.count == 0 || channel.count > 0x1_0000 {
                return Err(KvmDeviceError::Value {
                    field: "count",
                    value: channel.count.into(),
                    expected: "1 to 0x10000",
                }
                .into());
            }
            if channel.mode > 5 && channel.mode != MODE_NONE {
                return Err(KvmDeviceError::Value {
                    field: "mode",
                    value: channel.mode.into(),
                    expected: "0 to 5 or 0xff",
                }
                .into());
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(write(&self.vm, &self.power_on)?)
    }

    fn install(&mut self, state: PitState) -> Result<(), DeviceError> {
        Ok(write(&self.vm, &state)?)
    }
}

fn read(vm: &VmFd) -> Result<PitState, KvmDeviceError> {
    let state = vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?;
    Ok(PitState {
        channels: state.channels.map(|c| PitChannelState {
            count: c.count,
            latched_count: c.latched_count,
            count_latched: c.count_latched,
            status_latched: c.status_latched,
            status: c.status,
            read_state: c.read_state,
            write_state: c.write_state,
            write_latch: c.write_latch,
            rw_mode: c.rw_mode,
            mode: c.mode,
            bcd: c.bcd,
            gate: c.gate,
        }),
        speaker: state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0,
    })
}

/// Sets the registers and leaves the timer off, for [`Pit::start_ticks`] to start.
fn write(vm: &VmFd, state: &PitState) -> Result<(), KvmDeviceError> {
    let mut pit = kvm_pit_state2 {
        channels: state.channels.map(|c| kvm_pit_channel_state {
            count: c.count,
            latched_count: c.latched_count,
            count_latched: c.count_latched,
            status_latched: c.status_latched,
            status: c.status,
            read_state: c.read_state,
            write_state: c.write_state,
            write_latch: c.write_latch,
            rw_mode: c.rw_mode,
            mode: c.mode,
            bcd: c.bcd,
            gate: c.gate,
            count_load_time: 0,
        }),
        ..kvm_pit_state2::default()
    };
    if state.speaker {
        pit.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    }
    if ticks(&pit) {
        pit.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
    }
    vm.set_pit2(&pit).map_err(kvm("KVM_SET_PIT2"))
}
