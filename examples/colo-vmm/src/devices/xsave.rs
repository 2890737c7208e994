//! A vCPU's floating-point and vector registers, as the image that XSAVE makes of them.

use std::sync::Arc;

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};
use crate::vcpu::Vcpu;

const WORDS: usize = 1024;

/// Words 116 to 127 of the image are for software. Linux tells its own features there: they are
/// the host's, not the guest's.
const SOFTWARE: std::ops::Range<usize> = 116..128;

/// The XSAVE image: 512 bytes of legacy registers, the header, and the extended areas at the
/// offsets CPUID leaf 0xd gives. Both hosts have to be of one kind.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu-xsave", version = 1)]
pub struct XsaveState {
    /// The image, little-endian 32-bit words of it.
    pub region: [u32; WORDS],
}

/// The vector registers of one vCPU as a device.
#[derive(Debug)]
pub struct Xsave {
    vcpu: Arc<Vcpu>,
    power_on: XsaveState,
}

impl Xsave {
    /// The vector registers of `vcpu`, which is at power-on.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vcpu: Arc<Vcpu>) -> Result<Self, KvmDeviceError> {
        let power_on = read(&*vcpu.fd()?)?;
        Ok(Self { vcpu, power_on })
    }
}

impl Device for Xsave {
    type State = XsaveState;

    fn save(&mut self) -> Result<XsaveState, DeviceError> {
        Ok(read(&*self.vcpu.fd()?)?)
    }

    fn check(&self, _state: &XsaveState) -> Result<(), DeviceError> {
        // The kernel checks the header against what the vCPU has before it takes anything.
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(write(&*self.vcpu.fd()?, &self.power_on)?)
    }

    fn install(&mut self, state: XsaveState) -> Result<(), DeviceError> {
        Ok(write(&*self.vcpu.fd()?, &state)?)
    }
}

fn read(fd: &VcpuFd) -> Result<XsaveState, KvmDeviceError> {
    let mut region = fd.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?.region;
    region[SOFTWARE].fill(0);
    Ok(XsaveState { region })
}

fn write(fd: &VcpuFd, state: &XsaveState) -> Result<(), KvmDeviceError> {
    let xsave = kvm_xsave {
        region: state.region,
        ..kvm_xsave::default()
    };
    // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only for a vCPU with dynamically
    // enabled features (AMX), which take an arch_prctl that this VMM never makes.
    unsafe { fd.set_xsave(&xsave) }.map_err(kvm("KVM_SET_XSAVE"))
}
