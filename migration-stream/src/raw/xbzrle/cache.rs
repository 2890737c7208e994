//! The source's copies of pages that it has sent.

use std::fmt;

use super::{PAGE, PageBytes};
use crate::PAGE_SIZE;
use crate::raw::ram::PageAddress;

/// A page stays for this many rounds before another may take its place.
const PROTECTED_ROUNDS: u64 = 2;

/// Copies of pages, one place for each page number: a page that is wanted where another one is has
/// to wait until that one is old. Memory is taken as pages come, up to the size given.
pub struct PageCache {
    slots: Vec<Option<Slot>>,
    round: u64,
}

struct Slot {
    page: PageAddress,
    used: u64,
    bytes: Box<PageBytes>,
}

/// What the cache has for a page.
#[derive(Debug)]
pub enum Lookup<'a> {
    /// What was sent of it last, to be replaced by what is sent now.
    Hit(&'a mut PageBytes),
    /// Nothing; if it could be given a place, `true`.
    Miss {
        /// Whether the page is in the cache from now on.
        inserted: bool,
    },
}

impl PageCache {
    /// QEMU's default of `xbzrle-cache-size`, bytes.
    pub const DEFAULT_SIZE: u64 = 64 << 20;

    /// An empty cache of at most `size` bytes of pages.
    ///
    /// # Errors
    /// `size` is no power of two or less than a page, as QEMU has it, or no memory's.
    pub fn new(size: u64) -> Result<Self, CacheSizeError> {
        let error = CacheSizeError { size };
        if !size.is_power_of_two() || size < PAGE_SIZE {
            return Err(error);
        }
        let count = usize::try_from(size / PAGE_SIZE).map_err(|_| error)?;
        let mut slots = Vec::new();
        slots.try_reserve_exact(count).map_err(|_| error)?;
        slots.resize_with(count, || None);
        Ok(Self { slots, round: 0 })
    }

    /// Its size when it is full, bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        (self.slots.len() * PAGE) as u64
    }

    /// A new round over guest memory, or a new checkpoint, begins: every page is one older.
    pub const fn begin_round(&mut self) {
        self.round += 1;
    }

    /// What is known of `page`, which is going to be sent with the bytes `now`. Where it is not
    /// known yet and there is a place for it, `now` is what is known from here on.
    pub fn lookup(&mut self, page: PageAddress, now: &PageBytes) -> Lookup<'_> {
        let round = self.round;
        let index = self.index(page);
        let Some(slot) = self.slots.get_mut(index) else {
            return Lookup::Miss { inserted: false };
        };
        let old_enough = |slot: &Slot| slot.used + PROTECTED_ROUNDS <= round;
        match slot {
            Some(slot) if slot.page != page && !old_enough(slot) => {
                Lookup::Miss { inserted: false }
            }
            Some(slot) if slot.page != page => {
                slot.page = page;
                slot.used = round;
                *slot.bytes = *now;
                Lookup::Miss { inserted: true }
            }
            Some(slot) => {
                slot.used = round;
                Lookup::Hit(&mut slot.bytes)
            }
            None => {
                *slot = Some(Slot {
                    page,
                    used: round,
                    bytes: Box::new(*now),
                });
                Lookup::Miss { inserted: true }
            }
        }
    }

    fn index(&self, page: PageAddress) -> usize {
        // Blocks begin at different places of the cache, so that two small ones do not collide.
        let block = (page.block.index() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let number = (page.offset / PAGE_SIZE).wrapping_add(block);
        #[allow(clippy::cast_possible_truncation)] // less than the number of slots, a power of two
        let index = (number & (self.slots.len() as u64 - 1)) as usize;
        index
    }
}

impl fmt::Debug for PageCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageCache")
            .field("size", &self.size())
            .field("round", &self.round)
            .finish_non_exhaustive()
    }
}

/// A cache of a size that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("xbzrle cache of {size} bytes, expected a power of two of at least {PAGE_SIZE}")]
pub struct CacheSizeError {
    /// The size asked for, bytes.
    pub size: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::BlockId;

    fn page(number: u64) -> PageAddress {
        PageAddress {
            block: BlockId::new(0),
            offset: number * PAGE_SIZE,
        }
    }

    fn miss(cache: &mut PageCache, number: u64, fill: u8) -> bool {
        match cache.lookup(page(number), &[fill; PAGE]) {
            Lookup::Miss { inserted } => inserted,
            Lookup::Hit(_) => panic!("page {number} is there"),
        }
    }

    fn hit(cache: &mut PageCache, number: u64) -> u8 {
        match cache.lookup(page(number), &[0xff; PAGE]) {
            Lookup::Hit(bytes) => bytes[0],
            Lookup::Miss { .. } => panic!("page {number} is not there"),
        }
    }

    #[test]
    fn a_page_is_known_by_what_was_sent_of_it() {
        let mut cache = PageCache::new(8 * PAGE_SIZE).unwrap();
        assert!(miss(&mut cache, 3, 1));
        assert_eq!(hit(&mut cache, 3), 1);
        assert!(miss(&mut cache, 4, 2));
        assert_eq!(hit(&mut cache, 3), 1);
        let other_block = PageAddress {
            block: BlockId::new(1),
            ..page(3)
        };
        assert!(matches!(
            cache.lookup(other_block, &[0; PAGE]),
            Lookup::Miss { .. }
        ));
    }

    #[test]
    fn a_page_gives_way_when_two_rounds_did_not_use_it() {
        let mut cache = PageCache::new(8 * PAGE_SIZE).unwrap();
        assert!(miss(&mut cache, 3, 1));
        assert!(!miss(&mut cache, 11, 2));
        cache.begin_round();
        assert!(!miss(&mut cache, 11, 2));
        assert_eq!(hit(&mut cache, 3), 1);
        cache.begin_round();
        assert!(!miss(&mut cache, 11, 2));
        cache.begin_round();
        assert!(miss(&mut cache, 11, 2));
        assert_eq!(hit(&mut cache, 11), 2);
    }

    #[test]
    fn sizes_that_qemu_refuses_are_refused() {
        for size in [0, 1, 2048, 3 * 4096, u64::MAX] {
            assert_eq!(
                PageCache::new(size).unwrap_err(),
                CacheSizeError { size },
                "{size}"
            );
        }
        assert_eq!(PageCache::new(4096).unwrap().size(), 4096);
    }
}
