//! A machine on KVM.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use migration_stream::DirtyLog;
use migration_stream::precopy::Throttle;
use vmm_sys_util::eventfd::EventFd;
use vmstate::{Device, DeviceTree, Priority, VmState};

use super::clocks::ClockSources;
use super::throttle::CpuThrottle;
use super::{
    Clocks, CpuMask, GuestExit, GuestImage, Machine, MachineConfig, MachineError, MemorySlots,
    RunControl, RunState,
};
use crate::devices::{
    COM1_PORTS, CpuModel, CpuModelState, DEBUG_EXIT_PORT, DebugExit, IoApic, KvmClock, Lapic,
    MSR_TSC_DEADLINE, ModelRegisters, Pic, PicRole, Pit, PortBus, RESET_PORT, ResetPort,
    SerialPort, VcpuRegisters, Xsave,
};
use crate::dirty_log::SlotsDirtyLog;
use crate::loader;
use crate::memory::Memory;
use crate::vcpu::{self, Vcpu, VcpuThread};

/// The KVM API, stable since 2007.
const API_VERSION: i32 = 12;
/// Three pages that KVM needs on Intel hosts without unrestricted guests, and one page for its
/// identity map: below the BIOS's place, in the hole of RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A virtual machine on KVM; see [`Machine`] for what can be done with it.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use colo_vmm::guest::WorkloadConfig;
/// use colo_vmm::machine::{CpuOptions, GuestImage, KvmMachine, Machine, MachineConfig};
/// use colo_vmm::memory::Memory;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut machine = KvmMachine::new(MachineConfig {
///     memory: Arc::new(Memory::new(256 << 20)?),
///     vcpus: 1,
///     guest: Some(GuestImage::Workload(WorkloadConfig::default())),
///     serial: Box::new(std::io::stdout()),
///     cpu: CpuOptions::default(),
/// })?;
/// machine.resume()?;
/// std::thread::sleep(std::time::Duration::from_secs(1));
/// machine.stop()?;
/// let sections = machine.devices()?.save_all()?;
/// assert!(!sections.is_empty());
/// # Ok(())
/// # }
/// ```
pub struct KvmMachine {
    memory: Arc<Memory>,
    slots: Arc<MemorySlots>,
    clocks: Arc<Clocks>,
    devices: DeviceTree,
    common: DeviceTree,
    compares: bool,
    serial: SerialPort,
    control: Arc<RunControl>,
    vcpus: Vec<Arc<Vcpu>>,
    threads: Threads,
}

/// The threads of the vCPUs, as long as there are any.
#[derive(Clone, Debug, Default)]
struct Threads(Arc<Mutex<Vec<VcpuThread>>>);

impl Threads {
    fn lock(&self) -> MutexGuard<'_, Vec<VcpuThread>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        self.lock().iter().for_each(VcpuThread::kick);
    }
}

impl fmt::Debug for KvmMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmMachine")
            .field("state", &self.control.state())
            .field("memory", &self.memory.bytes())
            .field("vcpus", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}

/// Why KVM cannot be used on this host, if it cannot.
#[must_use]
pub fn kvm_unavailable() -> Option<MachineError> {
    open_kvm().err()
}

fn open_kvm() -> Result<Kvm, MachineError> {
    let kvm = Kvm::new().map_err(MachineError::NoKvm)?;
    if kvm.get_api_version() != API_VERSION {
        return Err(MachineError::KvmLacks("api version 12"));
    }
    for (cap, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(MachineError::KvmLacks(name));
        }
    }
    Ok(kvm)
}

impl KvmMachine {
    /// Builds a machine, loads its guest and leaves it stopped.
    ///
    /// # Errors
    /// See [`MachineError`].
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        // The VM and its memory.
        let kvm = open_kvm()?;
        let limit = u8::try_from(kvm.get_max_vcpus()).unwrap_or(u8::MAX);
        if !(1..=limit).contains(&config.vcpus) {
            return Err(MachineError::Vcpus {
                asked: config.vcpus,
                limit,
            });
        }
        let vm = Arc::new(kvm.create_vm().map_err(MachineError::kvm("create a vm"))?);
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(MachineError::kvm("set the identity map's address"))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(MachineError::kvm("set the tss's address"))?;
        let memory = config.memory;
        let slots = Arc::new(
            MemorySlots::new(Arc::clone(&vm), Arc::clone(&memory))
                .map_err(MachineError::kvm("give guest memory to the vm"))?,
        );

        // Interrupt controllers and timer, before the vCPUs that get an APIC each.
        let irqchip = create_irqchip(&kvm, &vm)?;
        let pit = irqchip && create_pit(&kvm, &vm)?;
        if !irqchip && config.vcpus > 1 {
            return Err(MachineError::KvmLacks(
                "in-kernel irqchip, without which one vcpu cannot start another",
            ));
        }

        // The vCPUs.
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(MachineError::kvm("get the supported cpuid"))?;
        let vcpus = (0..config.vcpus)
            .map(|index| {
                let fd = vm
                    .create_vcpu(u64::from(index))
                    .map_err(MachineError::kvm("create a vcpu"))?;
                let shown = vcpu::cpuid_of(&cpuid, index, config.vcpus, &config.cpu.masks);
                fd.set_cpuid2(&shown)
                    .map_err(MachineError::kvm("set a vcpu's cpuid"))?;
                vcpu::check_masks(&fd, KVM_MAX_CPUID_ENTRIES, &config.cpu.masks)?;
                Ok(Arc::new(Vcpu::new(index, fd, Arc::clone(&slots))))
            })
            .collect::<Result<Vec<_>, MachineError>>()?;
        let list = kvm
            .get_msr_index_list()
            .map_err(MachineError::kvm("list the model-specific registers"))?;
        let mut msrs = list.as_slice().to_vec();
        msrs.retain(|index| !config.cpu.masks.contains(&CpuMask::Msr(*index)));
        let compare = config.cpu.compare;

        // The devices, each remembering what it is like at power-on.
        let clock_flags = kvm.check_extension_int(Cap::AdjustClock);
        let clocks = Arc::new(Clocks::new(
            Arc::clone(&vm),
            vcpus.clone(),
            ClockSources {
                irqchip,
                pit,
                kvmclock: clock_flags > 0,
                kvmclock_realtime: clock_flags.unsigned_abs() & KVM_CLOCK_REALTIME != 0,
                tsc_scaling: kvm.check_extension(Cap::TscControl),
                tsc_deadline: irqchip && msrs.contains(&MSR_TSC_DEADLINE),
            },
            config.cpu.clocks,
        ));
        let mut devices = DeviceTree::new();
        let mut indices = Vec::new();
        let has_xcrs = kvm.check_extension(Cap::Xcrs);
        for vcpu in &vcpus {
            let id = u32::from(vcpu.index());
            register(
                &mut devices,
                id,
                VcpuRegisters::new(Arc::clone(vcpu), has_xcrs)?,
            )?;
            register(&mut devices, id, Xsave::new(Arc::clone(vcpu))?)?;
            if irqchip {
                let lapic = Lapic::new(Arc::clone(vcpu), Arc::clone(&clocks))?;
                register(&mut devices, id, lapic)?;
            }
            let registers =
                ModelRegisters::new(Arc::clone(vcpu), Arc::clone(&clocks), &msrs, compare)?;
            indices = registers.indices().to_vec();
            register(&mut devices, id, registers)?;
        }
        if irqchip {
            register(&mut devices, 0, Pic::new(Arc::clone(&vm), PicRole::Master)?)?;
            register(&mut devices, 1, Pic::new(Arc::clone(&vm), PicRole::Slave)?)?;
            register(&mut devices, 0, IoApic::new(Arc::clone(&vm))?)?;
        }
        if pit {
            register(&mut devices, 0, Pit::new(Arc::clone(&vm))?)?;
        }
        register(&mut devices, 0, KvmClock::new(Arc::clone(&clocks)))?;
        let serial = SerialPort::new(irqchip.then(|| Arc::clone(&vm)), config.serial);
        register(&mut devices, 0, serial.clone())?;

        // What a source and this machine have to have in common.
        let mut common = DeviceTree::new();
        if let Some(first) = vcpus.first() {
            let cpuid = first
                .fd()?
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(MachineError::kvm("get a vcpu's cpuid"))?;
            let clocks = Arc::clone(&clocks);
            let model = CpuModel::new(clocks, config.vcpus, &cpuid, &indices, &config.cpu);
            common
                .register_early(CpuModelState::NAME, 0, Priority::Default, model)
                .map_err(|error| MachineError::Devices(error.into()))?;
        }

        // What answers at I/O ports.
        let mut bus = PortBus::default();
        bus.insert(COM1_PORTS, Arc::new(Mutex::new(serial.clone())));
        bus.insert(
            DEBUG_EXIT_PORT..DEBUG_EXIT_PORT + 1,
            Arc::new(Mutex::new(DebugExit)),
        );
        bus.insert(RESET_PORT..RESET_PORT + 1, Arc::new(Mutex::new(ResetPort)));
        let bus = Arc::new(bus);

        // The guest. An incoming one brings all of this with it.
        if let Some(image) = &config.guest {
            if matches!(image, GuestImage::Kernel { .. }) && vcpu::is_pvm() {
                tracing::warn!(
                    "this host's kvm is PVM, which emulates all kernel code and knows few \
                     instructions: a stock linux kernel crawls here, and does not get to its end"
                );
            }
            boot(image, &memory, &vcpus)?;
        }
        clocks.freeze()?;

        // The threads, which wait.
        let exit_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(MachineError::host("make an eventfd"))?;
        let control = Arc::new(RunControl::new(vcpus.len(), exit_event));
        let machine = Self {
            memory,
            slots,
            clocks,
            devices,
            common,
            compares: compare,
            serial,
            control,
            vcpus,
            threads: Threads::default(),
        };
        for vcpu in &machine.vcpus {
            let control = Arc::clone(&machine.control);
            let thread = VcpuThread::spawn(Arc::clone(vcpu), Arc::clone(&bus), control)?;
            machine.threads.lock().push(thread);
        }
        Ok(machine)
    }

    fn stop_vcpus(&self) -> Result<(), MachineError> {
        self.control.stop(|| {
            self.threads.kick();
            self.control.wake();
        })
    }
}

/// Puts a guest into RAM, and the first vCPU, which is at power-on, where it begins.
fn boot(image: &GuestImage, memory: &Memory, vcpus: &[Arc<Vcpu>]) -> Result<(), MachineError> {
    let boot = loader::load(image, memory)?;
    if let Some(first) = vcpus.first() {
        vcpu::enter(&*first.fd()?, &boot)
            .map_err(MachineError::kvm("set the first vcpu's registers"))?;
    }
    Ok(())
}

fn register<D>(devices: &mut DeviceTree, instance_id: u32, device: D) -> Result<(), MachineError>
where
    D: Device + 'static,
{
    devices
        .register(D::State::NAME, instance_id, Priority::Default, device)
        .map_err(|error| MachineError::Devices(error.into()))
}

fn create_irqchip(kvm: &Kvm, vm: &VmFd) -> Result<bool, MachineError> {
    if !kvm.check_extension(Cap::Irqchip) {
        tracing::info!("this kvm has no interrupt controllers: the guest runs without");
        return Ok(false);
    }
    vm.create_irq_chip()
        .map_err(MachineError::kvm("create the interrupt controllers"))?;
    Ok(true)
}

fn create_pit(kvm: &Kvm, vm: &VmFd) -> Result<bool, MachineError> {
    if !kvm.check_extension(Cap::Pit2) || !kvm.check_extension(Cap::PitState2) {
        tracing::info!("this kvm has no interval timer: the guest runs without");
        return Ok(false);
    }
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    })
    .map_err(MachineError::kvm("create the interval timer"))?;
    Ok(true)
}

impl Machine for KvmMachine {
    fn state(&self) -> RunState {
        self.control.state()
    }

    fn resume(&mut self) -> Result<Instant, MachineError> {
        match self.state() {
            RunState::Running => Ok(Instant::now()),
            RunState::Ended => Err(MachineError::Ended),
            RunState::Stopped => {
                self.clocks.thaw()?;
                self.control.resume()
            }
        }
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        if self.control.is_drained() {
            return Ok(());
        }
        self.stop_vcpus()?;
        Ok(self.clocks.freeze()?)
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
        self.compares
    }

    fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    fn dirty_log(&self) -> Box<dyn DirtyLog> {
        Box::new(SlotsDirtyLog::new(Arc::clone(&self.slots)))
    }

    fn throttle(&self) -> Box<dyn Throttle> {
        let threads = self.threads.clone();
        let control = Arc::clone(&self.control);
        Box::new(CpuThrottle::new(control, move || threads.kick()))
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

    fn reset(&mut self, image: &GuestImage) -> Result<(), MachineError> {
        self.stop()?;
        self.devices
            .reset_all()
            .map_err(|error| MachineError::Devices(error.into()))?;
        boot(image, &self.memory, &self.vcpus)?;
        // What we write KVM does not log.
        self.slots.note_rewritten();
        Ok(())
    }

    fn serial_input(&self, bytes: &[u8]) -> Result<usize, MachineError> {
        if self.state() == RunState::Running {
            Ok(self.serial.receive(bytes)?)
        } else {
            Ok(0)
        }
    }
}

impl Drop for KvmMachine {
    fn drop(&mut self) {
        if let Err(error) = self.stop_vcpus() {
            // Joining would wait for ever; what the thread uses it keeps alive by itself.
            tracing::error!(%error, "a vcpu's thread is left behind");
            return;
        }
        self.control.quit();
        // Nobody kicks them any more.
        let threads = std::mem::take(&mut *self.threads.lock());
        threads.into_iter().for_each(VcpuThread::join);
    }
}
