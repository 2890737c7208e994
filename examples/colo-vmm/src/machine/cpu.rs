//! What is to be done about the guest's CPUs where hosts are unlike.

use std::fmt;
use std::str::FromStr;

use super::ClockPolicy;
use migration_stream::Escaped;

/// What a machine's vCPUs are to be like, and what is said of them to another side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// What the guest's clocks do while it stands still.
    pub clocks: ClockPolicy,
    /// What the guest is not to see of the host's CPU.
    pub masks: Vec<CpuMask>,
    /// Say what the guest's CPUs are like before RAM is sent, and compare it with what a source says.
    pub compare: bool,
    /// Bits of CPUID that are told and compared inverted, for tests.
    pub pretend: Vec<CpuMask>,
}

impl Default for CpuOptions {
    /// All of the host's CPU, compared with the other side's.
    fn default() -> Self {
        Self {
            clocks: ClockPolicy::default(),
            masks: Vec::new(),
            compare: true,
            pretend: Vec::new(),
        }
    }
}

/// What the guest is not to see: bits of a register of CPUID, or a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMask {
    /// A register of CPUID has only these bits.
    Cpuid {
        /// Where it is.
        at: CpuidRegister,
        /// The bits that are left.
        bits: u32,
    },
    /// The guest's state has no such model-specific register.
    Msr(u32),
}

/// A register of one leaf of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuidRegister {
    /// EAX when it is asked for.
    pub leaf: u32,
    /// ECX then.
    pub subleaf: u32,
    /// Which of the four.
    pub register: Register,
}

impl fmt::Display for CpuidRegister {
    /// As a mask names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = self.register.name();
        write!(f, "{:#x}.{:#x}.{register}", self.leaf, self.subleaf)
    }
}

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// All four, in the order of their values in a leaf.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

const EXPECTED: &str = "expected LEAF.SUBLEAF.REGISTER=BITS, such as 0x7.0.ebx=0xffffffdf, or \
                        msr:NUMBER";

impl FromStr for CpuMask {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(number) = text.strip_prefix("msr:") {
            return number32(number).map(Self::Msr);
        }
        let (at, bits) = text.split_once('=').ok_or(EXPECTED)?;
        let mut parts = at.split('.');
        let (Some(leaf), Some(subleaf), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(EXPECTED.to_owned());
        };
        let register = Register::ALL
            .into_iter()
            .find(|register| register.name() == name)
            .ok_or_else(|| format!("'{}' is not eax, ebx, ecx or edx", Escaped(name)))?;
        Ok(Self::Cpuid {
            at: CpuidRegister {
                leaf: number32(leaf)?,
                subleaf: number32(subleaf)?,
                register,
            },
            bits: number32(bits)?,
        })
    }
}

/// A number, hexadecimal behind 0x.
fn number32(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("'{}' is not a number of 32 bits", Escaped(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_names_a_register_of_a_leaf_or_a_model_specific_one() {
        let at = CpuidRegister {
            leaf: 7,
            subleaf: 1,
            register: Register::Edx,
        };
        let bits = 0xff00_00ff;
        assert_eq!(
            "0x7.1.edx=0xff0000ff".parse(),
            Ok(CpuMask::Cpuid { at, bits })
        );
        assert_eq!(
            "7.1.edx=4278190335".parse(),
            Ok(CpuMask::Cpuid { at, bits })
        );
        assert_eq!("msr:0x345".parse(), Ok(CpuMask::Msr(0x345)));
        for text in [
            "",
            "7",
            "7.0.ebx",
            "7.ebx=1",
            "7.0.0.ebx=1",
            "7.0.rbx=1",
            "7.0.ebx=",
            "7.0.ebx=-1",
            "0x1ffffffff.0.ebx=1",
            "msr:",
            "msr:x",
        ] {
            assert!(text.parse::<CpuMask>().is_err(), "{text}");
        }
    }
}
