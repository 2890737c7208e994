//! The machine: memory, one vCPU, a serial line.

use std::sync::Arc;
use std::time::Instant;

use colo_heartbeat::Heartbeat;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use migration_stream::ram::BlockId;
use migration_stream::{BoxError, GuestRamMmap, KvmDirtyLog, Vm, VmControl};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmstate::{DeviceTree, Priority};

use crate::guest;
use crate::vcpu::{Vcpu, VcpuDevice};

const MEMORY: usize = 16 << 20;

/// Pauses and resumes the machine.
#[derive(Clone, Debug)]
pub struct Control {
    /// The one vCPU.
    pub vcpu: Arc<Vcpu>,
    /// The heartbeat of the pair that a migration makes.
    pub heartbeat: Option<Arc<Heartbeat>>,
}

// ANCHOR: control
impl VmControl for Control {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.vcpu.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        let resumed = Instant::now();
        self.vcpu.resume();
        Ok(resumed)
    }
}
// ANCHOR_END: control

/// A machine whose guest is paused at its entry.
pub struct Machine {
    /// What migrates besides memory.
    pub vm: Vm<Control, DeviceTree>,
    /// Memory as pages.
    pub ram: Arc<GuestRamMmap>,
    log: Option<KvmDirtyLog>,
}

impl Machine {
    /// Builds the machine.
    pub fn new() -> Result<Self, BoxError> {
        let vm = Arc::new(Kvm::new()?.create_vm()?);
        // The VM may reach its memory for as long as the process lives.
        // ANCHOR: memory
        let memory: &'static GuestMemoryMmap<()> = Box::leak(Box::new(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?,
        ));
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        };
        // SAFETY: the region is all of `memory`, which is never unmapped.
        unsafe { vm.set_user_memory_region(region)? };
        // SAFETY: as above; the slot was given to the VM like this.
        let log = unsafe { KvmDirtyLog::new(Arc::clone(&vm), vec![(BlockId::new(0), region)]) };
        // ANCHOR_END: memory
        memory.write_slice(&guest::code()?, GuestAddress(guest::ENTRY.into()))?;

        let vcpu = Vcpu::start(vm.create_vcpu(0)?)?;
        // ANCHOR: machine
        let mut devices = DeviceTree::new();
        devices.register("vcpu", 0, Priority::Default, VcpuDevice(Arc::clone(&vcpu)))?;
        Ok(Self {
            vm: Vm {
                control: Control {
                    vcpu,
                    heartbeat: None,
                },
                devices,
            },
            ram: Arc::new(GuestRamMmap::over(memory, &["ram"])?),
            log: Some(log),
        })
        // ANCHOR_END: machine
    }

    /// Returns the log of what the vCPU writes, once.
    pub fn log(&mut self) -> Result<KvmDirtyLog, BoxError> {
        Ok(self.log.take().ok_or("the dirty log is in use")?)
    }
}
