//! Memory in which received pages wait for the end of their checkpoint.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::table::MAX_SLOTS;
use crate::PAGE_BYTES;
use crate::error::CacheError;
use crate::mapping;

/// Places beyond one for each page: two channels that receive the same page at once take two.
const SPARE: usize = 4096;

/// Places for pages, given out in ascending order. Only those that were used take memory, and the
/// next checkpoint uses the same ones again.
#[derive(Debug)]
pub(super) struct Staging {
    arena: MmapRegion,
    slots: u32,
    next: AtomicU32,
    /// Places that may have memory.
    touched: AtomicUsize,
    /// Places that the last checkpoint used.
    used_before: AtomicUsize,
}

impl Staging {
    /// Returns a staging area for `pages` pages of RAM.
    pub(super) fn new(pages: usize) -> Result<Self, CacheError> {
        let slots = u32::try_from(pages.saturating_add(SPARE))
            .unwrap_or(MAX_SLOTS)
            .min(MAX_SLOTS);
        let len = (slots as usize).saturating_mul(PAGE_BYTES);
        let arena = mapping::anonymous_unreserved(len)
            .map_err(|source| CacheError::Staging { len, source })?;
        mapping::exclude_from_core_dumps(&arena).map_err(|source| CacheError::CoreDump {
            name: "staging".into(),
            source,
        })?;
        Ok(Self {
            arena,
            slots,
            next: AtomicU32::new(0),
            touched: AtomicUsize::new(0),
            used_before: AtomicUsize::new(0),
        })
    }

    /// The first of `count` places in a row, or of fewer when there are no more.
    pub(super) fn take(&self, count: usize) -> Result<(u32, usize), CacheError> {
        let wanted = u32::try_from(count).unwrap_or(u32::MAX);
        // `Relaxed`: that no place is given out twice does not depend on other memory.
        let before = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                (next < self.slots).then(|| next.saturating_add(wanted).min(self.slots))
            })
            .map_err(|_| CacheError::StagingFull { pages: self.slots })?;
        Ok((before, count.min((self.slots - before) as usize)))
    }

    /// The memory of `pages` places in a row.
    pub(super) fn slice(&self, slot: u32, pages: usize) -> Result<VolatileSlice<'_>, CacheError> {
        self.arena
            .get_slice(slot as usize * PAGE_BYTES, pages * PAGE_BYTES)
            .map_err(|_| CacheError::StagingFull { pages: self.slots })
    }

    /// Frees all places. Memory is kept for as many as the last two checkpoints have used; what is
    /// beyond that is given back.
    pub(super) fn clear(&self) -> Result<(), CacheError> {
        let used = self.next.swap(0, Ordering::Relaxed) as usize;
        let keep = used.max(self.used_before.swap(used, Ordering::Relaxed));
        let touched = self.touched.load(Ordering::Relaxed).max(used);
        if touched > keep {
            let (offset, len) = (keep * PAGE_BYTES, (touched - keep) * PAGE_BYTES);
            mapping::drop_own_pages(&self.arena, offset, len).map_err(|source| {
                CacheError::Discard {
                    name: "staging".into(),
                    source,
                }
            })?;
        }
        self.touched.store(keep, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn places_follow_each_other_until_there_are_no_more() {
        let staging = Staging::new(0).unwrap();
        assert_eq!(staging.take(1).unwrap(), (0, 1));
        assert_eq!(staging.take(4000).unwrap(), (1, 4000));
        assert_eq!(staging.take(1000).unwrap(), (4001, 95));
        assert!(matches!(
            staging.take(1),
            Err(CacheError::StagingFull { pages: 4096 })
        ));
        staging.clear().unwrap();
        assert_eq!(staging.take(1).unwrap(), (0, 1));
    }

    #[test]
    fn memory_is_kept_for_the_larger_of_the_last_two_checkpoints() {
        let staging = Staging::new(64).unwrap();
        let checkpoint = |pages: usize| {
            let (slot, taken) = staging.take(pages).unwrap();
            assert_eq!((slot, taken), (0, pages));
            staging
                .slice(slot, pages)
                .unwrap()
                .copy_from(&vec![1u8; pages * PAGE_BYTES]);
            staging.clear().unwrap();
        };
        let kept = || {
            (0..64)
                .take_while(|&slot| {
                    let mut byte = [0u8];
                    staging.slice(slot, 1).unwrap().copy_to(&mut byte);
                    byte == [1]
                })
                .count()
        };
        checkpoint(50);
        checkpoint(10);
        assert_eq!(kept(), 50);
        checkpoint(20);
        assert_eq!(kept(), 20);
    }
}
