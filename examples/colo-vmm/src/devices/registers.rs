//! A vCPU's registers: general, segment, control and debug registers, XCR0, and what it was in
//! the middle of (pending exceptions and interrupts, waiting for a start-up).

use std::sync::Arc;

use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, kvm};
use crate::vcpu::Vcpu;

/// The state of a vCPU's registers, as KVM numbers and names them.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "vcpu", version = 1)]
pub struct VcpuState {
    /// rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// cs, ds, es, fs, gs, ss, tr, ldt.
    #[vmstate(nested)]
    pub segments: [SegmentState; 8],
    /// Global descriptor table.
    #[vmstate(nested)]
    pub gdt: TableState,
    /// Interrupt descriptor table.
    #[vmstate(nested)]
    pub idt: TableState,
    /// cr0, cr2, cr3, cr4, cr8.
    pub control: [u64; 5],
    /// Extended features.
    pub efer: u64,
    /// Address and mode of the local APIC.
    pub apic_base: u64,
    /// The external interrupt that is about to be delivered, one bit of 256.
    pub interrupt_bitmap: [u64; 4],
    /// dr0 to dr3, dr6, dr7.
    pub debug: [u64; 6],
    /// XCR0; 0 if the host has none.
    pub xcr0: u64,
    /// KVM_MP_STATE_*: running, waiting for INIT or SIPI, halted.
    pub mp_state: u32,
    /// Exception: injected, vector, has error code, pending.
    pub exception: [u8; 4],
    /// Exception: error code.
    pub exception_error_code: u32,
    /// Exception: has a payload (the flag and 0 or 1).
    pub exception_has_payload: u8,
    /// Exception: the payload (cr2 or dr6 to be).
    pub exception_payload: u64,
    /// Interrupt: injected, vector, soft, shadow.
    pub interrupt: [u8; 4],
    /// NMI: injected, pending, masked.
    pub nmi: [u8; 3],
    /// Vector of a start-up that has arrived.
    pub sipi_vector: u32,
    /// System management: in it, pending, inside NMI, latched INIT.
    pub smi: [u8; 4],
    /// A triple fault is pending.
    pub triple_fault: u8,
    /// KVM_VCPUEVENT_VALID_*: which of the above mean anything.
    pub events_flags: u32,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "segment", version = 1)]
pub struct SegmentState {
    /// Base address.
    pub base: u64,
    /// Limit, bytes.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// type, present, dpl, db, s, l, g, avl, unusable.
    pub attributes: [u8; 9],
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "table", version = 1)]
pub struct TableState {
    /// Base address.
    pub base: u64,
    /// Limit, bytes.
    pub limit: u16,
}

impl From<kvm_segment> for SegmentState {
    fn from(s: kvm_segment) -> Self {
        Self {
            base: s.base,
            limit: s.limit,
            selector: s.selector,
            attributes: [
                s.type_, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl, s.unusable,
            ],
        }
    }
}

impl From<SegmentState> for kvm_segment {
    fn from(s: SegmentState) -> Self {
        let [type_, present, dpl, db, sys, l, g, avl, unusable] = s.attributes;
        Self {
            base: s.base,
            limit: s.limit,
            selector: s.selector,
            type_,
            present,
            dpl,
            db,
            s: sys,
            l,
            g,
            avl,
            unusable,
            padding: 0,
        }
    }
}

impl From<kvm_dtable> for TableState {
    fn from(t: kvm_dtable) -> Self {
        Self {
            base: t.base,
            limit: t.limit,
        }
    }
}

impl From<TableState> for kvm_dtable {
    fn from(t: TableState) -> Self {
        Self {
            base: t.base,
            limit: t.limit,
            padding: [0; 3],
        }
    }
}

/// The registers of one vCPU as a device.
#[derive(Debug)]
pub struct VcpuRegisters {
    vcpu: Arc<Vcpu>,
    has_xcrs: bool,
    power_on: VcpuState,
}

impl VcpuRegisters {
    /// The registers of `vcpu`, which is at power-on. `has_xcrs`: the host has KVM_CAP_XCRS.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vcpu: Arc<Vcpu>, has_xcrs: bool) -> Result<Self, KvmDeviceError> {
        let power_on = read(&*vcpu.fd()?, has_xcrs)?;
        Ok(Self {
            vcpu,
            has_xcrs,
            power_on,
        })
    }
}

impl Device for VcpuRegisters {
    type State = VcpuState;

    fn save(&mut self) -> Result<VcpuState, DeviceError> {
        Ok(read(&*self.vcpu.fd()?, self.has_xcrs)?)
    }

    fn check(&self, state: &VcpuState) -> Result<(), DeviceError> {
        if (state.xcr0 != 0) != self.has_xcrs {
            return Err(KvmDeviceError::Value {
                field: "xcr0",
                value: state.xcr0,
                expected: "0 where the host has no XSAVE, and another value where it has",
            }
            .into());
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(write(&*self.vcpu.fd()?, self.has_xcrs, &self.power_on)?)
    }

    fn install(&mut self, state: VcpuState) -> Result<(), DeviceError> {
        Ok(write(&*self.vcpu.fd()?, self.has_xcrs, &state)?)
    }
}

fn read(fd: &VcpuFd, has_xcrs: bool) -> Result<VcpuState, KvmDeviceError> {
    // First: it makes KVM act on an INIT or SIPI that has arrived, which changes registers.
    let mp_state = fd.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
    let r = fd.get_regs().map_err(kvm("KVM_GET_REGS"))?;
    let s = fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    let d = fd.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?;
    let e = fd.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?;
    let xcr0 = if has_xcrs {
        fd.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?.xcrs[0].value
    } else {
        0
    };
    Ok(VcpuState {
        general: [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        rip: r.rip,
        rflags: r.rflags,
        segments: [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt].map(SegmentState::from),
        gdt: s.gdt.into(),
        idt: s.idt.into(),
        control: [s.cr0, s.cr2, s.cr3, s.cr4, s.cr8],
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
        debug: [d.db[0], d.db[1], d.db[2], d.db[3], d.dr6, d.dr7],
        xcr0,
        mp_state: mp_state.mp_state,
        exception: [
            e.exception.injected,
            e.exception.nr,
            e.exception.has_error_code,
            e.exception.pending,
        ],
        exception_error_code: e.exception.error_code,
        exception_has_payload: e.exception_has_payload,
        exception_payload: e.exception_payload,
        interrupt: [
            e.interrupt.injected,
            e.interrupt.nr,
            e.interrupt.soft,
            e.interrupt.shadow,
        ],
        nmi: [e.nmi.injected, e.nmi.pending, e.nmi.masked],
        sipi_vector: e.sipi_vector,
        smi: [
            e.smi.smm,
            e.smi.pending,
            e.smi.smm_inside_nmi,
            e.smi.latched_init,
        ],
        triple_fault: e.triple_fault.pending,
        events_flags: e.flags,
    })
}

fn write(fd: &VcpuFd, has_xcrs: bool, state: &VcpuState) -> Result<(), KvmDeviceError> {
    let [cs, ds, es, fs, gs, ss, tr, ldt] = state.segments.map(kvm_segment::from);
    let [cr0, cr2, cr3, cr4, cr8] = state.control;
    fd.set_sregs(&kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt: state.gdt.into(),
        idt: state.idt.into(),
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer: state.efer,
        apic_base: state.apic_base,
        interrupt_bitmap: state.interrupt_bitmap,
    })
    .map_err(kvm("KVM_SET_SREGS"))?;
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.general;
    fd.set_regs(&kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    })
    .map_err(kvm("KVM_SET_REGS"))?;
    let [db0, db1, db2, db3, dr6, dr7] = state.debug;
    fd.set_debug_regs(&kvm_debugregs {
        db: [db0, db1, db2, db3],
        dr6,
        dr7,
        ..kvm_debugregs::default()
    })
    .map_err(kvm("KVM_SET_DEBUGREGS"))?;
    if has_xcrs {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..kvm_xcrs::default()
        };
        xcrs.xcrs[0].value = state.xcr0;
        fd.set_xcrs(&xcrs).map_err(kvm("KVM_SET_XCRS"))?;
    }
    // After the general registers: setting those drops a pending exception.
    fd.set_vcpu_events(&events(state))
        .map_err(kvm("KVM_SET_VCPU_EVENTS"))?;
    fd.set_mp_state(kvm_mp_state {
        mp_state: state.mp_state,
    })
    .map_err(kvm("KVM_SET_MP_STATE"))
}

fn events(state: &VcpuState) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        sipi_vector: state.sipi_vector,
        flags: state.events_flags,
        exception_has_payload: state.exception_has_payload,
        exception_payload: state.exception_payload,
        ..kvm_vcpu_events::default()
    };
    [
        e.exception.injected,
        e.exception.nr,
        e.exception.has_error_code,
        e.exception.pending,
    ] = state.exception;
    e.exception.error_code = state.exception_error_code;
    [
        e.interrupt.injected,
        e.interrupt.nr,
        e.interrupt.soft,
        e.interrupt.shadow,
    ] = state.interrupt;
    [e.nmi.injected, e.nmi.pending, e.nmi.masked] = state.nmi;
    [
        e.smi.smm,
        e.smi.pending,
        e.smi.smm_inside_nmi,
        e.smi.latched_init,
    ] = state.smi;
    e.triple_fault.pending = state.triple_fault;
    e
}
