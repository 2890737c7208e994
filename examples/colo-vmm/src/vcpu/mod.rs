//! vCPUs: one thread each, which is in the guest or waits for the next round.

mod boot;
mod cpuid;
mod failure;
mod kick;
mod run;
mod tsc_offset;

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread::{self, JoinHandle};

use kvm_ioctls::VcpuFd;

pub use boot::BootState;
pub(crate) use boot::enter;
pub(crate) use cpuid::{check_masks, cpuid_of, dynamic};
pub use failure::UnemulatedInstruction;
pub(crate) use failure::is_pvm;
pub(crate) use tsc_offset::TscOffset;

use crate::devices::{KvmDeviceError, PortBus};
use crate::machine::{MachineError, MemorySlots, Order, RunControl};
use kick::ImmediateExit;

/// A vCPU and the RAM it may touch.
///
/// Its thread holds the lock while it is in the guest; whoever saves or loads its registers
/// holds it otherwise.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    fd: Mutex<VcpuFd>,
    // KVM keeps a VM alive for as long as one of its vCPUs is; so RAM has to be.
    slots: Arc<MemorySlots>,
}

impl Vcpu {
    pub(crate) const fn new(index: u8, fd: VcpuFd, slots: Arc<MemorySlots>) -> Self {
        Self {
            index,
            fd: Mutex::new(fd),
            slots,
        }
    }

    /// The vCPU's number, which is also its APIC id.
    #[must_use]
    pub const fn index(&self) -> u8 {
        self.index
    }

    /// The vCPU's file, for ioctls on its state.
    ///
    /// # Errors
    /// It is in the guest.
    pub fn fd(&self) -> Result<MutexGuard<'_, VcpuFd>, KvmDeviceError> {
        match self.fd.try_lock() {
            Ok(fd) => Ok(fd),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(KvmDeviceError::Running { vcpu: self.index }),
        }
    }
}

/// The thread of a vCPU.
#[derive(Debug)]
pub struct VcpuThread {
    immediate_exit: Arc<ImmediateExit>,
    thread: JoinHandle<()>,
}

impl VcpuThread {
    /// Starts the thread, which waits for the first round.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn spawn(
        vcpu: Arc<Vcpu>,
        bus: Arc<PortBus>,
        control: Arc<RunControl>,
    ) -> Result<Self, MachineError> {
        kick::install_handler()?;
        let immediate_exit = Arc::new(ImmediateExit::new(Arc::clone(&vcpu))?);
        let exit_flag = Arc::clone(&immediate_exit);
        let thread = thread::Builder::new()
            .name(format!("vcpu{}", vcpu.index))
            .spawn(move || {
                let mut last = 0;
                while control.next_round(&mut last, || exit_flag.clear()) == Order::Run {
                    let exit = if control.pausing() {
                        None
                    } else {
                        run::until_paused(&vcpu, &bus, &control, &exit_flag)
                    };
                    control.paused(exit);
                }
            })
            .map_err(MachineError::host("start a vcpu's thread"))?;
        Ok(Self {
            immediate_exit,
            thread,
        })
    }

    /// Makes the thread leave the guest, or not enter it.
    pub(crate) fn kick(&self) {
        self.immediate_exit.set();
        if let Err(error) = kick::signal(&self.thread) {
            tracing::error!(%error, "a vcpu's thread cannot be signalled");
        }
    }

    /// Waits for the end of the thread.
    pub(crate) fn join(self) {
        if self.thread.join().is_err() {
            tracing::error!("a vcpu's thread has panicked");
        }
    }
}
