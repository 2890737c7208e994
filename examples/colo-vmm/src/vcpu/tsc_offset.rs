//! The offset of a vCPU's TSC from the host's, exactly.
//!
//! Writing the TSC itself will not do: KVM takes a value within a second of the expected one for
//! an attempt to synchronise vCPUs, and keeps the old offset. kvm-ioctls has these ioctls on a
//! vCPU for arm64 only.

use std::os::raw::c_ulong;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::devices::{KvmDeviceError, kvm};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// That this host's KVM has the offset as an attribute of a vCPU (Linux 5.16), and that setting it has
/// an effect. KVM of PVM hosts takes any offset and keeps none: a guest there reads the host's TSC.
#[derive(Clone, Copy, Debug)]
pub struct TscOffset(());

impl TscOffset {
    /// Whether it is there and does something, tried on `fd`, whose offset is the same afterwards.
    pub fn probe(fd: &VcpuFd) -> Option<Self> {
        let offset = Self(());
        let before = offset.get(fd).ok()?;
        let other = before.wrapping_sub(1 << 40);
        offset.set(fd, other).ok()?;
        let has_effect = offset.get(fd).ok()? == other;
        offset.set(fd, before).ok()?;
        has_effect.then_some(offset)
    }

    /// The offset of a vCPU's TSC.
    pub fn get(self, fd: &VcpuFd) -> Result<u64, KvmDeviceError> {
        let mut offset = 0u64;
        // SAFETY: KVM writes 8 bytes to the address in the attribute, which is that of a u64.
        unsafe { request(fd, KVM_GET_DEVICE_ATTR(), &raw mut offset) }
            .map_err(kvm("KVM_GET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET"))?;
        Ok(offset)
    }

    /// Sets it.
    pub fn set(self, fd: &VcpuFd, mut offset: u64) -> Result<(), KvmDeviceError> {
        // SAFETY: KVM reads 8 bytes from the address in the attribute, which is that of a u64.
        unsafe { request(fd, KVM_SET_DEVICE_ATTR(), &raw mut offset) }
            .map_err(kvm("KVM_SET_DEVICE_ATTR of KVM_VCPU_TSC_OFFSET"))
    }
}

/// # Safety
/// `number` takes a `kvm_device_attr`, and 8 bytes at `value` can be read and written.
unsafe fn request(fd: &VcpuFd, number: c_ulong, value: *mut u64) -> Result<(), Error> {
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.expose_provenance() as u64,
        ..kvm_device_attr::default()
    };
    // SAFETY: `attr` lives through the call and is what the ioctl takes; for what it points to
    // the caller has promised.
    match unsafe { ioctl_with_ref(fd, number, &attr) } {
        0 => Ok(()),
        _ => Err(Error::last()),
    }
}
