//! Sets of pages.

use std::ops::Range;

use rangemap::RangeSet;

/// Pages of one block, as ranges: what a stream sends in its order takes nothing up, and what it
/// sends again was there already, so that the set does not grow with memory.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    /// The range that grows at its end.
    growing: Range<u64>,
    others: RangeSet<u64>,
}

impl PageSet {
    /// Adds pages `first .. first + count`.
    pub fn insert(&mut self, first: u64, count: u64) {
        let end = first.saturating_add(count);
        if first == self.growing.end && !self.growing.is_empty() {
            self.growing.end = end;
        } else if first < end && !(self.growing.contains(&first) && end <= self.growing.end) {
            let grown = std::mem::replace(&mut self.growing, first..end);
            if !grown.is_empty() {
                self.others.insert(grown);
            }
        }
    }

    /// Adds the pages of another set.
    pub fn extend(&mut self, other: &Self) {
        for range in other.others.iter().chain([&other.growing]) {
            self.insert(range.start, range.end - range.start);
        }
    }

    /// Whether a page is in it.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.growing.contains(&page) || self.others.contains(&page)
    }

    /// How many pages are in it.
    #[must_use]
    pub fn len(&self) -> u64 {
        let length = |range: &Range<u64>| range.end - range.start;
        let others: u64 = self.others.iter().map(length).sum();
        let shared: u64 = self
            .others
            .overlapping(&self.growing)
            .map(|r| r.end.min(self.growing.end) - r.start.max(self.growing.start))
            .sum();
        others + length(&self.growing) - shared
    }

    /// Whether no page is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.growing.is_empty() && self.others.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_page_counts_once() {
        let mut set = PageSet::default();
        let mut pages = HashSet::new();
        assert!(set.is_empty());
        // Forwards, again, back into the middle, and by steps that meet.
        let runs = [(0, 5), (5, 3), (2, 2), (20, 4), (10, 5), (15, 5), (3, 30)];
        for (first, count) in runs {
            set.insert(first, count);
            pages.extend(first..first + count);
            assert_eq!(set.len(), pages.len() as u64, "{first}+{count}");
        }
        for page in 0..50 {
            assert_eq!(set.contains(page), pages.contains(&page), "page {page}");
        }
        assert!(!set.is_empty());
        let mut sum = PageSet::default();
        sum.insert(90, 10);
        sum.extend(&set);
        assert_eq!(sum.len(), pages.len() as u64 + 10);
    }
}
