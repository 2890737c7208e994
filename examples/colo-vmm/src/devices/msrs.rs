//! A vCPU's model-specific registers: those of KVM's list that this host lets us read and write.

use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};
use crate::machine::Clocks;
use crate::vcpu::Vcpu;

pub const MSR_TSC: u32 = 0x10;
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Two names of the register that has KVM write the wall clock to guest memory *when it is
/// written*: a command, which a load must not repeat.
const MSR_KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// More than any host has; it bounds what a hostile peer can make us allocate.
const MAX_REGISTERS: usize = 1024;

/// Numbers and values of registers, in ascending order of number.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-msrs", version = 1)]
pub struct ModelRegistersState {
    /// How many there are.
    pub count: u32,
    /// Their numbers.
    #[vmstate(len = count, max = MAX_REGISTERS)]
    pub indices: Vec<u32>,
    /// Their values.
    #[vmstate(len = count, max = MAX_REGISTERS)]
    pub values: Vec<u64>,
    /// How fast the TSC runs. A source before this one does not say.
    #[vmstate(subsection)]
    pub tsc: Option<TscFrequencyState>,
}

/// The frequency of a vCPU's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-msrs/tsc", version = 1)]
pub struct TscFrequencyState {
    /// kHz.
    pub khz: u32,
}

/// The model-specific registers of one vCPU as a device.
#[derive(Debug)]
pub struct ModelRegisters {
    vcpu: Arc<Vcpu>,
    clocks: Arc<Clocks>,
    indices: Vec<u32>,
    power_on: Vec<kvm_msr_entry>,
    tells_frequency: bool,
}

impl ModelRegisters {
    /// Those of `list` that can be read and written on `vcpu`, which is at power-on. Whether the state
    /// says how fast the TSC runs: `tells_frequency`.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(
        vcpu: Arc<Vcpu>,
        clocks: Arc<Clocks>,
        list: &[u32],
        tells_frequency: bool,
    ) -> Result<Self, KvmDeviceError> {
        let mut indices = list.to_vec();
        indices.retain(|index| !MSR_KVM_WALL_CLOCK.contains(index));
        indices.sort_unstable();
        indices.dedup();
        let mut power_on = Vec::with_capacity(indices.len());
        let fd = vcpu.fd()?;
        for index in indices {
            if let Ok(values) = read_msrs(&fd, &[index])
                && (is_clock(index) || write_msrs(&fd, &values).is_ok())
            {
                power_on.extend(values);
            } else {
                tracing::debug!(
                    msr = format_args!("{index:#x}"),
                    "cannot be saved on this host"
                );
            }
        }
        drop(fd);
        // A TSC begins at zero.
        for entry in &mut power_on {
            if is_clock(entry.index) {
                entry.data = 0;
            }
        }
        Ok(Self {
            vcpu,
            clocks,
            indices: power_on.iter().map(|entry| entry.index).collect(),
            power_on,
            tells_frequency,
        })
    }

    /// The numbers of the registers, in ascending order.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    fn write(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmDeviceError> {
        let vcpu = self.vcpu.index();
        let mut stored = Vec::with_capacity(entries.len());
        for entry in entries {
            match entry.index {
                MSR_TSC => self.clocks.set_tsc(vcpu, entry.data),
                MSR_TSC_DEADLINE => self.clocks.set_tsc_deadline(vcpu, entry.data),
                _ => stored.push(*entry),
            }
        }
        write_msrs(&*self.vcpu.fd()?, &stored)
    }
}

const fn is_clock(index: u32) -> bool {
    matches!(index, MSR_TSC | MSR_TSC_DEADLINE)
}

impl Device for ModelRegisters {
    type State = ModelRegistersState;

    fn save(&mut self) -> Result<ModelRegistersState, DeviceError> {
        let entries = read_msrs(&*self.vcpu.fd()?, &self.indices)?;
        let vcpu = self.vcpu.index();
        let values: Vec<u64> = entries
            .iter()
            .map(|entry| match entry.index {
                MSR_TSC => self.clocks.tsc(vcpu),
                MSR_TSC_DEADLINE => self.clocks.tsc_deadline(vcpu),
                _ => entry.data,
            })
            .collect();
        Ok(ModelRegistersState {
            count: u32::try_from(values.len()).unwrap_or(u32::MAX),
            indices: self.indices.clone(),
            values,
            tsc: match self.clocks.tsc_khz(vcpu)? {
                Some(khz) if self.tells_frequency => Some(TscFrequencyState { khz }),
                _ => None,
            },
        })
    }

    fn check(&self, state: &ModelRegistersState) -> Result<(), DeviceError> {
        for index in &state.indices {
            if self.indices.binary_search(index).is_err() {
                return Err(KvmDeviceError::MsrUnknown { index: *index }.into());
            }
        }
        if let Some(tsc) = &state.tsc {
            self.clocks.check_tsc_khz(tsc.khz)?;
        }
        // A register left out would keep its value at power-on.
        for index in &self.indices {
            if !state.indices.contains(index) {
                return Err(KvmDeviceError::MsrMissing { index: *index }.into());
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(self.write(&self.power_on)?)
    }

    fn install(&mut self, state: ModelRegistersState) -> Result<(), DeviceError> {
        if let Some(tsc) = &state.tsc {
            self.clocks.set_tsc_khz(self.vcpu.index(), tsc.khz)?;
        }
        let entries: Vec<_> = state
            .indices
            .iter()
            .zip(&state.values)
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..kvm_msr_entry::default()
            })
            .collect();
        Ok(self.write(&entries)?)
    }
}

/// The values of registers.
pub fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmDeviceError> {
    let entries: Vec<_> = indices
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..kvm_msr_entry::default()
        })
        .collect();
    let Ok(mut msrs) = Msrs::from_entries(&entries) else {
        return Err(too_many(indices.len()));
    };
    let read = fd.get_msrs(&mut msrs).map_err(kvm("KVM_GET_MSRS"))?;
    match indices.get(read) {
        Some(index) => Err(KvmDeviceError::MsrUnknown { index: *index }),
        None => Ok(msrs.as_slice().to_vec()),
    }
}

/// Gives registers their values.
pub fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmDeviceError> {
    if entries.is_empty() {
        return Ok(());
    }
    let Ok(msrs) = Msrs::from_entries(entries) else {
        return Err(too_many(entries.len()));
    };
    let written = fd.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
    match entries.get(written) {
        Some(entry) => Err(KvmDeviceError::MsrRefused {
            index: entry.index,
            value: entry.data,
        }),
        None => Ok(()),
    }
}

fn too_many(count: usize) -> KvmDeviceError {
    KvmDeviceError::Value {
        field: "number of model-specific registers",
        value: count as u64,
        expected: "what one ioctl takes",
    }
}
