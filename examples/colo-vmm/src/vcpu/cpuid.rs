//! What a vCPU says of itself.

use kvm_bindings::CpuId;

/// `supported`, as KVM gives it, for vCPU `index` of `vcpus`: only the topology is ours. KVM's list
/// carries the APIC id of whatever host CPU it was asked on.
pub fn cpuid_of(supported: &CpuId, index: u8, vcpus: u8) -> CpuId {
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
    }
    cpuid
}
