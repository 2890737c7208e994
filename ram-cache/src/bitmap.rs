//! The dirty bitmap of one RAM block: set by many channel threads, drained by words.
//!
//! A bit of a second level, the *groups*, stands for each word that may have a bit: what is clean is passed
//! over by 4096 pages at a time.
//!
//! # Orderings
//! * Setting a bit is a `fetch_or`, draining is a `swap(0)`, of which the one is ordered ([`Release`])
//!   before the other ([`Acquire`]): whoever takes a bit out also sees everything the setter wrote
//!   *before* it set the bit. That is what a log of finished writes needs (write, then set; drain, then
//!   read).
//! * Read-modify-writes of one word are totally ordered whatever their ordering, so a bit set while
//!   a drain is under way is either in the drained word or still in the bitmap. None is lost and
//!   none is seen twice. For the same reason a setter never skips the `fetch_or` when it sees the
//!   bit set already: the drain could take it out in between.
//! * A setter sets the group's bit after the word, unless it is set; a drain clears it before it empties
//!   the word. Were a setter to see the bit that a drain has cleared already, its `fetch_or` would have
//!   to come before that drain's `swap`, which then takes what it has set. Where it comes behind, it is
//!   ordered behind the drain's clearing as well, because `swap` releases and `fetch_or` acquires. So a
//!   word with a bit that a thread may know of is never passed over by that thread. The group's bit of a
//!   word without any may be set.
//! * Setting is a `fetch_or` even where a word becomes all ones: a plain store would end the
//!   release sequence of the other setters of that word, and the drain would no longer be ordered
//!   after them.
//! * [`DirtyBitmap::count`], [`DirtyBitmap::test`] and [`DirtyBitmap::snapshot`] only look, with
//!   `Relaxed`: they are exact when the caller has already ordered the setters before itself (a
//!   join, a lock, a channel's sync point) and an estimate otherwise.
//!
//! [`Release`]: std::sync::atomic::Ordering::Release
//! [`Acquire`]: std::sync::atomic::Ordering::Acquire

use std::fmt;
use std::ops::Range;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in one word of the bitmap.
pub const PAGES_PER_WORD: u64 = WORD_BITS as u64;

/// [`PAGES_PER_WORD`] as memory counts them.
pub(crate) const WORD_BITS: usize = u64::BITS as usize;

/// One bit per page of a RAM block, safe to set and to drain from any number of threads.
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    /// One bit per word.
    groups: Box<[AtomicU64]>,
    pages: usize,
}

/// A run of consecutive pages, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Index of the first page in its block.
    pub first_page: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
}

impl DirtyBitmap {
    /// A bitmap for a block of `pages` pages, all clean.
    ///
    /// # Errors
    /// There is no memory for it: one bit per page.
    pub fn new(pages: u64) -> Result<Self, BitmapError> {
        let no_memory = || BitmapError::NoMemory { pages };
        let pages_here = usize::try_from(pages).map_err(|_| no_memory())?;
        let clean = |count| {
            let mut words = Vec::new();
            words.try_reserve_exact(count).map_err(|_| no_memory())?;
            words.resize_with(count, || AtomicU64::new(0));
            Ok(words.into_boxed_slice())
        };
        let count = pages_here.div_ceil(WORD_BITS);
        Ok(Self {
            words: clean(count)?,
            groups: clean(count.div_ceil(WORD_BITS))?,
            pages: pages_here,
        })
    }

    /// Number of pages in the block.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages as u64
    }

    /// Marks one page.
    ///
    /// # Errors
    /// The block has no such page.
    pub fn set(&self, page: u64) -> Result<(), BitmapError> {
        self.set_range(page, 1)
    }

    /// Marks `pages` pages from `first_page` on, one atomic operation per word touched. A range of
    /// no pages marks nothing.
    ///
    /// # Errors
    /// The range does not lie in the block; then nothing is marked.
    pub fn set_range(&self, first_page: u64, pages: u64) -> Result<(), BitmapError> {
        let Range { start, end } = self.checked(first_page, pages)?;
        if start == end {
            return Ok(());
        }
        let (first, last) = (start / WORD_BITS, (end - 1) / WORD_BITS);
        let head = u64::MAX << (start % WORD_BITS);
        let tail = u64::MAX >> (WORD_BITS - 1 - (end - 1) % WORD_BITS);
        for index in first..=last {
            let mut mask = u64::MAX;
            if index == first {
                mask &= head;
            }
            if index == last {
                mask &= tail;
            }
            self.mark(index, mask);
        }
        Ok(())
    }

    /// Marks 64 pages at once: bit `i` of `word` is page `first_page + i`, the form in which KVM's
    /// dirty log reports them.
    ///
    /// # Errors
    /// `first_page` is not a multiple of 64, or a set bit is beyond the block; then nothing is
    /// marked.
    pub fn or_word(&self, first_page: u64, word: u64) -> Result<(), BitmapError> {
        if !first_page.is_multiple_of(PAGES_PER_WORD) {
            return Err(BitmapError::Unaligned { first_page });
        }
        if word == 0 {
            return Ok(());
        }
        let reach = PAGES_PER_WORD - u64::from(word.leading_zeros());
        let Range { start, .. } = self.checked(first_page, reach)?;
        self.mark(start / WORD_BITS, word);
        Ok(())
    }

    /// Marks pages of one word, which the bitmap has.
    fn mark(&self, index: usize, mask: u64) {
        self.words[index].fetch_or(mask, Ordering::AcqRel);
        let (group, bit) = (&self.groups[index / WORD_BITS], 1 << (index % WORD_BITS));
        if group.load(Ordering::Relaxed) & bit == 0 {
            group.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Whether a page is marked.
    ///
    /// # Errors
    /// The block has no such page.
    pub fn test(&self, page: u64) -> Result<bool, BitmapError> {
        let Range { start, .. } = self.checked(page, 1)?;
        let word = self.words[start / WORD_BITS].load(Ordering::Relaxed);
        Ok(word >> (start % WORD_BITS) & 1 == 1)
    }

    /// Number of marked pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        Self::marked_words(&[self], 0..self.words.len())
            .map(|word| u64::from(self.word(word).count_ones()))
            .sum()
    }

    /// A copy of the words, nothing cleared: bit `i` of word `w` is page `64 * w + i`. Bits beyond
    /// the block are zero.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u64> {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect()
    }

    /// Takes the marked pages out of the bitmap, as maximal runs in ascending order.
    ///
    /// The pages of a run are clear in the bitmap by the time the run is returned. A page marked
    /// meanwhile is returned if the scan has yet to reach it and stays marked otherwise. Dropping
    /// the iterator early leaves the pages it has not returned marked.
    #[must_use]
    pub fn drain_runs(&self) -> DrainRuns<'_> {
        self.drain_words(0..self.words.len())
    }

    /// As [`DirtyBitmap::drain_runs`] for a range of words, clipped to the bitmap. Runs end with
    /// the range.
    pub(crate) fn drain_words(&self, words: Range<usize>) -> DrainRuns<'_> {
        let end = words.end.min(self.words.len());
        DrainRuns {
            bitmap: self,
            end,
            next: words.start.min(end),
            bits: 0,
        }
    }

    /// Those of a range of words in which one of some bitmaps of one block may have a mark, in ascending
    /// order.
    pub(crate) fn marked_words(
        bitmaps: &[&Self],
        words: Range<usize>,
    ) -> impl Iterator<Item = usize> {
        let mut next = words.start;
        std::iter::from_fn(move || {
            let word = Self::next_marked(bitmaps, next..words.end)?;
            next = word + 1;
            Some(word)
        })
    }

    /// The first of them.
    fn next_marked(bitmaps: &[&Self], words: Range<usize>) -> Option<usize> {
        let groups = words.start / WORD_BITS..words.end.div_ceil(WORD_BITS);
        let mut wanted = u64::MAX << (words.start % WORD_BITS);
        for group in groups {
            let of = |bitmap: &Self| Some(bitmap.groups.get(group)?.load(Ordering::Relaxed));
            let marked = bitmaps
                .iter()
                .fold(0, |sum, bitmap| sum | of(bitmap).unwrap_or(0));
            if marked & wanted != 0 {
                let word = group * WORD_BITS + (marked & wanted).trailing_zeros() as usize;
                return (word < words.end).then_some(word);
            }
            wanted = u64::MAX;
        }
        None
    }

    /// Number of words.
    pub(crate) fn word_count(&self) -> usize {
        self.words.len()
    }

    /// The marks of the 64 pages of a word, as an estimate while others set them; 0 beyond the end.
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Takes the marks of a word out of the bitmap; see [`DirtyBitmap::drain_runs`].
    pub(crate) fn take_word(&self, index: usize) -> u64 {
        let Some(word) = self.words.get(index) else {
            return 0;
        };
        let (group, bit) = (&self.groups[index / WORD_BITS], 1 << (index % WORD_BITS));
        // Most words are clean: looking first keeps their cache lines shared and a scan free of locked
        // instructions. A mark set just after the look stays in the bitmap.
        if word.load(Ordering::Relaxed) == 0 && group.load(Ordering::Relaxed) & bit == 0 {
            return 0;
        }
        group.fetch_and(!bit, Ordering::Relaxed);
        word.swap(0, Ordering::AcqRel)
    }

    /// Clears those marks of a word that are in `mask`.
    pub(crate) fn clear(&self, index: usize, mask: u64) {
        if let Some(word) = self.words.get(index) {
            // `AcqRel` keeps the order of the setters whose marks stay.
            word.fetch_and(!mask, Ordering::AcqRel);
        }
    }

    /// Cuts the bitmap into ranges of words with about `pages` marked pages each: at least as many,
    /// at most 63 more, except that the last has what is left. Words without a marked page may be
    /// in any range or in none.
    pub(crate) fn shares(&self, pages: u64) -> Vec<Range<usize>> {
        let mut shares = Vec::new();
        let (mut start, mut marked) = (0, 0);
        for index in Self::marked_words(&[self], 0..self.words.len()) {
            marked += u64::from(self.word(index).count_ones());
            if marked >= pages.max(1) {
                shares.push(start..index + 1);
                (start, marked) = (index + 1, 0);
            }
        }
        if marked > 0 {
            shares.push(start..self.words.len());
        }
        shares
    }

    /// The pages `first_page .. first_page + pages`, when they lie in the block.
    fn checked(&self, first_page: u64, pages: u64) -> Result<Range<usize>, BitmapError> {
        let outside = || BitmapError::OutOfBlock {
            first_page,
            pages,
            block_pages: self.pages(),
        };
        let start = usize::try_from(first_page).map_err(|_| outside())?;
        let count = usize::try_from(pages).map_err(|_| outside())?;
        match start.checked_add(count) {
            Some(end) if end <= self.pages => Ok(start..end),
            _ => Err(outside()),
        }
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("pages", &self.pages)
            .field("dirty", &self.count())
            .finish()
    }
}

/// The runs of a bitmap, taken out of it as they are returned; see [`DirtyBitmap::drain_runs`].
#[derive(Debug)]
pub struct DrainRuns<'a> {
    bitmap: &'a DirtyBitmap,
    /// The end of the drained range of words.
    end: usize,
    /// The next word to take.
    next: usize,
    /// Bits of word `next - 1` that were taken and not yet returned.
    bits: u64,
}

impl DrainRuns<'_> {
    /// Empties a word into `bits`.
    fn take_word(&mut self, index: usize) {
        self.next = index + 1;
        self.bits = self.bitmap.take_word(index);
    }

    /// The runs as ranges of pages.
    pub(crate) fn pages(mut self) -> impl Iterator<Item = Range<usize>> {
        std::iter::from_fn(move || self.next_pages())
    }

    /// The pages of the next run.
    pub(crate) fn next_pages(&mut self) -> Option<Range<usize>> {
        while self.bits == 0 {
            match DirtyBitmap::next_marked(&[self.bitmap], self.next..self.end) {
                Some(index) => self.take_word(index),
                None => {
                    self.next = self.end;
                    return None;
                }
            }
        }
        let skip = self.bits.trailing_zeros() as usize;
        let first = (self.next - 1) * WORD_BITS + skip;
        let mut ones = (self.bits >> skip).trailing_ones() as usize;
        let mut end = first + ones;
        self.bits = clear_low(self.bits, skip + ones);
        // A run that fills its word to the top may go on in the next one.
        let mut filled = skip + ones == WORD_BITS;
        while filled && self.next < self.end {
            self.take_word(self.next);
            ones = self.bits.trailing_ones() as usize;
            end += ones;
            self.bits = clear_low(self.bits, ones);
            filled = ones == WORD_BITS;
        }
        Some(first..end)
    }
}

impl Iterator for DrainRuns<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        self.next_pages().map(|pages| PageRun {
            first_page: pages.start as u64,
            pages: pages.len() as u64,
        })
    }
}

impl Drop for DrainRuns<'_> {
    fn drop(&mut self) {
        if self.bits != 0 {
            // The swap that took these bits out was ordered after their setters' writes, so whoever
            // takes them next is too.
            self.bitmap.mark(self.next - 1, self.bits);
        }
    }
}

/// The set bits of a word, in ascending order.
pub(crate) fn bits_of(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize);
        word &= word.wrapping_sub(1);
        bit
    })
}

/// Whether a bit of a word is set.
pub(crate) const fn has(word: u64, bit: usize) -> bool {
    word >> bit & 1 != 0
}

/// `bits` without its `count` lowest.
const fn clear_low(bits: u64, count: usize) -> u64 {
    if count >= WORD_BITS {
        0
    } else {
        bits & (u64::MAX << count)
    }
}

/// Why pages could not be marked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// The pages are not of this block.
    #[error("{pages} pages from page {first_page} are outside a block of {block_pages} pages")]
    OutOfBlock {
        /// First page of the range.
        first_page: u64,
        /// Number of pages in the range.
        pages: u64,
        /// Number of pages in the block.
        block_pages: u64,
    },
    /// A word of a dirty log does not start where a word of the bitmap does.
    #[error("a dirty word starts at page {first_page}, which is not a multiple of 64")]
    Unaligned {
        /// The page of the word's lowest bit.
        first_page: u64,
    },
    /// The bitmap does not fit in memory.
    #[error("no memory for a dirty bitmap of {pages} pages")]
    NoMemory {
        /// Number of pages it was to have.
        pages: u64,
    },
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Set(u64),
        Range(u64, u64),
        Word(u64, u64),
        Drain,
        DrainSome(usize),
    }

    fn ops(pages: u64) -> impl Strategy<Value = Vec<Op>> {
        // A little beyond the end, so that refusals are part of the model.
        let page = 0..pages + 3;
        let op = prop_oneof![
            4 => page.clone().prop_map(Op::Set),
            4 => (page.clone(), 0..200u64).prop_map(|(p, n)| Op::Range(p, n)),
            2 => (0..pages / 64 + 2, any::<u64>()).prop_map(|(w, bits)| Op::Word(w * 64, bits)),
            1 => Just(Op::Drain),
            1 => (0..4usize).prop_map(Op::DrainSome),
        ];
        proptest::collection::vec(op, 0..40)
    }

    fn runs_of(model: &BTreeSet<u64>) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for &page in model {
            match runs.last_mut() {
                Some(run) if run.first_page + run.pages == page => run.pages += 1,
                _ => runs.push(PageRun {
                    first_page: page,
                    pages: 1,
                }),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn the_bitmap_behaves_as_a_set_of_pages(
            (pages, ops) in (1..400u64).prop_flat_map(|pages| (Just(pages), ops(pages))),
        ) {
            let bitmap = DirtyBitmap::new(pages).unwrap();
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Set(page) => {
                        prop_assert_eq!(bitmap.set(page).is_ok(), page < pages);
                        if page < pages {
                            model.insert(page);
                        }
                    }
                    Op::Range(first, count) => {
                        let fits = first + count <= pages;
                        prop_assert_eq!(bitmap.set_range(first, count).is_ok(), fits);
                        if fits {
                            model.extend(first..first + count);
                        }
                    }
                    Op::Word(first, bits) => {
                        let set: Vec<u64> =
                            (0..64).filter(|i| bits >> i & 1 == 1).map(|i| first + i).collect();
                        let fits = set.iter().all(|&page| page < pages);
                        prop_assert_eq!(bitmap.or_word(first, bits).is_ok(), fits);
                        if fits {
                            model.extend(set);
                        }
                    }
                    Op::Drain => {
                        let drained: Vec<_> = bitmap.drain_runs().collect();
                        prop_assert_eq!(drained, runs_of(&model));
                        model.clear();
                    }
                    Op::DrainSome(count) => {
                        let drained: Vec<_> = bitmap.drain_runs().take(count).collect();
                        prop_assert_eq!(&drained[..], &runs_of(&model)[..drained.len()]);
                        for run in drained {
                            for page in run.first_page..run.first_page + run.pages {
                                model.remove(&page);
                            }
                        }
                    }
                }
                prop_assert_eq!(bitmap.count(), model.len() as u64);
                for page in 0..pages {
                    prop_assert_eq!(bitmap.test(page).unwrap(), model.contains(&page));
                }
            }
            for (index, word) in bitmap.snapshot().into_iter().enumerate() {
                for bit in 0..64 {
                    let page = index as u64 * 64 + bit;
                    prop_assert_eq!(word >> bit & 1 == 1, model.contains(&page));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn shares_cover_every_marked_page_once_and_are_balanced(
            words in proptest::collection::vec(any::<u64>(), 1..40),
            pages in 0..500u64,
        ) {
            let bitmap = DirtyBitmap::new(words.len() as u64 * 64).unwrap();
            for (index, &word) in words.iter().enumerate() {
                bitmap.or_word(index as u64 * 64, word).unwrap();
            }
            let total = bitmap.count();
            let shares = bitmap.shares(pages);
            prop_assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
            let sizes: Vec<u64> = shares
                .into_iter()
                .map(|share| bitmap.drain_words(share).map(|run| run.pages).sum())
                .collect();
            prop_assert_eq!(sizes.iter().sum::<u64>(), total);
            let (_, whole) = sizes.split_last().unwrap_or((&0, &[]));
            prop_assert!(whole.iter().all(|&size| (pages..pages.max(1) + 64).contains(&size)));
        }
    }

    #[test]
    fn a_run_across_many_words_comes_out_as_one() {
        let bitmap = DirtyBitmap::new(1000).unwrap();
        bitmap.set_range(60, 900).unwrap();
        let runs: Vec<_> = bitmap.drain_runs().collect();
        assert_eq!(
            runs,
            [PageRun {
                first_page: 60,
                pages: 900
            }]
        );
        assert_eq!(bitmap.count(), 0);
    }

    #[test]
    fn a_word_of_a_dirty_log_must_be_aligned_and_inside() {
        let bitmap = DirtyBitmap::new(70).unwrap();
        assert_eq!(
            bitmap.or_word(1, 1),
            Err(BitmapError::Unaligned { first_page: 1 })
        );
        bitmap.or_word(64, 0b10_0000).unwrap();
        assert!(bitmap.or_word(64, 0b100_0000).is_err());
        assert!(bitmap.or_word(128, 1).is_err());
        // KVM reports whole words, zero padded.
        bitmap.or_word(128, 0).unwrap();
        assert_eq!(bitmap.snapshot(), [0, 0b10_0000]);
    }

    #[test]
    fn a_range_that_overflows_is_refused() {
        let bitmap = DirtyBitmap::new(64).unwrap();
        assert!(bitmap.set_range(u64::MAX, 2).is_err());
        assert!(bitmap.set_range(2, u64::MAX).is_err());
        assert!(bitmap.set_range(65, 0).is_err());
        assert_eq!(bitmap.count(), 0);
    }

    #[test]
    fn a_bitmap_too_large_for_memory_is_an_error() {
        assert_eq!(
            DirtyBitmap::new(u64::MAX).map(|b| b.pages()),
            Err(BitmapError::NoMemory { pages: u64::MAX })
        );
    }

    #[test]
    fn threads_that_mark_while_another_drains_lose_no_page_and_repeat_none() {
        const PAGES: u64 = 64 * 257 + 13;
        const THREADS: u64 = 4;
        let bitmap = DirtyBitmap::new(PAGES).unwrap();
        let mut times_drained = vec![0u8; usize::try_from(PAGES).unwrap()];
        let mut take = || {
            for run in bitmap.drain_runs() {
                for page in run.first_page..run.first_page + run.pages {
                    times_drained[usize::try_from(page).unwrap()] += 1;
                }
            }
        };
        std::thread::scope(|scope| {
            let setters: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let bitmap = &bitmap;
                    // Interleaved, so that every word is shared by all setters.
                    scope.spawn(move || {
                        for page in (thread..PAGES).step_by(4) {
                            bitmap.set(page).unwrap();
                        }
                    })
                })
                .collect();
            while !setters.iter().all(|setter| setter.is_finished()) {
                take();
            }
        });
        take();
        assert!(times_drained.iter().all(|&times| times == 1));
        assert_eq!(bitmap.count(), 0);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p ram-cache --lib loom`.
#[cfg(test)]
#[cfg(loom)]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    fn drain(bitmap: &DirtyBitmap, seen: &mut [u32; 128]) {
        for run in bitmap.drain_runs() {
            for page in run.first_page..run.first_page + run.pages {
                seen[usize::try_from(page).unwrap()] += 1;
            }
        }
    }

    #[test]
    fn loom_no_bit_is_lost_or_seen_twice_when_setters_race_a_drain() {
        loom::model(|| {
            let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
            // They share the second word.
            let setters = [(62u64, 3u64), (65, 1)].map(|(first, count)| {
                let bitmap = Arc::clone(&bitmap);
                thread::spawn(move || bitmap.set_range(first, count).unwrap())
            });
            let mut seen = [0; 128];
            drain(&bitmap, &mut seen);
            for setter in setters {
                setter.join().unwrap();
            }
            drain(&bitmap, &mut seen);
            for (page, times) in seen.into_iter().enumerate() {
                assert_eq!(times, u32::from((62..66).contains(&page)), "page {page}");
            }
        });
    }

    #[test]
    fn loom_a_drained_page_shows_what_was_written_before_it_was_marked() {
        loom::model(|| {
            let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
            let page = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
            let setters = [0usize, 1].map(|index| {
                let (bitmap, page) = (Arc::clone(&bitmap), Arc::clone(&page));
                thread::spawn(move || {
                    page[index].store(1, Ordering::Relaxed);
                    bitmap.set(index as u64).unwrap();
                })
            });
            for run in bitmap.drain_runs() {
                for index in run.first_page..run.first_page + run.pages {
                    let index = usize::try_from(index).unwrap();
                    assert_eq!(page[index].load(Ordering::Relaxed), 1);
                }
            }
            for setter in setters {
                setter.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_a_page_that_a_thread_has_marked_is_never_passed_over_by_it() {
        // Another thread marks the same word and may not have come to its group yet, or drains it.
        for another_drains in [false, true] {
            loom::model(move || {
                let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
                let another = {
                    let bitmap = Arc::clone(&bitmap);
                    thread::spawn(move || {
                        let mut seen = [0; 128];
                        if another_drains {
                            drain(&bitmap, &mut seen);
                        } else {
                            bitmap.set(65).unwrap();
                        }
                        seen
                    })
                };
                bitmap.set(64).unwrap();
                let mut seen = [0; 128];
                drain(&bitmap, &mut seen);
                if !another_drains {
                    assert_eq!(seen[64], 1);
                }
                let also = another.join().unwrap();
                assert_eq!(seen[64] + also[64], 1);
                drain(&bitmap, &mut seen);
                assert_eq!(seen[64] + also[64], 1);
                assert_eq!(seen[65], u32::from(!another_drains));
            });
        }
    }

    #[test]
    fn loom_a_drain_given_up_early_leaves_the_rest_marked() {
        loom::model(|| {
            let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
            bitmap.or_word(0, 0b101).unwrap();
            let setter = {
                let bitmap = Arc::clone(&bitmap);
                thread::spawn(move || bitmap.set(4).unwrap())
            };
            let first = bitmap.drain_runs().next().unwrap();
            assert_eq!((first.first_page, first.pages), (0, 1));
            setter.join().unwrap();
            assert_eq!(bitmap.snapshot(), [0b10100, 0]);
        });
    }
}
