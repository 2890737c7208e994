//! What a process has used of the machine: CPU time and memory.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// CPU time of a process so far, user and system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// All of it, threads that have ended included.
    pub total: Duration,
    /// What of it was spent by threads that run a vCPU.
    pub vcpus: Duration,
}

impl CpuTime {
    /// That of a process; `is_vcpu` knows the threads that run a vCPU by name.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(process: u32, is_vcpu: impl Fn(&str) -> bool) -> io::Result<Self> {
        let mut vcpus = Duration::ZERO;
        for thread in fs::read_dir(format!("/proc/{process}/task"))? {
            vcpus += match vcpu_time(&thread?.path(), &is_vcpu) {
                // It has ended meanwhile.
                Err(e) if is_gone(&e) => Duration::ZERO,
                time => time?,
            };
        }
        let process = i32::try_from(process).map_err(io::Error::other)?;
        // Finer than the hundredths of a second in /proc/PID/stat.
        let total = clock_gettime(clock_getcpuclockid(Pid::from_raw(process))?)?;
        let total = Duration::from(total);
        Ok(Self { total, vcpus })
    }

    /// What was spent since `earlier`.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            total: self.total.saturating_sub(earlier.total),
            vcpus: self.vcpus.saturating_sub(earlier.vcpus),
        }
    }
}

/// What a thread has spent, if it runs a vCPU.
fn vcpu_time(thread: &Path, is_vcpu: impl Fn(&str) -> bool) -> io::Result<Duration> {
    let name = fs::read_to_string(thread.join("comm"))?;
    if !is_vcpu(name.trim_end()) {
        return Ok(Duration::ZERO);
    }
    // Nanoseconds on a CPU, waiting for one, and how often.
    let spent = fs::read_to_string(thread.join("schedstat"))?;
    number(spent.split_whitespace().next()).map(Duration::from_nanos)
}

/// Before its file was opened, or before it was read.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// What everything on the machine has used of its CPUs since it was started.
///
/// # Errors
/// There is no `/proc/stat`.
pub fn whole_machine() -> io::Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    // cpu user nice system idle iowait irq softirq steal, hundredths of a second
    let numbers = text.lines().next().unwrap_or_default();
    let mut numbers = numbers.split_whitespace().skip(1);
    let mut ticks = 0;
    for is_busy in [true, true, true, false, false, true, true, true] {
        let number = number(numbers.next())?;
        ticks += if is_busy { number } else { 0 };
    }
    Ok(Duration::from_millis(ticks * 10))
}

/// Memory of a process that is resident, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// The most there ever was (`VmHWM`).
    pub peak: u64,
    /// Now, with its share of what others map as well (`Pss`).
    pub proportional: u64,
}

impl Resident {
    /// That of a process.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(process: u32) -> io::Result<Self> {
        let kib = |file: &str, key: &str| {
            let text = fs::read_to_string(format!("/proc/{process}/{file}"))?;
            let value = text.lines().find_map(|line| line.strip_prefix(key));
            number(value.and_then(|value| value.split_whitespace().next()))
        };
        Ok(Self {
            peak: kib("status", "VmHWM:")? << 10,
            proportional: kib("smaps_rollup", "Pss:")? << 10,
        })
    }
}

fn number(text: Option<&str>) -> io::Result<u64> {
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "expected a number in /proc"))
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::process;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Instant;

    use super::*;

    fn mine(is_vcpu: impl Fn(&str) -> bool) -> CpuTime {
        CpuTime::of(process::id(), is_vcpu).unwrap()
    }

    #[test]
    fn time_of_a_vcpu_is_told_apart_by_its_threads_name() {
        let (measured, may_end) = mpsc::channel();
        let (worked, has_worked) = mpsc::channel();
        let before = mine(|name| name == "vcpu7");
        let vcpu = thread::Builder::new().name("vcpu7".to_owned());
        let vcpu = vcpu.spawn(move || {
            let own = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
            while Duration::from(own.now().unwrap()) < Duration::from_millis(50) {
                black_box(Instant::now());
            }
            worked.send(()).unwrap();
            may_end.recv()
        });
        has_worked.recv().unwrap();
        let spent = mine(|name| name == "vcpu7").since(before);
        measured.send(()).unwrap();
        assert_eq!(vcpu.unwrap().join().unwrap(), Ok(()));
        assert!(spent.vcpus >= Duration::from_millis(40), "{spent:?}");
        assert!(spent.total >= spent.vcpus, "{spent:?}");
        // It is gone, and what it has used is not.
        let after = mine(|name| name == "vcpu7");
        assert_eq!(after.vcpus, Duration::ZERO);
        assert!(after.total >= before.total + spent.total);
    }

    #[test]
    fn a_machine_has_used_no_less_than_a_process() {
        let process = mine(|_| false).total;
        // A tick is 10 ms.
        assert!(whole_machine().unwrap() + Duration::from_millis(10) >= process);
    }

    #[test]
    fn memory_that_was_given_back_is_in_the_peak() {
        let size = 64 << 20;
        drop(black_box(vec![1u8; size]));
        let resident = Resident::of(process::id()).unwrap();
        assert!(resident.peak >= size as u64, "{resident:?}");
        assert!(resident.proportional > 0);
        assert!(Resident::of(u32::MAX).is_err());
    }
}
