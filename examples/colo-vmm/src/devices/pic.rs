//! The two 8259 interrupt controllers, in the kernel.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
    kvm_pic_state,
};
use kvm_ioctls::VmFd;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};

/// Which of the two; also the instance id of its section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PicRole {
    /// Interrupts 0 to 7.
    Master,
    /// Interrupts 8 to 15.
    Slave,
}

impl PicRole {
    const fn chip_id(self) -> u32 {
        match self {
            Self::Master => KVM_IRQCHIP_PIC_MASTER,
            Self::Slave => KVM_IRQCHIP_PIC_SLAVE,
        }
    }
}

/// The registers of an 8259 and where it is in its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "i8259", version = 1)]
pub struct PicState {
    /// Levels of the lines when last seen, for edges.
    pub last_irr: u8,
    /// Interrupts requested.
    pub irr: u8,
    /// Interrupts masked.
    pub imr: u8,
    /// Interrupts in service.
    pub isr: u8,
    /// The line of highest priority.
    pub priority_add: u8,
    /// Vector of the first line.
    pub irq_base: u8,
    /// Whether a read gives ISR rather than IRR.
    pub read_reg_select: u8,
    /// Poll mode.
    pub poll: u8,
    /// Special mask mode.
    pub special_mask: u8,
    /// Which initialisation word is expected, 0 to 3.
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: u8,
    /// Rotation on automatic end of interrupt.
    pub rotate_on_auto_eoi: u8,
    /// Special fully nested mode.
    pub special_fully_nested_mode: u8,
    /// A fourth initialisation word is expected.
    pub init4: u8,
    /// Lines that are level-triggered.
    pub elcr: u8,
    /// Lines that may be.
    pub elcr_mask: u8,
}

/// An 8259 as a device.
#[derive(Debug)]
pub struct Pic {
    vm: Arc<VmFd>,
    role: PicRole,
    power_on: PicState,
}

impl Pic {
    /// One of the controllers of `vm`, at power-on.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vm: Arc<VmFd>, role: PicRole) -> Result<Self, KvmDeviceError> {
        let power_on = read(&vm, role)?;
        Ok(Self { vm, role, power_on })
    }
}

impl Device for Pic {
    type State = PicState;

    fn save(&mut self) -> Result<PicState, DeviceError> {
        Ok(read(&self.vm, self.role)?)
    }

    fn check(&self, state: &PicState) -> Result<(), DeviceError> {
        if state.init_state > 3 {
            return Err(KvmDeviceError::Value {
                field: "init_state",
                value: state.init_state.into(),
                expected: "0 to 3",
            }
            .into());
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(write(&self.vm, self.role, self.power_on)?)
    }

    fn install(&mut self, state: PicState) -> Result<(), DeviceError> {
        Ok(write(&self.vm, self.role, state)?)
    }
}

fn read(vm: &VmFd, role: PicRole) -> Result<PicState, KvmDeviceError> {
    let mut chip = kvm_irqchip {
        chip_id: role.chip_id(),
        ..kvm_irqchip::default()
    };
    vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
    // SAFETY: the union was zeroed, and KVM fills in this member for a PIC; any bytes are a value
    // of it.
    let s = unsafe { chip.chip.pic };
    Ok(PicState {
        last_irr: s.last_irr,
        irr: s.irr,
        imr: s.imr,
        isr: s.isr,
        priority_add: s.priority_add,
        irq_base: s.irq_base,
        read_reg_select: s.read_reg_select,
        poll: s.poll,
        special_mask: s.special_mask,
        init_state: s.init_state,
        auto_eoi: s.auto_eoi,
        rotate_on_auto_eoi: s.rotate_on_auto_eoi,
        special_fully_nested_mode: s.special_fully_nested_mode,
        init4: s.init4,
        elcr: s.elcr,
        elcr_mask: s.elcr_mask,
    })
}

fn write(vm: &VmFd, role: PicRole, s: PicState) -> Result<(), KvmDeviceError> {
    let mut chip = kvm_irqchip__bindgen_ty_1::default();
    chip.pic = kvm_pic_state {
        last_irr: s.last_irr,
        irr: s.irr,
        imr: s.imr,
        isr: s.isr,
        priority_add: s.priority_add,
        irq_base: s.irq_base,
        read_reg_select: s.read_reg_select,
        poll: s.poll,
        special_mask: s.special_mask,
        init_state: s.init_state,
        auto_eoi: s.auto_eoi,
        rotate_on_auto_eoi: s.rotate_on_auto_eoi,
        special_fully_nested_mode: s.special_fully_nested_mode,
        init4: s.init4,
        elcr: s.elcr,
        elcr_mask: s.elcr_mask,
    };
    vm.set_irqchip(&kvm_irqchip {
        chip_id: role.chip_id(),
        chip,
        ..kvm_irqchip::default()
    })
    .map_err(kvm("KVM_SET_IRQCHIP"))
}
