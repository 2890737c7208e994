//! The time of a stopped VM.
//!
//! TSCs, APIC timers, the PIT and kvmclock go on in the kernel when no vCPU runs. Two saves of one stop
//! would differ, and a timer could fire in between. So when the VM stops, what a clock changes is read
//! once and kept here, and timers that could fire are disarmed. Devices save and install those values
//! and not KVM's. Timers go on from them when the VM resumes.
//!
//! What kvmclock and the TSCs do then is a [`ClockPolicy`]: each [stands](Pause::Stands), and goes on
//! from the value kept here as well, or [follows](Pause::Follows), and has gone on meanwhile. A clock
//! that follows in a VM that was only stopped is left alone. In a VM that was loaded it is put forward
//! by the time between the source's stop and now, which the hosts' real-time clocks tell.
//!
//! KVM does not say whether the interrupt of a timer that has expired was delivered. A one-shot or
//! deadline timer that has expired therefore fires (again) at once when the VM resumes: an
//! interrupt too many does no harm, one that is lost stops a guest for ever.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data, kvm_msr_entry};
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

/// Real time at which clocks were read, ns since 1970.
type RealTime = u64;

#[derive(Clone, Debug)]
struct Values {
    kvmclock: u64,
    vcpus: Vec<VcpuClocks>,
    /// When `kvmclock` and the TSCs were read, if one of them follows, here or where they come from.
    read_at: Option<RealTime>,
    /// They are not what was read at the last stop: a device was reset, or given a state.
    replaced: bool,
    stopped: Instant,
    /// What the TSCs were set to run at, kHz.
    tsc_khz: Option<u32>,
}

/// What a clock does while the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It goes on from where it stood: the guest sees no jump, and is behind by the pause for ever.
    Stands,
    /// It has gone on meanwhile: the guest sees a jump, and stays in time.
    Follows,
}

/// What a guest's clocks do while it stands still. Timers that count down stand in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockPolicy {
    /// The paravirtual clock.
    pub kvmclock: Pause,
    /// The TSC of each vCPU, and with it its deadline timer.
    pub tsc: Pause,
}

impl Default for ClockPolicy {
    /// kvmclock follows, the TSC stands.
    fn default() -> Self {
        Self {
            kvmclock: Pause::Follows,
            tsc: Pause::Stands,
        }
    }
}

impl ClockPolicy {
    const fn needs_real_time(self) -> bool {
        matches!(self.kvmclock, Pause::Follows) || matches!(self.tsc, Pause::Follows)
    }
}

/// A guest that has stood still for longer is told, or its watchdogs would think that a vCPU hangs.
const WATCHDOG: Duration = Duration::from_secs(1);
/// More than that between two hosts' real-time clocks, or between stop and resume, is worth a warning.
const SUSPICIOUS: Duration = Duration::from_secs(60);
/// KVM takes a TSC for the host's own within this many parts per million (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Which clocks a VM has, of those that not every KVM gives it.
#[derive(Clone, Copy, Debug)]
pub struct ClockSources {
    pub irqchip: bool,
    pub pit: bool,
    pub kvmclock: bool,
    /// `KVM_SET_CLOCK` takes real time into account.
    pub kvmclock_realtime: bool,
    pub tsc_deadline: bool,
    /// The TSC can run at another frequency than the host's.
    pub tsc_scaling: bool,
}

/// The clocks of one VM; their values count while it is stopped.
#[derive(Debug)]
pub struct Clocks {
    vm: Arc<VmFd>,
    vcpus: Vec<Arc<Vcpu>>,
    sources: ClockSources,
    policy: ClockPolicy,
    tsc_offset: Option<TscOffset>,
    /// The frequency of the host's TSC, kHz; `None` where KVM does not say.
    host_khz: Option<u32>,
    values: Mutex<Values>,
}

impl Clocks {
    /// The clocks of a VM that has never run.
    pub fn new(
        vm: Arc<VmFd>,
        vcpus: Vec<Arc<Vcpu>>,
        sources: ClockSources,
        policy: ClockPolicy,
    ) -> Self {
        let values = Values {
            kvmclock: 0,
            vcpus: vec![VcpuClocks::default(); vcpus.len()],
            read_at: None,
            replaced: false,
            stopped: Instant::now(),
            tsc_khz: None,
        };
        let first = vcpus.first().and_then(|vcpu| vcpu.fd().ok());
        let tsc_offset = first.as_ref().and_then(|fd| TscOffset::probe(fd));
        let host_khz = first.as_ref().and_then(|fd| fd.get_tsc_khz().ok());
        drop(first);
        if tsc_offset.is_none() {
            tracing::info!(
                "this kvm cannot set a tsc's offset: tscs continue to within a second only, or are \
                 the host's"
            );
        }
        Self {
            vm,
            vcpus,
            sources,
            policy,
            tsc_offset,
            host_khz,
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

    /// Sets it, and when it was read, with the TSCs; `None` for a time that does not count.
    pub fn set_kvmclock(&self, nanoseconds: u64, read_at: Option<u64>) {
        let mut values = self.values();
        values.kvmclock = nanoseconds;
        values.read_at = read_at;
        values.replaced = true;
    }

    /// When kvmclock and the TSCs were read, ns since 1970, if that matters to either.
    pub fn read_at(&self) -> Option<u64> {
        self.values().read_at
    }

    pub fn tsc(&self, vcpu: u8) -> u64 {
        self.with_vcpu(vcpu, |clocks| clocks.tsc)
    }

    pub fn set_tsc(&self, vcpu: u8, value: u64) {
        self.with_vcpu(vcpu, |clocks| clocks.tsc = value);
        self.values().replaced = true;
    }

    /// The frequency of a vCPU's TSC, kHz, if KVM says it.
    pub fn tsc_khz(&self, vcpu: u8) -> Result<Option<u32>, KvmDeviceError> {
        if self.host_khz.is_none() {
            return Ok(None);
        }
        let vcpu = self.vcpus.get(usize::from(vcpu));
        let khz = vcpu.map(|vcpu| vcpu.fd()?.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ")));
        khz.transpose()
    }

    /// How fast the guest's TSCs run, kHz, as far as that is known while it runs.
    pub fn tsc_khz_of_guest(&self) -> Option<u32> {
        self.values().tsc_khz.or(self.host_khz)
    }

    /// Whether a guest whose TSC runs at `khz` can run here.
    pub fn check_tsc_khz(&self, khz: u32) -> Result<(), KvmDeviceError> {
        let Some(host) = self.host_khz else {
            return Ok(());
        };
        if khz == 0 {
            return Err(KvmDeviceError::Value {
                field: "tsc frequency",
                value: 0,
                expected: "more than nothing",
            });
        }
        let apart = u64::from(host.abs_diff(khz)) * 1_000_000;
        if self.sources.tsc_scaling || apart <= u64::from(host) * TSC_TOLERANCE_PPM {
            Ok(())
        } else {
            Err(KvmDeviceError::TscFrequency { guest: khz, host })
        }
    }

    /// Has a vCPU's TSC run at `khz`, which was [checked](Clocks::check_tsc_khz).
    pub fn set_tsc_khz(&self, vcpu: u8, khz: u32) -> Result<(), KvmDeviceError> {
        let now = self.tsc_khz(vcpu)?;
        if let Some(vcpu) = self.vcpus.get(usize::from(vcpu))
            && now.is_some_and(|now| now != khz)
        {
            vcpu.fd()?
                .set_tsc_khz(khz)
                .map_err(|source| KvmDeviceError::TscScaling {
                    guest: khz,
                    host: self.host_khz.unwrap_or_default(),
                    source,
                })?;
        }
        self.values().tsc_khz = Some(khz);
        Ok(())
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
        values.replaced = false;
        values.stopped = Instant::now();
        values.read_at = self.policy.needs_real_time().then(now);
        if self.sources.kvmclock {
            let clock = self.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
            values.kvmclock = clock.clock;
            if values.read_at.is_some() && clock.flags & KVM_CLOCK_REALTIME != 0 {
                // Of the very same moment.
                values.read_at = Some(clock.realtime);
            }
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

    /// Lets all clocks go on. No vCPU runs yet.
    pub fn thaw(&self) -> Result<(), KvmDeviceError> {
        let values = self.values();
        // By what the clocks that follow were to go on, if that is known.
        let passed = match values.read_at {
            _ if !values.replaced => Some(values.stopped.elapsed()),
            Some(read_at) => Some(since(read_at)),
            None => None,
        };
        let follows = |pause| matches!(pause, Pause::Follows) && passed.is_some();
        let goes_on = |pause| follows(pause) && !values.replaced;
        if !goes_on(self.policy.tsc) {
            let passed = passed.filter(|_| follows(self.policy.tsc));
            self.set_tscs(&values, passed.unwrap_or_default())?;
        }
        for (vcpu, clocks) in self.vcpus.iter().zip(&values.vcpus) {
            let fd = vcpu.fd()?;
            if clocks.lapic_timer != LapicTimer::default() {
                let regs = fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
                fd.set_lapic(&with_timer(regs, clocks.lapic_timer))
                    .map_err(kvm("KVM_SET_LAPIC"))?;
            }
            if clocks.tsc_deadline != 0 {
                write_msrs(&fd, &[entry(MSR_TSC_DEADLINE, clocks.tsc_deadline)])?;
            }
        }
        if self.sources.kvmclock && !goes_on(self.policy.kvmclock) {
            let read_at = (values.read_at).filter(|_| follows(self.policy.kvmclock));
            self.set_clock(values.kvmclock, read_at)?;
        }
        if follows(self.policy.kvmclock) && passed.is_some_and(|passed| passed >= WATCHDOG) {
            for vcpu in &self.vcpus {
                // A guest that does not use the clock cannot be told.
                let _ = vcpu.fd()?.kvmclock_ctrl();
            }
        }
        if self.sources.pit {
            Pit::start_ticks(&self.vm)?;
        }
        Ok(())
    }

    /// Sets the TSCs to their values, put forward by `passed`.
    fn set_tscs(&self, values: &Values, passed: Duration) -> Result<(), KvmDeviceError> {
        // The offset with which a TSC would be zero now. Taken once, so that the TSCs of all vCPUs
        // stay as far apart as they were.
        let mut zero = None;
        for (vcpu, clocks) in self.vcpus.iter().zip(&values.vcpus) {
            let khz = self.tsc_khz(vcpu.index())?.unwrap_or_default();
            let tsc = clocks.tsc.wrapping_add(ticks(passed, khz));
            let fd = vcpu.fd()?;
            match self.tsc_offset {
                Some(tsc_offset) => {
                    let zero = match zero {
                        Some(zero) => zero,
                        None => {
                            *zero.insert(tsc_offset.get(&fd)?.wrapping_sub(read_msr(&fd, MSR_TSC)?))
                        }
                    };
                    tsc_offset.set(&fd, zero.wrapping_add(tsc))?;
                }
                None => write_msrs(&fd, &[entry(MSR_TSC, tsc)])?,
            }
        }
        Ok(())
    }

    /// Sets kvmclock to what it was at `read_at`, or else to what it is to be now.
    fn set_clock(&self, clock: u64, read_at: Option<RealTime>) -> Result<(), KvmDeviceError> {
        let data = match read_at {
            None => kvm_clock_data {
                clock,
                ..kvm_clock_data::default()
            },
            Some(realtime) if self.sources.kvmclock_realtime => kvm_clock_data {
                clock,
                realtime,
                flags: KVM_CLOCK_REALTIME,
                ..kvm_clock_data::default()
            },
            Some(read_at) => kvm_clock_data {
                clock: clock.wrapping_add(nanoseconds(since(read_at))),
                ..kvm_clock_data::default()
            },
        };
        self.vm.set_clock(&data).map_err(kvm("KVM_SET_CLOCK"))
    }
}

/// Real time, as KVM has it.
fn now() -> RealTime {
    nanoseconds(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
    )
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// How long ago `read_at` was, here or on another host. Never less than nothing.
fn since(read_at: RealTime) -> Duration {
    let now = now();
    let (passed, ahead) = (now.saturating_sub(read_at), read_at.saturating_sub(now));
    if Duration::from_nanos(passed.max(ahead)) > SUSPICIOUS {
        tracing::warn!(
            ns_ago = passed,
            ns_ahead = ahead,
            "the guest's clocks were read long ago, or this host's real time and the source's differ"
        );
    }
    Duration::from_nanos(passed)
}

/// How far a TSC of this frequency gets in that time.
fn ticks(time: Duration, khz: u32) -> u64 {
    let ticks = time.as_nanos() * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_gets_as_far_as_its_frequency_says() {
        assert_eq!(ticks(Duration::from_millis(3), 2_100_000), 6_300_000);
        assert_eq!(ticks(Duration::from_secs(1), 0), 0);
        assert_eq!(ticks(Duration::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn a_time_to_come_is_no_time_ago() {
        assert_eq!(since(u64::MAX), Duration::ZERO);
        assert!(since(now() - 5_000_000_000) >= Duration::from_secs(5));
    }
}
