//! Putting a checkpoint in place.

use std::ops::Range;

use super::ram::CowBlock;
use super::staging::Staging;
use super::table::Entry;
use crate::PAGE_SIZE;
use crate::bitmap::{WORD_BITS, bits_of, has};
use crate::block::bytes_of;
use crate::copy::Copier;
use crate::error::CacheError;
use crate::flush::FlushReport;
use crate::pagemap::Pagemap;
use crate::zero::write_zeroes;

/// What is to be done with a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Todo {
    /// The base has what belongs there, the guest's own copy not.
    Restore,
    /// It is staged, from this place on.
    Stage { slot: u32, guest: bool },
    /// It is zero; which of the two is not zero yet.
    Zero { base: bool, guest: bool },
    /// What belongs there is there.
    Nothing,
}

impl Todo {
    /// What the page needs, `used` saying whether its base may be other than zero, and `guest` whether
    /// the guest has a copy of it.
    fn of(entry: Entry, used: bool, guest: bool) -> Self {
        match entry.slot() {
            _ if entry.is_zero() && (used || guest) => Self::Zero { base: used, guest },
            _ if entry.is_zero() => Self::Nothing,
            Some(slot) => Self::Stage { slot, guest },
            None if guest => Self::Restore,
            None => Self::Nothing,
        }
    }

    /// Whether a page that needs `next` goes on a run that begins with this, `pages` before it.
    fn goes_on(self, next: Self, pages: usize) -> bool {
        match (self, next) {
            (
                Self::Stage { slot, guest },
                Self::Stage {
                    slot: next,
                    guest: same,
                },
            ) => guest == same && slot as usize + pages == next as usize,
            (a, b) => a == b,
        }
    }
}

/// Whether putting the page in place writes all of its base.
fn changes_base(entry: Entry, used: bool) -> bool {
    if entry.is_zero() {
        used
    } else {
        entry.slot().is_some()
    }
}

/// The commit of a part of a block, on one thread.
pub(super) struct Commit<'a> {
    pub(super) block: &'a CowBlock,
    pub(super) staging: &'a Staging,
    pub(super) pagemap: &'a Pagemap,
    pub(super) copier: &'a Copier,
}

impl Commit<'_> {
    /// Puts what is dirty in some words of the block's bitmaps in place.
    pub(super) fn words(&self, words: Range<usize>) -> Result<FlushReport, CacheError> {
        let block = self.block;
        // Before anything changes: of a page that is not received the guest's copy must be known to be
        // one. Of a page that is received it is seen when its base changes.
        block.find_copies(words.clone(), |word| block.dirtied.word(word), self.pagemap)?;
        let mut report = FlushReport::default();
        let mut run: Option<(Todo, Range<usize>)> = None;
        for word in words {
            let dirtied = block.dirtied.take_word(word);
            let dirty = block.received.take_word(word) | dirtied;
            report.pages += u64::from(dirty.count_ones());
            let used = block.used.word(word);
            let mut entries = [Entry::default(); WORD_BITS];
            let (mut private, mut unknown) = (0, 0);
            for bit in bits_of(dirty) {
                let entry = block.table.settle(word * WORD_BITS + bit);
                if entry.is_private() {
                    private |= 1 << bit;
                } else if changes_base(entry, has(used, bit)) {
                    unknown |= 1 << bit;
                }
                entries[bit] = entry;
            }
            private |= block.turn_out_private(word, unknown)?;
            let mut newly_used = 0;
            for bit in bits_of(dirty) {
                let page = word * WORD_BITS + bit;
                let todo = Todo::of(entries[bit], has(used, bit), has(private, bit));
                if todo == Todo::Nothing {
                    continue;
                }
                if matches!(todo, Todo::Stage { .. } | Todo::Restore) {
                    newly_used |= 1 << bit;
                }
                run = match run {
                    Some((first, pages))
                        if pages.end == page && first.goes_on(todo, pages.len()) =>
                    {
                        Some((first, pages.start..page + 1))
                    }
                    done => {
                        self.carry_out(done, &mut report)?;
                        Some((todo, page..page + 1))
                    }
                };
            }
            if newly_used != 0 {
                block
                    .used
                    .or_word((word * WORD_BITS) as u64, newly_used)
                    .map_err(|source| block.spec.bitmap_error(source))?;
            }
            self.note_cold(word, dirtied)?;
        }
        self.carry_out(run, &mut report)?;
        report.bytes = report.pages * PAGE_SIZE;
        Ok(report)
    }

    /// Notes which copies of a word the guest has not written since the commit before.
    fn note_cold(&self, word: usize, dirtied: u64) -> Result<(), CacheError> {
        let block = self.block;
        block.cold.take_word(word);
        let cold = block.private.word(word) & !dirtied;
        block
            .cold
            .or_word((word * WORD_BITS) as u64, cold)
            .map_err(|source| block.spec.bitmap_error(source))
    }

    fn carry_out(
        &self,
        run: Option<(Todo, Range<usize>)>,
        report: &mut FlushReport,
    ) -> Result<(), CacheError> {
        let Some((todo, pages)) = run else {
            return Ok(());
        };
        let (offset, len) = bytes_of(&pages);
        let base = || self.block.base_slice(offset, len);
        let own = || self.block.spec.guest_slice(offset, len);
        match todo {
            Todo::Restore => self.copier.copy(&base()?, &own()?),
            Todo::Stage { slot, guest } => {
                let staged = self.staging.slice(slot, pages.len())?;
                self.copier.copy(&staged, &base()?);
                if guest {
                    self.copier.copy(&staged, &own()?);
                }
            }
            Todo::Zero {
                base: of_base,
                guest,
            } => {
                if of_base {
                    write_zeroes(&base()?);
                }
                if guest {
                    write_zeroes(&own()?);
                }
            }
            Todo::Nothing => return Ok(()),
        }
        report.runs += 1;
        Ok(())
    }
}
