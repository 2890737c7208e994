//! Copying from the cache into the guest, as fast as the size of the flush allows.
//!
//! A small flush is copied with memmove: its pages are in the processor's caches afterwards, where
//! the guest finds them when it resumes. A large one would only push everything else out of them,
//! and pays for it: an ordinary store first reads the line that it overwrites. Streaming stores do
//! not, which makes a large flush up to twice as fast.
#![allow(unsafe_code)] // streaming stores have no safe form

use vm_memory::VolatileSlice;

/// The size of a flush, bytes, from which on streaming stores are used. It exceeds the second-level cache of a
/// core, and is a good part of what cores share.
#[cfg(target_arch = "x86_64")]
const LARGE: u64 = 8 << 20;

/// Makes the copies of one flush on one thread.
#[derive(Debug)]
pub(crate) struct Copier {
    streaming: bool,
}

impl Copier {
    /// For a flush of `bytes` in all.
    pub(crate) fn for_flush(bytes: u64) -> Self {
        #[cfg(target_arch = "x86_64")]
        let streaming = bytes >= LARGE;
        #[cfg(not(target_arch = "x86_64"))]
        let streaming = false;
        Self { streaming }
    }

    /// Copies `from` to `to`, as much as the shorter of them has. What is copied is in place for
    /// other threads once the copier has been dropped and they have synchronised with this thread.
    pub(crate) fn copy(&self, from: &VolatileSlice<'_>, to: &VolatileSlice<'_>) {
        #[cfg(target_arch = "x86_64")]
        if self.streaming && stream::copy(from, to) {
            return;
        }
        // One memmove, as fast as memcpy where nothing overlaps.
        from.copy_to_volatile_slice(*to);
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.streaming {
            stream::fence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod stream {
    use std::arch::x86_64::{
        __m128i, _MM_HINT_NTA, _MM_HINT_T0, _mm_load_si128, _mm_prefetch, _mm_sfence,
        _mm_stream_si128, _mm512_load_si512, _mm512_stream_si512,
    };
    use vm_memory::VolatileSlice;

    /// One cache line, in the units of the SSE2 that every x86-64 has, and one unit of AVX-512.
    const UNITS: usize = 4;
    const LINE: usize = UNITS * size_of::<__m128i>();
    /// How far ahead to read, bytes: enough to hide the memory's latency from one core.
    const AHEAD: usize = 512;
    const AHEAD_WIDE: usize = 1024;

    fn is_wide() -> bool {
        is_x86_feature_detected!("avx512f")
    }

    /// Copies `from` to `to` with streaming stores, to be followed by [`fence`]. `false`, and
    /// nothing copied, unless both are the same number of whole cache lines.
    pub(super) fn copy(from: &VolatileSlice<'_>, to: &VolatileSlice<'_>) -> bool {
        copy_by(from, to, is_wide())
    }

    /// [`copy`] with AVX-512, or with what every processor has.
    pub(super) fn copy_by(from: &VolatileSlice<'_>, to: &VolatileSlice<'_>, wide: bool) -> bool {
        let (from_guard, to_guard) = (from.ptr_guard(), to.ptr_guard_mut());
        let (source, target, len) = (from_guard.as_ptr(), to_guard.as_ptr(), from.len());
        if to.len() != len
            || !len.is_multiple_of(LINE)
            || !source.addr().is_multiple_of(LINE)
            || !target.addr().is_multiple_of(LINE)
        {
            return false;
        }
        // SAFETY: `len` bytes, whole lines, are kept readable at `source` and writable at `target` by
        // the guards, both aligned to LINE; what the processor lacks is not asked of it.
        unsafe {
            if wide && is_wide() {
                copy_lines_wide(source, target, len);
            } else {
                copy_lines(source, target, len);
            }
        }
        true
    }

    /// # Safety
    /// `len` is a multiple of LINE; so many bytes are readable at `source` and writable at `target`,
    /// both aligned to LINE.
    unsafe fn copy_lines(source: *const u8, target: *mut u8, len: usize) {
        for offset in (0..len).step_by(LINE) {
            // SAFETY: by the caller's word; the prefetch dereferences nothing. No reference to either
            // memory exists: a writer beside us changes what is copied, as with vm-memory's own copies.
            unsafe {
                _mm_prefetch::<_MM_HINT_NTA>(source.wrapping_add(offset + AHEAD).cast());
                let source = source.add(offset).cast::<__m128i>();
                let target = target.add(offset).cast::<__m128i>();
                let line: [__m128i; UNITS] =
                    std::array::from_fn(|unit| _mm_load_si128(source.add(unit)));
                for (unit, bytes) in line.into_iter().enumerate() {
                    _mm_stream_si128(target.add(unit), bytes);
                }
            }
        }
    }

    /// # Safety
    /// That of [`copy_lines`], and the processor has AVX-512.
    #[target_feature(enable = "avx512f")]
    unsafe fn copy_lines_wide(source: *const u8, target: *mut u8, len: usize) {
        for offset in (0..len).step_by(LINE) {
            // SAFETY: as in `copy_lines`.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(offset + AHEAD_WIDE).cast());
                let line = _mm512_load_si512(source.add(offset).cast());
                _mm512_stream_si512(target.add(offset).cast(), line);
            }
        }
    }

    /// Orders the streaming stores of this thread before everything it does next, which ordinary
    /// synchronisation takes for granted and they do not do by themselves.
    pub(super) fn fence() {
        // SAFETY: needs SSE, which every x86-64 has, and has no other requirement.
        unsafe { _mm_sfence() }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use vm_memory::{Bytes, MmapRegion, VolatileMemory};

    use super::*;

    #[test]
    fn a_streamed_copy_equals_a_plain_one_and_touches_nothing_else() {
        const LEN: usize = 3 * 4096;
        let pattern: Vec<u8> = (0..LEN).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let source: MmapRegion = MmapRegion::new(LEN).unwrap();
        source.as_volatile_slice().copy_from(&pattern);
        // Whole pages, single lines, and what streaming leaves to memmove.
        for (offset, len) in [
            (0, LEN),
            (4096, 4096),
            (64, 64),
            (64, 0),
            (1, 64),
            (64, 65),
            (7, 999),
        ] {
            type Copy = fn(&VolatileSlice<'_>, &VolatileSlice<'_>);
            let copies: [Copy; 3] = [
                |from, to| Copier::for_flush(0).copy(from, to),
                |from, to| Copier::for_flush(u64::MAX).copy(from, to),
                // What a processor without AVX-512 would do.
                #[cfg(target_arch = "x86_64")]
                |from, to| {
                    if stream::copy_by(from, to, false) {
                        stream::fence();
                    } else {
                        from.copy_to_volatile_slice(*to);
                    }
                },
                #[cfg(not(target_arch = "x86_64"))]
                |from, to| from.copy_to_volatile_slice(*to),
            ];
            let copied = copies.map(|copy| {
                let target: MmapRegion = MmapRegion::new(LEN).unwrap();
                copy(
                    &source.get_slice(offset, len).unwrap(),
                    &target.get_slice(offset, len).unwrap(),
                );
                let mut bytes = vec![0xff; LEN];
                target
                    .as_volatile_slice()
                    .read_slice(&mut bytes, 0)
                    .unwrap();
                bytes
            });
            let mut expected = vec![0; LEN];
            expected[offset..offset + len].copy_from_slice(&pattern[offset..offset + len]);
            assert_eq!(copied[0], expected, "plain, {offset}+{len}");
            assert_eq!(copied[1], expected, "streamed, {offset}+{len}");
            assert_eq!(copied[2], expected, "streamed by SSE2, {offset}+{len}");
        }
    }
}
