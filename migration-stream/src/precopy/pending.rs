//! The pages still to be sent: one bit a page, scanned by words.

use bitvec::order::Lsb0;
use bitvec::vec::BitVec;

use crate::PAGE_SIZE;
use crate::ram::{BlockId, RamBlockTable};

/// A run of pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The block.
    pub block: BlockId,
    /// Index of the first page in the block.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
}

#[cfg(feature = "staged")]
impl PageRun {
    /// Where it lies in the block, and how long it is, bytes.
    pub fn bytes(self) -> (u64, usize) {
        let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE);
        let len = usize::try_from(bytes(self.pages)).unwrap_or(usize::MAX);
        (bytes(self.first), len)
    }
}

/// Which pages of which block are still to be sent, and where the scan stands.
///
/// Bit `i` of a block's map is its page `i`. Bits beyond a block's end are never set.
#[derive(Clone, Debug)]
pub struct PendingPages {
    blocks: Vec<BitVec<u64, Lsb0>>,
    count: u64,
    /// Next place to look: block index, page.
    cursor: (usize, usize),
}

impl PendingPages {
    /// Every page of every block that is migrated: what a migration begins with.
    #[must_use]
    pub fn all(table: &RamBlockTable) -> Self {
        Self {
            count: table.migrated_bytes() / PAGE_SIZE,
            ..Self::each(table, true)
        }
    }

    /// No page yet.
    #[must_use]
    pub fn none(table: &RamBlockTable) -> Self {
        Self::each(table, false)
    }

    fn each(table: &RamBlockTable, pending: bool) -> Self {
        let blocks = table
            .iter()
            .map(|(id, b)| {
                // Where there are no bits nothing becomes pending: so for an ignored block.
                let pages = if table.is_ignored(id) { 0 } else { b.pages() };
                BitVec::repeat(pending, usize::try_from(pages).unwrap_or(usize::MAX))
            })
            .collect();
        Self {
            blocks,
            count: 0,
            cursor: (0, 0),
        }
    }

    /// How many pages are pending.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Adds 64 pages' worth of dirty bits, bit `i` being page `first_page + i`, and returns how many
    /// were not pending before. Bits beyond the block's end, or of no block, are dropped: a
    /// hypervisor rounds its log up to whole words.
    pub fn or_word(&mut self, block: BlockId, first_page: u64, word: u64) -> u64 {
        let Some(map) = self.blocks.get_mut(block.index()) else {
            return 0;
        };
        let (Ok(first), len) = (usize::try_from(first_page), map.len()) else {
            return 0;
        };
        if first >= len || first % 64 != 0 {
            return 0;
        }
        let mask = if len - first >= 64 {
            u64::MAX
        } else {
            (1 << (len - first)) - 1
        };
        let slot = &mut map.as_raw_mut_slice()[first / 64];
        let new = word & mask & !*slot;
        *slot |= new;
        let added = u64::from(new.count_ones());
        self.count += added;
        added
    }

    /// Takes the next run of at most `max` pending pages, going on where the last one ended and
    /// wrapping around once; `None` when nothing is pending.
    pub fn take_run(&mut self, max: u64) -> Option<PageRun> {
        self.take_run_but(max, |_, _| 0)
    }

    /// As [`PendingPages::take_run`], without the pages for which `but(block, index)` has a bit in the
    /// `index`-th word of a block's map; `None` when nothing else is pending.
    pub fn take_run_but(&mut self, max: u64, but: impl Fn(usize, usize) -> u64) -> Option<PageRun> {
        if self.count == 0 || max == 0 {
            return None;
        }
        // One more than the number of blocks: the first is looked at again from its beginning.
        for _ in 0..=self.blocks.len() {
            let (index, from) = self.cursor;
            let map = self.blocks.get_mut(index)?;
            let words = map.as_raw_slice();
            let word = |at: usize| words.get(at).map(|word| word & !but(index, at));
            if let Some(first) = next_one(word, from, map.len()) {
                let limit = map
                    .len()
                    .min(first.saturating_add(usize::try_from(max).unwrap_or(usize::MAX)));
                let end = next_zero(word, first, limit);
                clear(map.as_raw_mut_slice(), first, end);
                let pages = (end - first) as u64;
                self.count -= pages;
                self.cursor = (index, end);
                let block = BlockId::new(u32::try_from(index).ok()?);
                return Some(PageRun {
                    block,
                    first: first as u64,
                    pages,
                });
            }
            self.cursor = ((index + 1) % self.blocks.len(), 0);
        }
        None
    }
}

/// The first set bit in `from .. end`.
fn next_one(words: impl Fn(usize) -> Option<u64>, from: usize, end: usize) -> Option<usize> {
    if from >= end {
        return None;
    }
    let mut index = from / 64;
    let mut word = words(index)? & (u64::MAX << (from % 64));
    while word == 0 {
        index += 1;
        if index * 64 >= end {
            return None;
        }
        word = words(index)?;
    }
    Some(index * 64 + word.trailing_zeros() as usize).filter(|bit| *bit < end)
}

/// The first clear bit in `from .. end`, `end` if there is none.
fn next_zero(words: impl Fn(usize) -> Option<u64>, from: usize, end: usize) -> usize {
    let mut index = from / 64;
    let mut mask = u64::MAX << (from % 64);
    while index * 64 < end {
        let Some(word) = words(index) else { break };
        let zeros = !word & mask;
        if zeros != 0 {
            return end.min(index * 64 + zeros.trailing_zeros() as usize);
        }
        mask = u64::MAX;
        index += 1;
    }
    end
}

/// Clears the bits `from .. end`.
fn clear(words: &mut [u64], from: usize, end: usize) {
    let mut bit = from;
    while bit < end {
        let upto = end.min((bit / 64 + 1) * 64);
        let ones = if upto - bit == 64 {
            u64::MAX
        } else {
            ((1 << (upto - bit)) - 1) << (bit % 64)
        };
        if let Some(word) = words.get_mut(bit / 64) {
            *word &= !ones;
        }
        bit = upto;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::PAGE_SIZE;
    use crate::ram::RamBlock;

    fn table(pages: &[u64]) -> RamBlockTable {
        RamBlockTable::new(
            pages
                .iter()
                .enumerate()
                .map(|(i, p)| RamBlock::new(format!("b{i}"), p * PAGE_SIZE).unwrap())
                .collect(),
        )
        .unwrap()
    }

    fn drain(pending: &mut PendingPages, max: u64) -> Vec<(usize, u64)> {
        let mut out = Vec::new();
        while let Some(run) = pending.take_run(max) {
            assert!(run.pages >= 1 && run.pages <= max);
            out.extend((run.first..run.first + run.pages).map(|p| (run.block.index(), p)));
        }
        out
    }

    #[test]
    fn a_migration_begins_with_every_page_once_and_in_order() {
        let mut pending = PendingPages::all(&table(&[70, 1, 128]));
        assert_eq!(pending.count(), 199);
        let pages = drain(&mut pending, 64);
        assert_eq!(pages.len(), 199);
        assert!(pages.is_sorted());
        assert_eq!(pending.count(), 0);
    }

    #[test]
    fn a_migration_of_what_arrives_begins_with_nothing_and_takes_what_is_reported() {
        let mut pending = PendingPages::none(&table(&[70, 1]));
        assert_eq!(pending.count(), 0);
        assert_eq!(pending.take_run(64), None);
        assert_eq!(pending.or_word(BlockId::new(0), 64, u64::MAX), 6);
        assert_eq!(pending.or_word(BlockId::new(1), 0, 1), 1);
        assert_eq!(drain(&mut pending, 64).len(), 7);
    }

    #[test]
    fn pages_of_an_ignored_block_are_never_pending() {
        let blocks = vec![
            RamBlock::new("shared", 70 * PAGE_SIZE).unwrap().shared(),
            RamBlock::new("own", 3 * PAGE_SIZE).unwrap(),
        ];
        let blocks = RamBlockTable::new(blocks).unwrap();
        assert_eq!(PendingPages::all(&blocks).count(), 73);
        let mut pending = PendingPages::all(&blocks.ignoring_shared());
        assert_eq!(pending.count(), 3);
        assert_eq!(pending.or_word(BlockId::new(0), 0, u64::MAX), 0);
        assert_eq!(drain(&mut pending, 1000), [(1, 0), (1, 1), (1, 2)]);
    }

    #[test]
    fn bits_beyond_the_block_are_dropped() {
        let mut pending = PendingPages::all(&table(&[70]));
        drain(&mut pending, 1000);
        assert_eq!(pending.or_word(BlockId::new(0), 64, u64::MAX), 6);
        assert_eq!(pending.or_word(BlockId::new(0), 128, u64::MAX), 0);
        assert_eq!(pending.or_word(BlockId::new(3), 0, u64::MAX), 0);
        assert_eq!(pending.count(), 6);
    }

    proptest! {
        #[test]
        fn runs_are_what_a_set_of_pages_would_give(
            sizes in prop::collection::vec(1u64..300, 1..4),
            words in prop::collection::vec((0usize..4, 0u64..6, any::<u64>()), 0..20),
            max in 1u64..200,
            taken in 0usize..10,
        ) {
            let mut pending = PendingPages::all(&table(&sizes));
            drain(&mut pending, 1000);
            let mut model = BTreeSet::new();
            for (i, (block, word_index, word)) in words.iter().enumerate() {
                let id = BlockId::new(u32::try_from(*block).unwrap());
                pending.or_word(id, word_index * 64, *word);
                for bit in 0..64 {
                    let page = word_index * 64 + bit;
                    if word >> bit & 1 == 1 && sizes.get(*block).is_some_and(|s| page < *s) {
                        model.insert((*block, page));
                    }
                }
                if i == taken && let Some(run) = pending.take_run(max) {
                    for p in run.first..run.first + run.pages {
                        prop_assert!(model.remove(&(run.block.index(), p)));
                    }
                }
                prop_assert_eq!(pending.count(), model.len() as u64);
            }
            let rest: BTreeSet<_> = drain(&mut pending, max).into_iter().collect();
            prop_assert_eq!(rest, model);
        }
    }
}
