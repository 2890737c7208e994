//! What to tell the user when KVM gives up on an instruction.

use std::fmt;
use std::path::Path;

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

/// The longest x86 instruction, bytes.
const MAX_INSTRUCTION: usize = 15;

/// KVM_EXIT_INTERNAL_ERROR: an instruction that KVM had to emulate and could not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnemulatedInstruction {
    /// The vCPU.
    pub vcpu: u8,
    /// Its instruction pointer; `None` if its registers cannot be read either.
    pub rip: Option<u64>,
    /// The bytes at the instruction pointer: the instruction, and what follows it.
    pub bytes: Vec<u8>,
    /// Whether this host's KVM is PVM, which emulates all of the guest kernel's code.
    pub pvm: bool,
}

impl UnemulatedInstruction {
    pub(super) fn at_rip(vcpu: u8, fd: &VcpuFd, memory: &Memory) -> Self {
        let place = fd
            .get_regs()
            .and_then(|regs| Ok((regs.rip, fd.get_sregs()?.cs.base)));
        let (rip, bytes) = match place {
            Ok((rip, base)) => (Some(rip), instruction(fd, memory, base.wrapping_add(rip))),
            Err(_) => (None, Vec::new()),
        };
        Self {
            vcpu,
            rip,
            bytes,
            pvm: is_pvm(),
        }
    }
}

/// Whether this host's KVM is PVM.
pub fn is_pvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// The bytes from linear address `at`, as far as the guest has them mapped.
fn instruction(fd: &VcpuFd, memory: &Memory, at: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MAX_INSTRUCTION);
    for linear in (at..).take(MAX_INSTRUCTION) {
        let physical = match fd.translate_gva(linear) {
            Ok(translation) if translation.valid != 0 => translation.physical_address,
            _ => break,
        };
        match memory.guest().read_obj(GuestAddress(physical)) {
            Ok(byte) => bytes.push(byte),
            Err(_) => break,
        }
    }
    bytes
}

impl fmt::Display for UnemulatedInstruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu {} stopped", self.vcpu)?;
        if let Some(rip) = self.rip {
            write!(f, " at rip {rip:#x}")?;
        }
        if !self.bytes.is_empty() {
            f.write_str(" (bytes")?;
            for byte in &self.bytes {
                write!(f, " {byte:02x}")?;
            }
            f.write_str(")")?;
        }
        f.write_str(" on an instruction that this host's kvm cannot emulate")?;
        if self.pvm {
            f.write_str(
                "; it is PVM, which emulates everything a guest does in kernel mode and knows few \
                 instructions: a stock Linux kernel needs a host with hardware virtualization",
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_the_instruction_and_the_cause() {
        let mut what = UnemulatedInstruction {
            vcpu: 0,
            rip: Some(0x7c10),
            bytes: vec![0x9b, 0xf4],
            pvm: false,
        };
        assert_eq!(
            what.to_string(),
            "vcpu 0 stopped at rip 0x7c10 (bytes 9b f4) on an instruction that this host's kvm \
             cannot emulate"
        );
        what.pvm = true;
        assert!(what.to_string().contains("hardware virtualization"));
    }
}
