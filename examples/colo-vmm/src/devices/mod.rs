//! The devices, one file each: what it does, its state on the wire, and how that is checked,
//! reset and installed.
//!
//! | device | section | where it lives |
//! |---|---|---|
//! | [`VcpuRegisters`] | `vcpu` | KVM |
//! | [`Xsave`] | `vcpu-xsave` | KVM |
//! | [`Lapic`] | `lapic` | KVM |
//! | [`ModelRegisters`] | `vcpu-msrs` | KVM |
//! | [`Pic`], [`IoApic`] | `i8259`, `ioapic` | KVM |
//! | [`Pit`] | `i8254` | KVM |
//! | [`KvmClock`] | `kvmclock` | KVM |
//! | [`SerialPort`] | `serial` | here |
//! | [`CpuModel`] | `cpu-model`, before RAM | KVM; it is compared, not loaded |
//! | [`DebugExit`], [`ResetPort`] | none: they have no state | here |
//!
//! State is KVM's, read when it is saved, except for what a clock changes by itself: a stopped
//! VM's clocks are held by [`Clocks`](crate::machine) and do not change until it resumes.
//!
//! A reset puts back what KVM said of the device when it was new. No file of another device is
//! touched to add one: write the file, and register it in [`KvmMachine::new`].
//!
//! [`KvmMachine::new`]: crate::machine::KvmMachine::new

mod bus;
mod cpu_model;
mod debug_exit;
mod ioapic;
mod kvmclock;
mod lapic;
mod msrs;
mod pic;
mod pit;
mod registers;
mod reset_port;
mod serial;
mod xsave;

pub use bus::{PortBus, PortDevice};
pub use cpu_model::{CpuDifference, CpuModel, CpuModelState, CpuidLeafState, UnlikeCpus};
pub use debug_exit::DEBUG_EXIT_PORT;
pub use debug_exit::DebugExit;
pub use ioapic::{IoApic, IoApicState};
pub use kvmclock::{KvmClock, KvmClockReadAt, KvmClockState};
pub use lapic::{Lapic, LapicState};
pub use msrs::{ModelRegisters, ModelRegistersState, TscFrequencyState};
pub use pic::{Pic, PicRole, PicState};
pub use pit::{Pit, PitChannelState, PitState};
pub use registers::{SegmentState, TableState, VcpuRegisters, VcpuState};
pub use reset_port::{RESET_PORT, ResetPort};
pub use serial::{COM1_PORTS, SerialPort, SerialState};
pub use xsave::{Xsave, XsaveState};

pub(crate) use lapic::{timer_of, with_timer};
pub(crate) use msrs::{MSR_TSC, MSR_TSC_DEADLINE, read_msrs, write_msrs};

/// Why a device could not be saved, checked or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmDeviceError {
    /// A KVM call failed.
    #[error("kvm: {what}")]
    Kvm {
        /// What was attempted.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The vCPU is in the guest.
    #[error("vcpu {vcpu} runs: its registers cannot be accessed")]
    Running {
        /// The vCPU.
        vcpu: u8,
    },
    /// KVM took only some of a list of model-specific registers.
    #[error("kvm refuses model-specific register {index:#x} = {value:#x}")]
    MsrRefused {
        /// The register.
        index: u32,
        /// The value it was to get.
        value: u64,
    },
    /// A register that this host's KVM does not have.
    #[error("model-specific register {index:#x} does not exist on this host")]
    MsrUnknown {
        /// The register.
        index: u32,
    },
    /// A register that the other host did not send.
    #[error("model-specific register {index:#x} is not in the state received")]
    MsrMissing {
        /// The register.
        index: u32,
    },
    /// A field holds what the device cannot be in.
    #[error("{field} is {value:#x}, expected {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold.
        expected: &'static str,
    },
    /// The guest's TSC does not run as fast as this host's, and cannot be made to.
    #[error(
        "the guest's tsc runs at {guest} kHz and this host's at {host} kHz, and this host's kvm cannot \
         scale it"
    )]
    TscFrequency {
        /// The guest's, kHz.
        guest: u32,
        /// This host's, kHz.
        host: u32,
    },
    /// KVM does not scale the TSC that far.
    #[error(
        "the guest's tsc runs at {guest} kHz, to which kvm does not scale this host's of {host} kHz"
    )]
    TscScaling {
        /// The guest's, kHz.
        guest: u32,
        /// This host's, kHz.
        host: u32,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The serial port's interrupt could not be raised.
    #[error("the serial port's interrupt cannot be raised")]
    Interrupt(#[source] std::io::Error),
}

pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmDeviceError {
    move |source| KvmDeviceError::Kvm { what, source }
}
