//! The machine: what runs a guest, can be stopped, saved, loaded and resumed.
//!
//! [`KvmMachine`] runs guests on KVM. [`SimMachine`] runs one fixed guest as a thread of this
//! process: what sits on top of [`Machine`] (migration, COLO, QMP) works the same on a host
//! without KVM, and its tests are deterministic.
//!
//! ```text
//!             resume()                    the guest ends by itself
//!  Stopped ────────────▶ Running ──────────────────────────────▶ Ended
//!     ▲                     │                                      │
//!     └──────── stop() ─────┴───────────── take_exit() ◀───────────┘
//! ```

mod clocks;
mod control;
mod cpu;
mod kvm;
mod sim;
mod slots;
mod throttle;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use migration_stream::DirtyLog;
use migration_stream::precopy::Throttle;
use vmm_sys_util::eventfd::EventFd;
use vmstate::DeviceTree;

pub(crate) use clocks::Clocks;
pub use clocks::{ClockPolicy, LapicTimer, Pause};
pub(crate) use control::{Order, RunControl};
pub use cpu::{CpuMask, CpuOptions, CpuidRegister, Register};
pub use kvm::{KvmMachine, kvm_unavailable};
pub use sim::SimMachine;
pub use slots::MemorySlots;

use crate::devices::KvmDeviceError;
use crate::guest::WorkloadConfig;
use crate::loader::LoadError;
use crate::memory::{Memory, MemorySetupError};
use crate::vcpu::UnemulatedInstruction;

/// Where the guest's serial line goes.
///
/// It is called with single bytes from the thread of the vCPU that wrote them: what blocks here
/// blocks the guest, and a stop of the VM waits for it.
pub type SerialSink = Box<dyn Write + Send>;

/// What to build a machine from.
pub struct MachineConfig {
    /// Guest RAM.
    pub memory: Arc<Memory>,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// What runs; `None` leaves RAM empty and the vCPUs at power-on, for an incoming migration.
    pub guest: Option<GuestImage>,
    /// Output of the first serial port.
    pub serial: SerialSink,
    /// What the vCPUs are to be like. The simulated machine has none.
    pub cpu: CpuOptions,
}

impl fmt::Debug for MachineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineConfig")
            .field("memory", &self.memory)
            .field("vcpus", &self.vcpus)
            .field("guest", &self.guest)
            .field("cpu", &self.cpu)
            .finish_non_exhaustive()
    }
}

/// What a machine runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestImage {
    /// The built-in guest, see [`crate::guest`].
    Workload(WorkloadConfig),
    /// The built-in guest that answers what is typed.
    Answers,
    /// 512 bytes that run at 0x7c00 in real mode, as a BIOS would start them.
    BootSector(PathBuf),
    /// Bytes that run in real mode where they are put.
    Flat {
        /// The file.
        file: PathBuf,
        /// Load address and entry point; below 1 MiB, a multiple of 16.
        address: u64,
    },
    /// A Linux kernel: ELF (vmlinux) or bzImage.
    Kernel {
        /// The kernel.
        file: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The kernel's command line.
        cmdline: String,
    },
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// No vCPU runs; devices can be saved and loaded.
    Stopped,
    /// The guest runs.
    Running,
    /// The guest has ended by itself; [`Machine::take_exit`] says how.
    Ended,
}

/// How a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestExit {
    /// It wrote this value to the debug-exit port.
    DebugExit(u8),
    /// It shut the processor down (a triple fault, which is also how some guests reboot).
    Shutdown,
    /// It reset the machine.
    Reset,
    /// KVM met an instruction that it can neither run nor emulate.
    Unemulated(UnemulatedInstruction),
    /// KVM left the guest for a reason this VMM does not handle.
    Unhandled {
        /// The vCPU.
        vcpu: u8,
        /// KVM's reason.
        reason: String,
    },
}

impl GuestExit {
    /// The exit status of a process whose guest ended this way: as with QEMU's `isa-debug-exit`,
    /// a value `v` on the port gives `(v << 1) | 1`. A shutdown and a reset give 0, a failure 1.
    #[must_use]
    pub const fn status(&self) -> u8 {
        match self {
            Self::DebugExit(value) => (*value << 1) | 1,
            Self::Shutdown | Self::Reset => 0,
            Self::Unemulated(_) | Self::Unhandled { .. } => 1,
        }
    }
}

impl fmt::Display for GuestExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DebugExit(value) => {
                write!(f, "the guest wrote {value:#04x} to the debug-exit port")
            }
            Self::Shutdown => f.write_str("the guest shut down"),
            Self::Reset => f.write_str("the guest reset the machine"),
            Self::Unemulated(what) => what.fmt(f),
            Self::Unhandled { vcpu, reason } => write!(f, "vcpu {vcpu} stopped: {reason}"),
        }
    }
}

/// A virtual machine with one guest in it.
///
/// All methods but [`Machine::serial_input`] belong to whoever controls the VM; the guest's own
/// activity shows on the serial sink and on [`Machine::exit_event`].
pub trait Machine: Send {
    /// What it is doing.
    fn state(&self) -> RunState;

    /// Lets the guest run, its clocks continuing from where they stood. Nothing happens if it
    /// runs already. Returns when it was resumed: the threads of a guest that runs may keep this one
    /// from its processor before it can look at a clock itself.
    ///
    /// # Errors
    /// The guest has ended and nobody took notice ([`Machine::take_exit`]); KVM's.
    fn resume(&mut self) -> Result<Instant, MachineError>;

    /// Stops the guest and its clocks, between two instructions. When this returns no vCPU runs,
    /// RAM does not change, and devices give the same state however often they are saved.
    /// Nothing happens if it is stopped already.
    ///
    /// # Errors
    /// A vCPU does not stop in time; KVM's.
    fn stop(&mut self) -> Result<(), MachineError>;

    /// All devices, in the order in which they are saved and loaded.
    ///
    /// # Errors
    /// The machine runs.
    fn devices(&mut self) -> Result<&mut DeviceTree, MachineError>;

    /// What both sides of a migration have to have in common, as devices whose sections are sent before
    /// RAM, compared there, and never installed. It is the same whether the machine runs or not.
    fn common(&mut self) -> &mut DeviceTree;

    /// Whether anything is compared with what a source says it has in common.
    fn compares(&self) -> bool;

    /// Guest RAM.
    fn memory(&self) -> &Arc<Memory>;

    /// A log of the pages the guest writes. One at a time: they share KVM's log.
    fn dirty_log(&self) -> Box<dyn DirtyLog>;

    /// What slows the guest down while it writes memory faster than it can be sent.
    fn throttle(&self) -> Box<dyn Throttle>;

    /// Becomes readable when the guest ends by itself.
    fn exit_event(&self) -> &EventFd;

    /// How the guest ended, if it did, and stops what still runs of it. The machine is then
    /// stopped, and may be loaded and resumed.
    ///
    /// # Errors
    /// As for [`Machine::stop`].
    fn take_exit(&mut self) -> Result<Option<GuestExit>, MachineError>;

    /// Resets the machine, and loads `image` into it as when it was built. It is stopped then.
    ///
    /// # Errors
    /// The image cannot be loaded, or a device fails: the machine is in no defined state.
    fn reset(&mut self, image: &GuestImage) -> Result<(), MachineError>;

    /// Types `bytes` on the guest's serial line. Returns how many the port had room for: none
    /// while the machine is stopped, whose devices do not change.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    fn serial_input(&self, bytes: &[u8]) -> Result<usize, MachineError>;
}

/// Why a machine could not be built or controlled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// /dev/kvm is missing or closed to us.
    #[error(
        "/dev/kvm cannot be opened: load the kvm_intel or kvm_amd module on a host with \
         virtualization enabled in its firmware, and give this user access to the device (group \
         kvm); `--sim` runs a simulated guest without it"
    )]
    NoKvm(#[source] kvm_ioctls::Error),
    /// KVM is there but lacks something that has no substitute here.
    #[error("this host's kvm has no {0}")]
    KvmLacks(&'static str),
    /// A KVM call failed.
    #[error("kvm: {what}")]
    Kvm {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A number of vCPUs that this machine cannot have.
    #[error("{asked} vcpus: this machine can have 1 to {limit}")]
    Vcpus {
        /// How many were asked for.
        asked: u8,
        /// The most there can be.
        limit: u8,
    },
    /// KVM shows the guest what it was not to see.
    #[error(
        "this host's kvm does not mask cpuid {at}: bits {extra:#x} stay, whatever --cpu-mask says"
    )]
    CpuMask {
        /// The register.
        at: CpuidRegister,
        /// The bits that it has in spite of the mask.
        extra: u32,
    },
    /// The simulated machine runs nothing but the built-in workload.
    #[error("the simulated machine runs only the built-in workload")]
    SimGuest,
    /// The simulated guest touches nothing but its region.
    #[error("the simulated guest does not fill ram")]
    SimFill,
    /// Nobody said what a reset loads.
    #[error("there is no guest that a reset could load")]
    NoImage,
    /// RAM could not be set up.
    #[error(transparent)]
    Memory(#[from] MemorySetupError),
    /// The guest could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] KvmDeviceError),
    /// The devices do not make up a tree.
    #[error("the devices cannot be registered")]
    Devices(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The host gave no thread, signal or event.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Devices were asked for while the guest runs.
    #[error("the devices of a running machine cannot be accessed")]
    Running,
    /// A guest was to run that was stopped for good, because another VM has its place.
    #[error("the guest was stopped for good: the other side goes on, or may")]
    Fenced,
    /// A guest that has ended was to be resumed.
    #[error("the guest has ended")]
    Ended,
    /// A vCPU did not come out of the guest.
    #[error("{running} vcpus did not stop within {seconds} s")]
    StopTimeout {
        /// How many still run.
        running: usize,
        /// How long they had.
        seconds: u64,
    },
}

impl MachineError {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    pub(crate) fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Host {
            what,
            source: source.into(),
        }
    }
}
