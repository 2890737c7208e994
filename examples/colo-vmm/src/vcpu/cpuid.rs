//! What a vCPU says of itself.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;

use crate::machine::{CpuMask, CpuidRegister, MachineError, Register};

/// `supported`, as KVM gives it, for vCPU `index` of `vcpus`: only the topology is ours, and what the
/// guest is not to see is left out. KVM's list carries the APIC id of whatever host CPU it was asked on.
pub fn cpuid_of(supported: &CpuId, index: u8, vcpus: u8, masks: &[CpuMask]) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // EBX 31:24 APIC id, 23:16 logical processors.
            0x1 => {
                entry.ebx =
                    (entry.ebx & 0xffff) | (u32::from(index) << 24) | (u32::from(vcpus) << 16);
                // EDX bit 28: the count in EBX is meaningful.
                if vcpus > 1 {
                    entry.edx |= 1 << 28;
                } else {
                    entry.edx &= !(1 << 28);
                }
            }
            // EDX: x2APIC id.
            0xb | 0x1f => entry.edx = u32::from(index),
            _ => {}
        }
        for (at, bits) in of_cpuid(masks) {
            if is_at(entry, at) {
                *register(entry, at.register) &= bits;
            }
        }
    }
    cpuid
}

/// Fails if the vCPU, which was given the CPUID that [`cpuid_of`] makes, has bits that it was not to
/// have: there are KVMs (PVM's) that show some of the host's leaves whatever they are given.
pub fn check_masks(fd: &VcpuFd, entries: usize, masks: &[CpuMask]) -> Result<(), MachineError> {
    if of_cpuid(masks).next().is_none() {
        return Ok(());
    }
    let mut has = fd
        .get_cpuid2(entries)
        .map_err(MachineError::kvm("get a vcpu's cpuid"))?;
    for (at, bits) in of_cpuid(masks) {
        // Bits that KVM makes of the vCPU's state are not the mask's affair.
        let bits = bits | dynamic(at.leaf, at.subleaf, at.register);
        for entry in has.as_mut_slice() {
            let extra = *register(entry, at.register) & !bits;
            if is_at(entry, at) && extra != 0 {
                return Err(MachineError::CpuMask { at, extra });
            }
        }
    }
    Ok(())
}

fn of_cpuid(masks: &[CpuMask]) -> impl Iterator<Item = (CpuidRegister, u32)> + '_ {
    masks.iter().filter_map(|mask| match mask {
        CpuMask::Cpuid { at, bits } => Some((*at, *bits)),
        CpuMask::Msr(_) => None,
    })
}

const fn is_at(entry: &kvm_cpuid_entry2, at: CpuidRegister) -> bool {
    entry.function == at.leaf && entry.index == at.subleaf
}

const fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

/// The bits of a register that say nothing of the CPU: KVM makes them of the state that the vCPU is in,
/// or they are the vCPU's own number.
pub const fn dynamic(leaf: u32, subleaf: u32, register: Register) -> u32 {
    match (leaf, subleaf, register) {
        // APIC id, and how many there are.
        (0x1, _, Register::Ebx) => 0xffff_0000,
        // OSXSAVE; APIC, and that the count in EBX is meaningful.
        (0x1, _, Register::Ecx) => 1 << 27,
        (0x1, _, Register::Edx) => (1 << 9) | (1 << 28),
        // OSPKE.
        (0x7, 0, Register::Ecx) => 1 << 4,
        // x2APIC id.
        (0xb | 0x1f, _, Register::Edx)
        // How much XSAVE writes with the present XCR0 and XSS.
        | (0xd, 0 | 1, Register::Ebx) => u32::MAX,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[entry(1, 0), entry(7, 0), entry(7, 1)]).unwrap()
    }

    #[test]
    fn masks_take_bits_of_their_own_register_only() {
        let masks = ["7.1.ecx=0xf0", "1.0.ebx=0xffffff", "9.0.eax=0", "msr:0x10"];
        let masks: Vec<CpuMask> = masks.iter().map(|mask| mask.parse().unwrap()).collect();
        let cpuid = cpuid_of(&supported(), 3, 4, &masks);
        let [first, second, third] = cpuid.as_slice() else {
            panic!("three leaves were given");
        };
        assert_eq!(first.ebx, 0x0004_ffff);
        assert_eq!((second.ecx, third.ecx), (u32::MAX, 0xf0));
        assert_eq!(
            (third.eax, third.ebx, third.edx),
            (u32::MAX, u32::MAX, u32::MAX)
        );
    }
}
