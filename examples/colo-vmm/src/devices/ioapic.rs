//! The I/O APIC, in the kernel.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};

const PINS: usize = 24;

/// The registers of the I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "ioapic", version = 1)]
pub struct IoApicState {
    /// Where the guest sees it.
    pub base_address: u64,
    /// The register selected.
    pub ioregsel: u32,
    /// Its APIC id.
    pub id: u32,
    /// Interrupts requested.
    pub irr: u32,
    /// The redirection table.
    pub redirection: [u64; PINS],
}

/// The I/O APIC as a device.
#[derive(Debug)]
pub struct IoApic {
    vm: Arc<VmFd>,
    power_on: IoApicState,
}

impl IoApic {
    /// The I/O APIC of `vm`, at power-on.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, KvmDeviceError> {
        let power_on = read(&vm)?;
        Ok(Self { vm, power_on })
    }
}

impl Device for IoApic {
    type State = IoApicState;

    fn save(&mut self) -> Result<IoApicState, DeviceError> {
        Ok(read(&self.vm)?)
    }

    fn check(&self, state: &IoApicState) -> Result<(), DeviceError> {
        // Nothing in this machine can move it.
        if state.base_address != self.power_on.base_address {
            return Err(KvmDeviceError::Value {
                field: "base_address",
                value: state.base_address,
                expected: "0xfec00000",
            }
            .into());
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(write(&self.vm, &self.power_on)?)
    }

    fn install(&mut self, state: IoApicState) -> Result<(), DeviceError> {
        Ok(write(&self.vm, &state)?)
    }
}

fn read(vm: &VmFd) -> Result<IoApicState, KvmDeviceError> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..kvm_irqchip::default()
    };
    vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
    // SAFETY: the union was zeroed, and KVM fills in this member for the I/O APIC; any bytes are
    // a value of it, and of the 64 bits of each entry.
    let (state, redirection) = unsafe {
        let state = chip.chip.ioapic;
        (state, state.redirtbl.map(|entry| entry.bits))
    };
    Ok(IoApicState {
        base_address: state.base_address,
        ioregsel: state.ioregsel,
        id: state.id,
        irr: state.irr,
        redirection,
    })
}

fn write(vm: &VmFd, state: &IoApicState) -> Result<(), KvmDeviceError> {
    let mut chip = kvm_irqchip__bindgen_ty_1::default();
    chip.ioapic = kvm_ioapic_state {
        base_address: state.base_address,
        ioregsel: state.ioregsel,
        id: state.id,
        irr: state.irr,
        pad: 0,
        redirtbl: state
            .redirection
            .map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
    };
    vm.set_irqchip(&kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        chip,
        ..kvm_irqchip::default()
    })
    .map_err(kvm("KVM_SET_IRQCHIP"))
}
