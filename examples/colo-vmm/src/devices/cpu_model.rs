//! What the guest's CPUs are like: no state that a guest loads, but what both sides have to have in
//! common. It is sent before RAM, so that a target of another kind refuses while the guest still runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use kvm_bindings::CpuId;
use vmstate::{Device, DeviceError, VmState};

use super::KvmDeviceError;
use crate::machine::{Clocks, CpuMask, CpuOptions, CpuidRegister, Register};
use crate::vcpu::dynamic;

/// More than KVM has; they bound what a hostile peer can make us allocate.
const MAX_LEAVES: usize = 1024;
const MAX_REGISTERS: usize = 4096;
/// How many differences an error names.
const NAMED: usize = 6;

/// The CPUs of a guest. All of its vCPUs are alike.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "cpu-model", version = 1)]
pub struct CpuModelState {
    /// How many there are.
    pub vcpus: u8,
    /// How fast their TSCs run, kHz; 0 if the source's KVM does not say.
    pub tsc_khz: u32,
    /// How many leaves of CPUID there are.
    pub leaf_count: u32,
    /// The leaves, in ascending order of number and subleaf.
    #[vmstate(nested, len = leaf_count, max = MAX_LEAVES)]
    pub leaves: Vec<CpuidLeafState>,
    /// How many model-specific registers there are.
    pub msr_count: u32,
    /// Their numbers, in ascending order.
    #[vmstate(len = msr_count, max = MAX_REGISTERS)]
    pub msrs: Vec<u32>,
}

/// A leaf of CPUID, without the bits that say nothing of the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "cpuid-leaf", version = 1)]
pub struct CpuidLeafState {
    /// Its number.
    pub leaf: u32,
    /// The number of its subleaf.
    pub subleaf: u32,
    /// EAX, EBX, ECX and EDX.
    pub registers: [u32; 4],
}

/// The comparison as a device.
#[derive(Debug)]
pub struct CpuModel {
    clocks: Arc<Clocks>,
    own: CpuModelState,
    compares: bool,
}

impl CpuModel {
    /// The CPUs of a machine: how many vCPUs it has, what CPUID the first one has at power-on, which
    /// model-specific registers its state has. The options say whether they are told and compared.
    #[must_use]
    pub fn new(
        clocks: Arc<Clocks>,
        vcpus: u8,
        cpuid: &CpuId,
        msrs: &[u32],
        options: &CpuOptions,
    ) -> Self {
        let mut own = CpuModelState {
            vcpus,
            tsc_khz: 0,
            leaf_count: 0,
            leaves: leaves(cpuid, &options.pretend),
            msr_count: u32::try_from(msrs.len()).unwrap_or(u32::MAX),
            msrs: msrs.to_vec(),
        };
        own.leaf_count = u32::try_from(own.leaves.len()).unwrap_or(u32::MAX);
        Self {
            clocks,
            own,
            compares: options.compare,
        }
    }
}

fn leaves(cpuid: &CpuId, pretend: &[CpuMask]) -> Vec<CpuidLeafState> {
    let mut leaves = BTreeMap::new();
    for entry in cpuid.as_slice() {
        let key = (entry.function, entry.index);
        let values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        // There are KVMs that fill their list up with zeroes behind the last entry.
        leaves.entry(key).or_insert(values);
    }
    for mask in pretend {
        if let CpuMask::Cpuid { at, bits } = mask {
            let values = leaves.entry((at.leaf, at.subleaf)).or_default();
            for (register, value) in Register::ALL.into_iter().zip(values) {
                if register == at.register {
                    *value ^= bits;
                }
            }
        }
    }
    let leaves = leaves.into_iter().map(|((leaf, subleaf), values)| {
        let mut registers = values;
        for (register, value) in Register::ALL.into_iter().zip(&mut registers) {
            *value &= !dynamic(leaf, subleaf, register);
        }
        CpuidLeafState {
            leaf,
            subleaf,
            registers,
        }
    });
    // One that is not there answers with zeroes.
    leaves.filter(|leaf| leaf.registers != [0; 4]).collect()
}

impl Device for CpuModel {
    type State = CpuModelState;

    fn is_needed(&self) -> bool {
        self.compares
    }

    fn save(&mut self) -> Result<CpuModelState, DeviceError> {
        Ok(CpuModelState {
            tsc_khz: self.clocks.tsc_khz_of_guest().unwrap_or(0),
            ..self.own.clone()
        })
    }

    fn check(&self, state: &CpuModelState) -> Result<(), DeviceError> {
        if !self.compares {
            return Ok(());
        }
        let differences = differences(state, &self.own);
        if !differences.is_empty() {
            return Err(Box::new(UnlikeCpus(differences)));
        }
        if state.tsc_khz != 0 {
            self.clocks.check_tsc_khz(state.tsc_khz)?;
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn install(&mut self, _state: CpuModelState) -> Result<(), DeviceError> {
        Err(Box::new(KvmDeviceError::Value {
            field: "cpu model",
            value: 0,
            expected: "to be compared only",
        }))
    }
}

/// Something that the CPUs of two sides do not have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuDifference {
    /// The number of vCPUs.
    Vcpus {
        /// The source's.
        source: u8,
        /// This side's.
        here: u8,
    },
    /// A register of CPUID.
    Cpuid {
        /// Which one.
        at: CpuidRegister,
        /// The source's value.
        source: u32,
        /// This side's value.
        here: u32,
    },
    /// A model-specific register that only one side has.
    Msr {
        /// Its number.
        index: u32,
        /// Whether it is the source that has it.
        at_source: bool,
    },
}

fn differences(source: &CpuModelState, here: &CpuModelState) -> Vec<CpuDifference> {
    let mut differences = Vec::new();
    if source.vcpus != here.vcpus {
        differences.push(CpuDifference::Vcpus {
            source: source.vcpus,
            here: here.vcpus,
        });
    }
    let by_number = |state: &CpuModelState| -> BTreeMap<(u32, u32), [u32; 4]> {
        let leaves = state.leaves.iter();
        leaves
            .map(|leaf| ((leaf.leaf, leaf.subleaf), leaf.registers))
            .collect()
    };
    let (theirs, ours) = (by_number(source), by_number(here));
    let numbers: BTreeSet<_> = theirs.keys().chain(ours.keys()).copied().collect();
    for (leaf, subleaf) in numbers {
        let values = |leaves: &BTreeMap<_, _>| leaves.get(&(leaf, subleaf)).copied();
        let (theirs, ours): ([u32; 4], [u32; 4]) = (
            values(&theirs).unwrap_or_default(),
            values(&ours).unwrap_or_default(),
        );
        for ((register, source), here) in Register::ALL.into_iter().zip(theirs).zip(ours) {
            if source != here {
                let at = CpuidRegister {
                    leaf,
                    subleaf,
                    register,
                };
                differences.push(CpuDifference::Cpuid { at, source, here });
            }
        }
    }
    let theirs: BTreeSet<u32> = source.msrs.iter().copied().collect();
    let ours: BTreeSet<u32> = here.msrs.iter().copied().collect();
    let only_one = theirs.symmetric_difference(&ours);
    differences.extend(only_one.map(|index| CpuDifference::Msr {
        index: *index,
        at_source: theirs.contains(index),
    }));
    differences
}

/// The CPUs of source and target differ, in what is named.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct UnlikeCpus(Vec<CpuDifference>);

impl UnlikeCpus {
    /// What they do not have in common, at least one thing.
    #[must_use]
    pub fn differences(&self) -> &[CpuDifference] {
        &self.0
    }
}

impl fmt::Display for UnlikeCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the cpus of source and target differ: ")?;
        for (i, difference) in self.0.iter().take(NAMED).enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            difference.fmt(f)?;
        }
        match self.0.len().saturating_sub(NAMED) {
            0 => {}
            more => write!(f, "; and {more} more differences")?,
        }
        let masks: Vec<_> = self.0.iter().filter_map(CpuDifference::mask).collect();
        if let Some(masks) = masks
            .get(..masks.len().min(NAMED))
            .filter(|m| !m.is_empty())
        {
            write!(
                f,
                " (alike with --cpu-mask {} on both sides)",
                masks.join(",")
            )?;
        }
        Ok(())
    }
}

impl CpuDifference {
    /// The mask under which it is none, on both sides.
    fn mask(&self) -> Option<String> {
        match self {
            Self::Vcpus { .. } => None,
            Self::Cpuid { at, source, here } => Some(format!("{at}={:#x}", !(source ^ here))),
            Self::Msr { index, .. } => Some(format!("msr:{index:#x}")),
        }
    }
}

impl fmt::Display for CpuDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus { source, here } => {
                write!(f, "{source} vcpus at the source, {here} here")
            }
            Self::Cpuid { at, source, here } => {
                let CpuidRegister {
                    leaf,
                    subleaf,
                    register,
                } = at;
                let register = register.name();
                write!(
                    f,
                    "cpuid leaf {leaf:#x} subleaf {subleaf:#x} {register} is {source:#010x} at the \
                     source, {here:#010x} here"
                )?;
                bits(f, source & !here, "only at the source")?;
                bits(f, here & !source, "only here")
            }
            Self::Msr { index, at_source } => {
                let whose = if *at_source {
                    "the source"
                } else {
                    "this side"
                };
                write!(f, "only {whose} has model-specific register {index:#x}")
            }
        }
    }
}

fn bits(f: &mut fmt::Formatter<'_>, set: u32, whose: &str) -> fmt::Result {
    let numbers: Vec<String> = (0..u32::BITS)
        .filter(|bit| set >> bit & 1 == 1)
        .map(|bit| bit.to_string())
        .collect();
    match numbers.as_slice() {
        [] => Ok(()),
        [bit] => write!(f, ", bit {bit} {whose}"),
        bits => write!(f, ", bits {} {whose}", bits.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(leaves: &[(u32, u32, [u32; 4])], msrs: &[u32]) -> CpuModelState {
        let leaves: Vec<_> = leaves
            .iter()
            .map(|(leaf, subleaf, registers)| CpuidLeafState {
                leaf: *leaf,
                subleaf: *subleaf,
                registers: *registers,
            })
            .collect();
        CpuModelState {
            vcpus: 1,
            tsc_khz: 2_100_000,
            leaf_count: u32::try_from(leaves.len()).unwrap(),
            leaves,
            msr_count: u32::try_from(msrs.len()).unwrap(),
            msrs: msrs.to_vec(),
        }
    }

    #[test]
    fn a_difference_is_named_by_leaf_register_and_bit_with_both_values() {
        let source = state(&[(1, 0, [1; 4]), (7, 0, [0, 0x29, 5, 0])], &[0x10, 0x345]);
        let mut here = state(
            &[
                (1, 0, [1; 4]),
                (7, 0, [0, 0x08, 7, 0]),
                (0xd, 1, [1, 0, 0, 0]),
            ],
            &[0x10],
        );
        assert_eq!(differences(&source, &source), []);
        here.vcpus = 2;
        let error = UnlikeCpus(differences(&source, &here)).to_string();
        for part in [
            "1 vcpus at the source, 2 here",
            "cpuid leaf 0x7 subleaf 0x0 ebx is 0x00000029 at the source, 0x00000008 here, bits 0 5 \
             only at the source",
            "ecx is 0x00000005 at the source, 0x00000007 here, bit 1 only here",
            "leaf 0xd subleaf 0x1 eax is 0x00000000 at the source, 0x00000001 here",
            "only the source has model-specific register 0x345",
            "--cpu-mask 0x7.0x0.ebx=0xffffffde,0x7.0x0.ecx=0xfffffffd,0xd.0x1.eax=0xfffffffe,\
             msr:0x345",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        // What is advised can be typed.
        let advice = error.split("--cpu-mask ").nth(1).unwrap();
        for mask in advice.split(' ').next().unwrap().split(',') {
            assert!(mask.parse::<CpuMask>().is_ok(), "{mask}");
        }
    }

    #[test]
    fn an_error_names_a_few_differences_and_how_many_there_are() {
        let source = state(&[], &(0..100).collect::<Vec<_>>());
        let error = UnlikeCpus(differences(&source, &state(&[], &[])));
        assert_eq!(error.differences().len(), 100);
        let text = error.to_string();
        assert!(text.contains("and 94 more differences"), "{text}");
        assert!(text.len() < 700, "{text}");
    }

    #[test]
    fn what_a_source_says_is_bounded() {
        let mut bytes = vmstate::to_bytes(&state(&[], &[])).unwrap();
        let at = 1 + 4;
        bytes[at..at + 4].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(vmstate::from_bytes::<CpuModelState>(&bytes, 1).is_err());
    }
}
