//! Making guest memory zero, with and without touching what is zero already.

use vm_memory::{VolatileMemoryError, VolatileSlice};

/// Step in which memory is looked at: fits the first-level cache.
const STEP: usize = 4096;
/// Most pages that are not zero show it in their first bytes.
const PROBE: usize = 64;

const ZEROES: [u8; STEP] = [0; STEP];

/// Writes zero over every step of `memory` that is not zero. A page that was never written is only
/// read, so anonymous private memory stays unallocated.
pub(crate) fn zero_unless_zero(memory: &VolatileSlice<'_>) -> Result<(), VolatileMemoryError> {
    // Memory shared with a guest cannot be borrowed as bytes, so it is compared in a copy. The
    // copy stays in the first-level cache; the time goes to reading the memory either way.
    let mut copy = [0; STEP];
    let mut offset = 0;
    while offset < memory.len() {
        let step = memory.subslice(offset, STEP.min(memory.len() - offset))?;
        if !is_zero(&step, &mut copy)? {
            step.copy_from(&ZEROES);
        }
        offset += step.len();
    }
    Ok(())
}

/// Whether all of `step`, at most [`STEP`] bytes, is zero. `copy` is scratch.
fn is_zero(step: &VolatileSlice<'_>, copy: &mut [u8; STEP]) -> Result<bool, VolatileMemoryError> {
    let probed = step.copy_to(&mut copy[..PROBE]);
    if copy[..probed] != ZEROES[..probed] {
        return Ok(false);
    }
    let rest = step.offset(probed)?;
    let copied = rest.copy_to(&mut copy[..]);
    Ok(copy[..copied] == ZEROES[..copied])
}

/// Makes memory zero, whatever it holds.
pub(crate) fn write_zeroes(memory: &VolatileSlice<'_>) {
    let mut at = 0;
    while let Ok(rest) = memory.offset(at) {
        if rest.is_empty() {
            break;
        }
        rest.copy_from(&ZEROES);
        at += rest.len().min(STEP);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use vm_memory::{MmapRegion, VolatileMemory};

    use super::*;

    #[test]
    fn whatever_was_there_is_zero_afterwards_and_its_neighbours_are_not() {
        for dirty in [0, 63, 64, 4095, 4096, 9999] {
            let mut bytes = vec![0u8; 10_002];
            bytes[dirty + 1] = 1;
            *bytes.first_mut().unwrap() = 7;
            *bytes.last_mut().unwrap() = 7;
            let memory = VolatileSlice::from(&mut bytes[..]);
            zero_unless_zero(&memory.subslice(1, 10_000).unwrap()).unwrap();
            assert!(bytes[1..10_001].iter().all(|&b| b == 0), "byte {dirty}");
            assert_eq!((bytes[0], bytes[10_001]), (7, 7));
        }
    }

    #[test]
    fn zeroing_memory_that_was_never_written_allocates_none() {
        let len = 64 << 20;
        let region: MmapRegion = MmapRegion::new(len).unwrap();
        let before = resident_anonymous();
        zero_unless_zero(&region.as_volatile_slice()).unwrap();
        let grown = resident_anonymous().saturating_sub(before);
        // Other tests run beside this one and need memory of their own, far less than this.
        assert!(grown < len / 2, "{grown} bytes became resident");
    }

    fn resident_anonymous() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
        let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib * 1024
    }
}
