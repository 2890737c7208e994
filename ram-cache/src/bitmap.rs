//! The dirty bitmap of one RAM block: set by many channel threads, drained by words.
//!
//! A bit of a second level, the *groups*, stands for each word that may have a bit: a scan skips 4,096 clean pages at
//! a time.
//!
//! # Orderings
//! * Setting a bit is a `fetch_or`, draining is a `swap(0)`, of which the one is ordered ([`Release`])
//!   before the other ([`Acquire`]): the thread that takes a bit out also sees everything the setter wrote
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
mod tests;

#[cfg(test)]
#[cfg(loom)]
mod loom_tests;
