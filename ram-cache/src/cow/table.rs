//! What is known of each page of a block, in one atomic word.
//!
//! Channel threads find a place for a page that arrives, while the thread that ends a checkpoint may
//! drop the guest's copy of the same page. Both decide by a single compare-and-swap of the page's
//! word, so that a page is never received behind a copy that is about to go.

use std::fmt;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, Ordering};

/// The guest has a copy of its own of the page.
const PRIVATE: u32 = 1 << 31;
/// The page has been received into the base, behind the guest's own copy.
const LANDED: u32 = 1 << 30;
/// The page has been received as zero.
const ZERO: u32 = 1 << 29;
/// The place in the staging memory that the page has been received into, plus 1; 0 is none.
const SLOT: u32 = ZERO - 1;

/// The number of places that can be told apart.
pub(super) const MAX_SLOTS: u32 = SLOT - 1;

/// What is known of a page.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Entry(u32);

impl Entry {
    /// The guest has a copy of its own.
    pub(super) const fn is_private(self) -> bool {
        self.0 & PRIVATE != 0
    }

    /// The page was received as zero, and that is not in place yet.
    pub(super) const fn is_zero(self) -> bool {
        self.0 & ZERO != 0
    }

    /// Where the page waits.
    pub(super) const fn slot(self) -> Option<u32> {
        (self.0 & SLOT).checked_sub(1)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("private", &self.is_private())
            .field("landed", &(self.0 & LANDED != 0))
            .field("zero", &self.is_zero())
            .field("slot", &self.slot())
            .finish()
    }
}

/// Where a page that arrives is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Into the base: the guest does not look there.
    Base,
    /// Into this place of the staging memory.
    Slot(u32),
    /// Nowhere yet.
    Unknown,
}

/// An entry for each page of a block.
pub(super) struct PageTable(Box<[AtomicU32]>);

impl PageTable {
    /// A table of `pages` pages of which nothing is known; `None` if there is no memory for it.
    pub(super) fn new(pages: usize) -> Option<Self> {
        let mut entries = Vec::new();
        entries.try_reserve_exact(pages).ok()?;
        entries.resize_with(pages, || AtomicU32::new(0));
        Some(Self(entries.into_boxed_slice()))
    }

    /// What is known of a page.
    #[cfg(test)]
    pub(super) fn get(&self, page: usize) -> Entry {
        Entry(self.load(page))
    }

    /// Where the page is to be written that arrives now, in this checkpoint for the first time or
    /// again.
    pub(super) fn find(&self, page: usize) -> Place {
        loop {
            let old = self.load(page);
            let entry = Entry(old);
            let (new, place) = match entry.slot() {
                Some(slot) => (old & !ZERO, Place::Slot(slot)),
                None if entry.is_private() => (PRIVATE | LANDED, Place::Base),
                None => return Place::Unknown,
            };
            if self.replace(page, old, new) {
                return place;
            }
        }
    }

    /// Gives a page that [has no place](Place::Unknown) this one. False if it has come to one
    /// meanwhile: then it is to be looked for again.
    pub(super) fn place(&self, page: usize, slot: u32) -> bool {
        let old = self.load(page);
        !Entry(old).is_private()
            && Entry(old).slot().is_none()
            && slot < MAX_SLOTS
            && self.replace(page, old, slot + 1)
    }

    /// The page arrives as zero. `Base` says that zero is to be written there.
    pub(super) fn zero(&self, page: usize) -> Place {
        loop {
            let old = self.load(page);
            let entry = Entry(old);
            let (new, place) = match entry.slot() {
                None if entry.is_private() => (PRIVATE | LANDED, Place::Base),
                Some(slot) => (old | ZERO, Place::Slot(slot)),
                None => (old | ZERO, Place::Unknown),
            };
            if self.replace(page, old, new) {
                return place;
            }
        }
    }

    /// The guest has a copy of its own of the page, and keeps it.
    pub(super) fn set_private(&self, page: usize) {
        if let Some(entry) = self.0.get(page) {
            entry.fetch_or(PRIVATE, Ordering::AcqRel);
        }
    }

    /// The guest's own copy is about to be dropped. False, and it must stay, if there is none or if
    /// the page has been received behind it.
    pub(super) fn drop_private(&self, page: usize) -> bool {
        self.replace(page, PRIVATE, 0)
    }

    /// What is known of a page whose checkpoint is being put in place: afterwards that is only whether
    /// the guest has a copy. Nobody else is at the page.
    pub(super) fn settle(&self, page: usize) -> Entry {
        let Some(entry) = self.0.get(page) else {
            return Entry(0);
        };
        // Not one step: what has been received was received before, and the next checkpoint has not
        // begun. A locked instruction for each page would show beside the copy of the page.
        let old = entry.load(Ordering::Acquire);
        entry.store(old & PRIVATE, Ordering::Release);
        Entry(old)
    }

    fn load(&self, page: usize) -> u32 {
        self.0
            .get(page)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    fn replace(&self, page: usize, old: u32, new: u32) -> bool {
        self.0.get(page).is_some_and(|entry| {
            entry
                .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        })
    }
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("pages", &self.0.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn a_page_keeps_its_place_for_the_whole_checkpoint() {
        let table = PageTable::new(1).unwrap();
        assert_eq!(table.find(0), Place::Unknown);
        assert!(table.place(0, 7));
        assert!(!table.place(0, 8));
        assert_eq!(table.find(0), Place::Slot(7));
        // Also when it is zero in between, and when the guest writes its own meanwhile.
        assert_eq!(table.zero(0), Place::Slot(7));
        assert!(table.get(0).is_zero());
        table.set_private(0);
        assert_eq!(table.find(0), Place::Slot(7));
        assert!(!table.get(0).is_zero());
        assert!(!table.drop_private(0));
        table.settle(0);
        assert_eq!(table.find(0), Place::Base);
    }

    #[test]
    fn a_page_behind_the_guests_own_goes_into_the_base_and_the_guests_own_stays() {
        let table = PageTable::new(2).unwrap();
        table.set_private(0);
        assert_eq!(table.find(0), Place::Base);
        assert!(!table.drop_private(0));
        table.settle(0);
        assert!(table.drop_private(0));
        assert_eq!(table.find(0), Place::Unknown);
        // Zero before the guest wrote it, and something else afterwards.
        assert_eq!(table.zero(1), Place::Unknown);
        table.set_private(1);
        assert_eq!(table.find(1), Place::Base);
        assert!(!table.get(1).is_zero());
    }

    #[test]
    fn a_page_beyond_the_table_has_no_place() {
        let table = PageTable::new(1).unwrap();
        assert_eq!(table.find(1), Place::Unknown);
        assert!(!table.place(1, 0));
        assert!(!table.place(0, MAX_SLOTS));
        assert!(!table.drop_private(1));
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    #[test]
    fn loom_no_page_is_received_behind_a_copy_that_is_dropped() {
        loom::model(|| {
            let table = Arc::new(PageTable::new(1).unwrap());
            table.set_private(0);
            let channel = {
                let table = Arc::clone(&table);
                thread::spawn(move || match table.find(0) {
                    Place::Unknown => {
                        assert!(table.place(0, 3));
                        Place::Slot(3)
                    }
                    place => place,
                })
            };
            let dropped = table.drop_private(0);
            let place = channel.join().unwrap();
            let expected = if dropped { Place::Slot(3) } else { Place::Base };
            assert_eq!(place, expected);
        });
    }

    #[test]
    fn loom_two_channels_agree_on_a_pages_place_whatever_the_guest_does() {
        loom::model(|| {
            let table = Arc::new(PageTable::new(1).unwrap());
            let channels = [1, 2].map(|slot| {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    loop {
                        match table.find(0) {
                            Place::Unknown if table.place(0, slot) => return Place::Slot(slot),
                            Place::Unknown => thread::yield_now(),
                            place => return place,
                        }
                    }
                })
            });
            table.set_private(0);
            let [first, second] = channels.map(|channel| channel.join().unwrap());
            assert_eq!(first, second);
            assert!(table.get(0).is_private());
        });
    }
}
