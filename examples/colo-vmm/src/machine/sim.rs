//! A machine without KVM: the built-in workload, done by a thread of this process.
//!
//! The thread does to RAM and on the serial line what the boot sector of [`crate::guest`] does on a
//! vCPU. Its registers are a page cursor and a pass counter, its dirty log a bitmap of ours. All
//! that a machine can show from outside is a function of how far it got, so that tests on top
//! of it do not depend on the host.

use std::fmt;
use std::io::Write;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration_stream::precopy::Throttle;
use migration_stream::ram::BlockId;
use migration_stream::{DirtyLog, GuestRam, PAGE_SIZE};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;
use vmstate::{Device, DeviceError, DeviceTree, Priority, VmState};

use super::throttle::CpuThrottle;
use super::{
    GuestExit, GuestImage, Machine, MachineConfig, MachineError, Order, RunControl, RunState,
    SerialSink,
};
use crate::devices::KvmDeviceError;
use crate::dirty_log::{DirtyBitmap, SoftwareDirtyLog};
use crate::guest::{Region, WorkloadConfig};
use crate::loader::{LoadError, fitted};
use crate::memory::Memory;

/// Regions lie below the hole, in the first block.
const BLOCK: BlockId = BlockId::new(0);

/// What the simulated guest has in its registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "sim-cpu", version = 1)]
pub struct SimCpuState {
    /// Whether a guest was loaded.
    pub loaded: bool,
    /// Passes completed.
    pub passes: u32,
    /// The page of the pass it is in.
    pub page: u32,
    /// Whether the pages hold their addresses yet.
    pub initialised: bool,
    /// Characters of the counter that are still to be printed.
    pub unprinted: u8,
    /// First page's address.
    pub start: u32,
    /// Pages of the region.
    pub pages: u32,
    /// Delay after a pass, loops.
    pub pass_delay: u32,
}

/// The counter in hexadecimal and a line feed.
const LINE: u8 = 9;

/// The simulated machine; see [`Machine`].
pub struct SimMachine {
    memory: Arc<Memory>,
    bitmap: Arc<DirtyBitmap>,
    devices: DeviceTree,
    /// Nothing: it has no CPU.
    common: DeviceTree,
    cpu: Arc<Mutex<SimCpu>>,
    control: Arc<RunControl>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for SimMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimMachine")
            .field("state", &self.control.state())
            .field("memory", &self.memory.bytes())
            .finish_non_exhaustive()
    }
}

impl SimMachine {
    /// Builds a machine, loads its guest and leaves it stopped.
    ///
    /// # Errors
    /// It has one vCPU, and runs only [`GuestImage::Workload`].
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        if config.vcpus != 1 {
            return Err(MachineError::Vcpus {
                asked: config.vcpus,
                limit: 1,
            });
        }
        let memory = config.memory;
        let power_on = match &config.guest {
            None => SimCpuState::default(),
            Some(GuestImage::Workload(workload)) => loaded(workload, &memory)?,
            Some(_) => return Err(MachineError::SimGuest),
        };
        let cpu = Arc::new(Mutex::new(SimCpu {
            state: power_on,
            ram: memory.bytes(),
        }));
        let mut devices = DeviceTree::new();
        devices
            .register(SimCpuState::NAME, 0, Priority::Default, Arc::clone(&cpu))
            .map_err(|error| MachineError::Devices(error.into()))?;
        let exit_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(MachineError::host("make an eventfd"))?;
        let control = Arc::new(RunControl::new(1, exit_event));
        let bitmap = Arc::new(DirtyBitmap::new(&memory));
        let guest = SimGuest {
            memory: Arc::clone(&memory),
            bitmap: Arc::clone(&bitmap),
            control: Arc::clone(&control),
            serial: config.serial,
        };
        let its_cpu = Arc::clone(&cpu);
        let thread = thread::Builder::new()
            .name("sim-cpu".to_owned())
            .spawn(move || guest.rounds(&its_cpu))
            .map_err(MachineError::host("start the simulated guest's thread"))?;
        Ok(Self {
            memory,
            bitmap,
            devices,
            common: DeviceTree::new(),
            cpu,
            control,
            thread: Some(thread),
        })
    }
}

fn loaded(workload: &WorkloadConfig, memory: &Memory) -> Result<SimCpuState, MachineError> {
    let workload = fitted(workload, memory);
    if workload.fills_ram {
        return Err(MachineError::SimFill);
    }
    let Region { start, pages } = workload
        .region()
        .map_err(|error| MachineError::Load(LoadError::from(error)))?;
    Ok(SimCpuState {
        loaded: true,
        start,
        pages,
        pass_delay: workload.pass_delay,
        ..SimCpuState::default()
    })
}

/// The device. The thread has it locked while it runs.
#[derive(Debug)]
struct SimCpu {
    state: SimCpuState,
    ram: u64,
}

impl Device for SimCpu {
    type State = SimCpuState;

    fn save(&mut self) -> Result<SimCpuState, DeviceError> {
        Ok(self.state.clone())
    }

    fn check(&self, state: &SimCpuState) -> Result<(), DeviceError> {
        let end = u64::from(state.start) + u64::from(state.pages) * PAGE_SIZE;
        if end > self.ram.min(crate::memory::HOLE_START) {
            return Err(KvmDeviceError::Value {
                field: "end of the region",
                value: end,
                expected: "an address in ram",
            }
            .into());
        }
        for (field, value, limit) in [
            ("page", state.page, state.pages),
            ("unprinted", state.unprinted.into(), LINE.into()),
        ] {
            if value > limit {
                return Err(KvmDeviceError::Value {
                    field,
                    value: value.into(),
                    expected: "no more than there are",
                }
                .into());
            }
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.state = SimCpuState::default();
        Ok(())
    }

    fn install(&mut self, state: SimCpuState) -> Result<(), DeviceError> {
        self.state = state;
        Ok(())
    }
}

struct SimGuest {
    memory: Arc<Memory>,
    bitmap: Arc<DirtyBitmap>,
    control: Arc<RunControl>,
    serial: SerialSink,
}

impl SimGuest {
    fn rounds(mut self, cpu: &Mutex<SimCpu>) {
        let mut last = 0;
        while self.control.next_round(&mut last, || ()) == Order::Run {
            let exit = {
                let mut cpu = cpu.lock().unwrap_or_else(PoisonError::into_inner);
                self.run(&mut cpu.state)
            };
            self.control.paused(exit);
        }
    }

    /// Runs until it is to pause, or a page is not what it should be.
    fn run(&mut self, cpu: &mut SimCpuState) -> Option<GuestExit> {
        if !cpu.loaded {
            while !self.control.pausing() {
                self.control.sleep(Duration::from_secs(1));
            }
        }
        while !self.control.pausing() {
            self.control.rest();
            if cpu.unprinted > 0 {
                self.print(cpu);
            } else if cpu.page < cpu.pages {
                let offset = u64::from(cpu.start) + u64::from(cpu.page) * PAGE_SIZE;
                if let Err(found) = self.visit(cpu, offset) {
                    let expected = expected(cpu, offset);
                    let line = format!("E{offset:08x} {found:08x} {expected:08x}\n");
                    // As with a real port, nobody may be listening.
                    let _ = self.serial.write_all(line.as_bytes());
                    return Some(GuestExit::DebugExit(1));
                }
                cpu.page += 1;
            } else {
                cpu.page = 0;
                if cpu.initialised {
                    cpu.passes = cpu.passes.wrapping_add(1);
                    cpu.unprinted = LINE;
                } else {
                    cpu.initialised = true;
                }
            }
        }
        None
    }

    /// One page of a pass; an error is what the page held instead of the expected word.
    fn visit(&self, cpu: &SimCpuState, offset: u64) -> Result<(), u32> {
        // A block without the page cannot be: `check` and `region` have seen to it.
        let page = self
            .memory
            .ram()
            .slice(BLOCK, offset, 4)
            .map_err(|_| 0u32)?;
        let value = if cpu.initialised {
            let found = page.load::<u32>(0, Ordering::Relaxed).map_err(|_| 0u32)?;
            if found != expected(cpu, offset) {
                return Err(found);
            }
            found.wrapping_add(1)
        } else {
            expected(cpu, offset)
        };
        page.store(value, 0, Ordering::Relaxed).map_err(|_| 0u32)?;
        self.bitmap.mark(BLOCK, offset);
        Ok(())
    }

    /// One character of the counter; after the last one, the delay.
    fn print(&mut self, cpu: &mut SimCpuState) {
        let line = format!("{:08x}\n", cpu.passes);
        let at = usize::from(LINE.saturating_sub(cpu.unprinted));
        if let Some(character) = line.as_bytes().get(at..=at) {
            let _ = self.serial.write_all(character);
        }
        cpu.unprinted -= 1;
        if cpu.unprinted == 0 && cpu.pass_delay > 0 {
            // A loop of the boot sector's takes about a nanosecond on hardware. What is left of
            // the delay when the machine stops is not part of its state.
            self.control
                .sleep(Duration::from_nanos(cpu.pass_delay.into()));
        }
    }
}

/// The word at `offset` after the passes so far.
fn expected(cpu: &SimCpuState, offset: u64) -> u32 {
    u32::try_from(offset)
        .unwrap_or(u32::MAX)
        .wrapping_add(cpu.passes)
}

impl Machine for SimMachine {
    fn state(&self) -> RunState {
        self.control.state()
    }

    fn resume(&mut self) -> Result<Instant, MachineError> {
        match self.state() {
            RunState::Running => Ok(Instant::now()),
            RunState::Ended => Err(MachineError::Ended),
            RunState::Stopped => self.control.resume(),
        }
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.control.stop(|| self.control.wake())
    }

    fn devices(&mut self) -> Result<&mut DeviceTree, MachineError> {
        if self.control.is_drained() {
            Ok(&mut self.devices)
        } else {
            Err(MachineError::Running)
        }
    }

    fn common(&mut self) -> &mut DeviceTree {
        &mut self.common
    }

    fn compares(&self) -> bool {
        false
    }

    fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn dirty_log(&self) -> Box<dyn DirtyLog> {
        Box::new(SoftwareDirtyLog::new(
            Arc::clone(&self.memory),
            Arc::clone(&self.bitmap),
        ))
    }

    fn throttle(&self) -> Box<dyn Throttle> {
        // Its thread looks for itself.
        Box::new(CpuThrottle::new(Arc::clone(&self.control), || ()))
    }

    fn exit_event(&self) -> &EventFd {
        self.control.exit_event()
    }

    fn take_exit(&mut self) -> Result<Option<GuestExit>, MachineError> {
        if self.state() != RunState::Ended {
            return Ok(None);
        }
        self.stop()?;
        Ok(self.control.take_exit())
    }

    /// The simulated guest does not listen: the bytes are taken and lost.
    /// What the guest has in RAM it writes anew.
    fn reset(&mut self, image: &GuestImage) -> Result<(), MachineError> {
        let GuestImage::Workload(workload) = image else {
            return Err(MachineError::SimGuest);
        };
        self.stop()?;
        self.devices
            .reset_all()
            .map_err(|error| MachineError::Devices(error.into()))?;
        let mut cpu = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        cpu.state = loaded(workload, &self.memory)?;
        Ok(())
    }

    fn serial_input(&self, bytes: &[u8]) -> Result<usize, MachineError> {
        Ok(bytes.len())
    }
}

impl Drop for SimMachine {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "the simulated guest's thread is left behind");
            return;
        }
        self.control.quit();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the simulated guest's thread has panicked");
        }
    }
}
