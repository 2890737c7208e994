//! The time of a stopped VM.
//!
//! TSCs, APIC timers, the PIT and kvmclock go on in the kernel when no vCPU runs. A guest would
//! see every stop as a jump, two saves of one stop would differ, and a timer could fire in
//! between. So when the VM stops, what a clock changes is read once and kept here, and timers that
//! could fire are disarmed; when it resumes, all go on from the values kept here. Devices save and
//! install those values and not KVM's.
//!
//! KVM does not say whether the interrupt of a timer that has expired was delivered. A one-shot or
//! deadline timer that has expired therefore fires (again) at once when the VM resumes: an
//! interrupt too many does no harm, one that is lost stops a guest for ever.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::VmFd;

use crate::devices::{
    KvmDeviceError, MSR_TSC, MSR_TSC_DEADLINE, Pit, kvm, read_msrs, timer_of, with_timer,
    write_msrs,
};
use crate::vcpu::{TscOffset, Vcpu};

/// The counts of an APIC's timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LapicTimer {
    /// What it counts down from; 0 when it does not run.
    pub initial: u32,
    /// Where it is.
    pub current: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct VcpuClocks {
    tsc: u64,
    // 0: not armed.
    tsc_deadline: u64,
    lapic_timer: LapicTimer,
}

#[derive(Clone, Debug)]
struct Values {
    kvmclock: u64,
    vcpus: Vec<VcpuClocks>,
}

/// Which clocks a VM has, of those that not every KVM gives it.
#[derive(Clone, Copy, Debug)]
pub struct ClockSources {
    pub irqchip: bool,
    pub pit: bool,
    pub kvmclock: bool,
    pub tsc_deadline: bool,
}

/// The clocks of one VM; their values count while it is stopped.
#[derive(Debug)]
pub struct Clocks {
    vm: Arc<VmFd>,
    vcpus: Vec<Arc<Vcpu>>,
    sources: ClockSources,
    tsc_offset: Option<TscOffset>,
    values: Mutex<Values>,
}

impl Clocks {
    /// The clocks of a VM that has never run.
    pub fn new(vm: Arc<VmFd>, vcpus: Vec<Arc<Vcpu>>, sources: ClockSources) -> Self {
        let values = Values {
            kvmclock: 0,
            vcpus: vec![VcpuClocks::default(); vcpus.len()],
        };
        let tsc_offset = vcpus
            .first()
            .and_then(|vcpu| vcpu.fd().ok())
            .and_then(|fd| TscOffset::probe(&fd));
        if tsc_offset.is_none() {
            tracing::info!(
                "this kvm cannot set a tsc's offset: tscs continue to within a second only"
            );
        }
        Self {
            vm,
            vcpus,
            sources,
            tsc_offset,
            values: Mutex::new(values),
        }
    }

    fn values(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_vcpu<T: Default>(&self, vcpu: u8, f: impl FnOnce(&mut VcpuClocks) -> T) -> T {
        self.values()
            .vcpus
            .get_mut(usize::from(vcpu))
            .map_or_else(T::default, f)
    }

    pub fn kvmclock(&self) -> u64 {
        self.values().kvmclock
    }

    pub fn set_kvmclock(&self, nanoseconds: u64) {
        self.values().kvmclock = nanoseconds;
    }

    pub fn tsc(&self, vcpu: u8) -> u64 {
        self.with_vcpu(vcpu, |clocks| clocks.tsc)
    }

    pub fn set_tsc(&self, vcpu: u8, value: u64) {
        self.with_vcpu(vcpu, |clocks| clocks.tsc = value);
    }

    pub fn tsc_deadline(&self, vcpu: u8) -> u64 {
        self.with_vcpu(vcpu, |clocks| clocks.tsc_deadline)
    }

    pub fn set_tsc_deadline(&self, vcpu: u8, value: u64) {
        self.with_vcpu(vcpu, |clocks| clocks.tsc_deadline = value);
    }

    pub fn lapic_timer(&self, vcpu: u8) -> LapicTimer {
        self.with_vcpu(vcpu, |clocks| clocks.lapic_timer)
    }

    pub fn set_lapic_timer(&self, vcpu: u8, timer: LapicTimer) {
        self.with_vcpu(vcpu, |clocks| clocks.lapic_timer = timer);
    }

    /// Reads the clocks and stops the timers. No vCPU runs.
    pub fn freeze(&self) -> Result<(), KvmDeviceError> {
        let mut values = self.values();
        // The PIT first: it could still raise an interrupt.
        if self.sources.pit {
            Pit::stop_ticks(&self.vm)?;
        }
        if self.sources.kvmclock {
            values.kvmclock = self.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock;
        }
        let registers: &[u32] = if self.sources.tsc_deadline {
            &[MSR_TSC, MSR_TSC_DEADLINE]
        } else {
            &[MSR_TSC]
        };
        // Value and offset of the first vCPU's TSC: the others are told from it, so that all
        // values are of one moment.
        let mut first = None;
        for (vcpu, clocks) in self.vcpus.iter().zip(&mut values.vcpus) {
            let fd = vcpu.fd()?;
            for entry in read_msrs(&fd, registers)? {
                match entry.index {
                    MSR_TSC => clocks.tsc = entry.data,
                    _ => clocks.tsc_deadline = entry.data,
                }
            }
            if let Some(tsc_offset) = self.tsc_offset {
                let offset = tsc_offset.get(&fd)?;
                let (tsc, first) = *first.get_or_insert((clocks.tsc, offset));
                clocks.tsc = offset.wrapping_sub(first).wrapping_add(tsc);
            }
            if clocks.tsc_deadline != 0 {
                write_msrs(&fd, &[entry(MSR_TSC_DEADLINE, 0)])?;
            }
            if self.sources.irqchip {
                let regs = fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
                clocks.lapic_timer = timer_of(&regs);
                if clocks.lapic_timer != LapicTimer::default() {
                    fd.set_lapic(&with_timer(regs, LapicTimer::default()))
                        .map_err(kvm("KVM_SET_LAPIC"))?;
                }
            }
        }
        Ok(())
    }

    /// Lets all clocks continue from their values. No vCPU runs yet.
    pub fn thaw(&self) -> Result<(), KvmDeviceError> {
        let values = self.values();
        // The offset with which a TSC would be zero now. Taken once, so that the TSCs of all vCPUs
        // stay as far apart as they were.
        let mut zero = None;
        for (vcpu, clocks) in self.vcpus.iter().zip(&values.vcpus) {
            let fd = vcpu.fd()?;
            match self.tsc_offset {
                Some(tsc_offset) => {
                    let zero = match zero {
                        Some(zero) => zero,
                        None => {
                            *zero.insert(tsc_offset.get(&fd)?.wrapping_sub(read_msr(&fd, MSR_TSC)?))
                        }
                    };
                    tsc_offset.set(&fd, zero.wrapping_add(clocks.tsc))?;
                }
                None => write_msrs(&fd, &[entry(MSR_TSC, clocks.tsc)])?,
            }
            if clocks.lapic_timer != LapicTimer::default() {
                let regs = fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
                fd.set_lapic(&with_timer(regs, clocks.lapic_timer))
                    .map_err(kvm("KVM_SET_LAPIC"))?;
            }
            if clocks.tsc_deadline != 0 {
                write_msrs(&fd, &[entry(MSR_TSC_DEADLINE, clocks.tsc_deadline)])?;
            }
        }
        if self.sources.kvmclock {
            self.vm
                .set_clock(&kvm_clock_data {
                    clock: values.kvmclock,
                    ..kvm_clock_data::default()
                })
                .map_err(kvm("KVM_SET_CLOCK"))?;
        }
        if self.sources.pit {
            Pit::start_ticks(&self.vm)?;
        }
        Ok(())
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

fn read_msr(fd: &kvm_ioctls::VcpuFd, index: u32) -> Result<u64, KvmDeviceError> {
    read_msrs(fd, &[index])?
        .first()
        .map(|entry| entry.data)
        .ok_or(KvmDeviceError::MsrUnknown { index })
}
