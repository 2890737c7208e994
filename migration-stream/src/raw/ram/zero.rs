//! Is a piece of guest memory all zero?
//!
//! The memory may change while it is looked at: it is only ever read through raw pointers, by
//! volatile loads. A page that is written during the check is dirty for the next round, whatever
//! the check says.
#![allow(unsafe_code)]

use vm_memory::VolatileSlice;

/// Bytes looked at between two exits. Pages that are not zero mostly show it in the first block,
/// pages that are zero are read at memory speed.
const BLOCK: usize = 128;
/// Alignment of the widest load, bytes.
const ALIGN: usize = 32;
#[cfg(target_arch = "x86_64")]
const PAGE_LEN: usize = 4096;

/// Whether all bytes of `slice` are zero; an empty slice is.
///
/// Uses AVX2 or SSE2 where the processor has them. Slices aligned to 32 bytes, such as pages, are
/// the fast case.
#[must_use]
pub fn zero_check(slice: &VolatileSlice<'_>) -> bool {
    #[cfg(target_arch = "x86_64")]
    let scan = if is_x86_feature_detected!("avx2") {
        avx2
    } else {
        sse2
    };
    #[cfg(not(target_arch = "x86_64"))]
    let scan = words;
    check(slice, scan)
}

/// Has the processor fetch what [`zero_check`] looks at first in each page of `run`, which begins with a
/// page. Checks that follow wait for memory together and not one after the other: a page that is not zero
/// takes little but that wait. The pages of a packet are a good number.
pub fn fetch_for_zero_check(run: &VolatileSlice<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const LINE: usize = 64;
        let guard = run.ptr_guard();
        for page in (0..run.len()).step_by(PAGE_LEN) {
            for line in (0..BLOCK).step_by(LINE) {
                let line = guard.as_ptr().wrapping_add(page + line).cast();
                // SAFETY: needs SSE, which every x86-64 has. A hint: nothing is dereferenced.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = run;
}

/// Looks at `blocks` blocks of [`BLOCK`] bytes from an address aligned to [`ALIGN`].
type Scan = unsafe fn(*const u8, usize) -> bool;

fn check(slice: &VolatileSlice<'_>, scan: Scan) -> bool {
    let guard = slice.ptr_guard();
    let (ptr, len) = (guard.as_ptr(), slice.len());
    let head = ptr.align_offset(ALIGN).min(len);
    let blocks = (len - head) / BLOCK;
    let tail = head + blocks * BLOCK;
    // SAFETY: the guard keeps `len` bytes from `ptr` readable. `head` bytes, `blocks` blocks from
    // there, and the rest from `tail` on lie inside them; `ptr + head` is aligned to ALIGN unless
    // `blocks` is 0. AVX2 is only chosen where the processor has it.
    unsafe { bytes(ptr, head) && scan(ptr.add(head), blocks) && bytes(ptr.add(tail), len - tail) }
}

/// # Safety
/// `len` bytes from `ptr` are readable.
unsafe fn bytes(ptr: *const u8, len: usize) -> bool {
    // SAFETY: `i` is below `len`.
    (0..len).all(|i| unsafe { ptr.add(i).read_volatile() } == 0)
}

/// # Safety
/// `blocks * BLOCK` bytes from `ptr` are readable, and `ptr` is aligned to [`ALIGN`].
#[cfg(any(test, not(target_arch = "x86_64")))]
unsafe fn words(ptr: *const u8, blocks: usize) -> bool {
    const WORDS: usize = BLOCK / size_of::<u64>();
    let ptr = ptr.cast::<u64>();
    (0..blocks).all(|block| {
        (0..WORDS).fold(0, |all, i| {
            // SAFETY: the word lies in a block below `blocks`; ALIGN aligns u64.
            all | unsafe { ptr.add(block * WORDS + i).read_volatile() }
        }) == 0
    })
}

/// # Safety
/// As for [`words`]; and the processor has SSE2, as every x86-64 does.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
unsafe fn sse2(ptr: *const u8, blocks: usize) -> bool {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
    };
    const VECTORS: usize = BLOCK / size_of::<__m128i>();
    let ptr = ptr.cast::<__m128i>();
    let zero = _mm_setzero_si128();
    for block in 0..blocks {
        let mut all = zero;
        for i in 0..VECTORS {
            // SAFETY: the vector lies in a block below `blocks`; ALIGN aligns it.
            all = _mm_or_si128(all, unsafe { ptr.add(block * VECTORS + i).read_volatile() });
        }
        if _mm_movemask_epi8(_mm_cmpeq_epi8(all, zero)) != 0xffff {
            return false;
        }
    }
    true
}

/// # Safety
/// As for [`words`]; and the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(ptr: *const u8, blocks: usize) -> bool {
    use std::arch::x86_64::{__m256i, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256};
    const VECTORS: usize = BLOCK / size_of::<__m256i>();
    let ptr = ptr.cast::<__m256i>();
    for block in 0..blocks {
        let mut all = _mm256_setzero_si256();
        for i in 0..VECTORS {
            // SAFETY: the vector lies in a block below `blocks`; ALIGN aligns it.
            all = _mm256_or_si256(all, unsafe { ptr.add(block * VECTORS + i).read_volatile() });
        }
        if _mm256_testz_si256(all, all) == 0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn implementations() -> Vec<(&'static str, Scan)> {
        let mut all: Vec<(&str, Scan)> = vec![("words", words)];
        #[cfg(target_arch = "x86_64")]
        {
            all.push(("sse2", sse2));
            if is_x86_feature_detected!("avx2") {
                all.push(("avx2", avx2));
            }
        }
        all
    }

    #[test]
    fn one_bit_anywhere_in_a_page_is_found_by_every_implementation() {
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        let mut page = Box::new(Page([0; 4096]));
        for (name, scan) in implementations() {
            assert!(check(&VolatileSlice::from(&mut page.0[..]), scan), "{name}");
            for i in 0..page.0.len() {
                page.0[i] = 1 << (i % 8);
                let slice = VolatileSlice::from(&mut page.0[..]);
                assert!(!check(&slice, scan), "{name} misses byte {i}");
                assert!(!zero_check(&slice));
                page.0[i] = 0;
            }
        }
        assert!(zero_check(&VolatileSlice::from(&mut page.0[..])));
    }

    #[test]
    fn fetching_changes_nothing_and_needs_no_memory_behind_a_slice() {
        // Of one page, mapped alone: what is behind it cannot be read.
        let region: vm_memory::MmapRegion = vm_memory::MmapRegion::new(4096).unwrap();
        let page = vm_memory::VolatileMemory::as_volatile_slice(&region);
        for (offset, len) in [(0, 0), (0, 4096), (4095, 1), (4096, 0)] {
            fetch_for_zero_check(&page.subslice(offset, len).unwrap());
            assert!(zero_check(&page), "{offset}+{len}");
        }
    }

    proptest! {
        #[test]
        fn every_implementation_agrees_with_the_naive_one(
            mut memory in prop::collection::vec(prop_oneof![300 => Just(0u8), 1 => any::<u8>()], 0..700),
            start in 0usize..64,
            tail in 0usize..64,
        ) {
            let start = start.min(memory.len());
            let end = memory.len().saturating_sub(tail).max(start);
            let expected = memory[start..end].iter().all(|b| *b == 0);
            let slice = VolatileSlice::from(&mut memory[start..end]);
            for (name, scan) in implementations() {
                prop_assert_eq!(check(&slice, scan), expected, "{}", name);
            }
            prop_assert_eq!(zero_check(&slice), expected);
        }
    }
}
