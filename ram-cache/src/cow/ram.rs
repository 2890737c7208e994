//! One RAM block: its base, the guest's mapping of it, and what is known of its pages.

use std::ops::Range;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::staging::Staging;
use super::table::{PageTable, Place};
use crate::bitmap::{DirtyBitmap, WORD_BITS, bits_of, has};
use crate::block::{CacheBlockSpec, bytes_of, pages_of};
use crate::error::CacheError;
use crate::pagemap::Pagemap;
use crate::zero::write_zeroes;
use crate::{PAGE_BYTES, mapping};

/// A query for one page costs as much as the answer for this many pages: pages that lie closer share a query.
const NEAR: usize = 24;

/// A cache line, bytes.
const LINE: usize = 64;

/// The guest may keep one in this many pages although it has no use for its own copy.
const KEEP_ONE_IN: u64 = 32;

#[derive(Debug)]
pub(super) struct CowBlock {
    pub(super) spec: CacheBlockSpec,
    /// The base, mapped shared.
    base: MmapRegion,
    pub(super) table: PageTable,
    /// Pages of the checkpoint that is arriving.
    pub(super) received: DirtyBitmap,
    /// Pages that the guest has dirtied itself since the last one.
    pub(super) dirtied: DirtyBitmap,
    /// Pages of which the guest has a copy of its own: those that are private in the table, to be
    /// found without looking at all of it.
    pub(super) private: DirtyBitmap,
    /// Those of them that the guest did not write before the last commit.
    pub(super) cold: DirtyBitmap,
    /// Pages that something other than zero may have been written to. What is not among them reads as
    /// zero, and is a hole in the file or has been read by the guest.
    pub(super) used: DirtyBitmap,
}

/// What a commit has to look at in a block.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Ranges of words in which something is dirty, or the guest has a copy.
    pub(super) words: Vec<Range<usize>>,
    /// Pages that are dirty.
    pub(super) pages: u64,
}

impl AsRef<CacheBlockSpec> for CowBlock {
    fn as_ref(&self) -> &CacheBlockSpec {
        &self.spec
    }
}

impl CowBlock {
    pub(super) fn new(spec: CacheBlockSpec) -> Result<Self, CacheError> {
        let (name, len) = (&spec.name, spec.len);
        let file = mapping::memory_file(len).map_err(|source| CacheError::File {
            name: name.clone(),
            len,
            source,
        })?;
        let base = mapping::shared(file, len).map_err(|source| CacheError::Map {
            name: name.clone(),
            len,
            source,
        })?;
        mapping::exclude_from_core_dumps(&base).map_err(|source| CacheError::CoreDump {
            name: name.clone(),
            source,
        })?;
        let table = PageTable::new(spec.pages()).ok_or_else(|| CacheError::Table {
            name: name.clone(),
            pages: spec.pages(),
        })?;
        Ok(Self {
            base,
            table,
            received: spec.bitmap()?,
            dirtied: spec.bitmap()?,
            private: spec.bitmap()?,
            cold: spec.bitmap()?,
            used: spec.bitmap()?,
            spec,
        })
    }

    /// Puts the base into the place of the guest's memory.
    pub(super) fn put_in_place(&self) -> Result<(), CacheError> {
        let failed = |source| CacheError::File {
            name: self.spec.name.clone(),
            len: self.spec.len,
            source,
        };
        let Some(file) = self.base.file_offset() else {
            return Err(failed(std::io::ErrorKind::NotFound.into()));
        };
        let CacheBlockSpec {
            guest,
            offset_in_region,
            len,
            ..
        } = &self.spec;
        mapping::replace_by_private(guest.as_mapping(), *offset_in_region, *len, file.file())
            .map_err(failed)
    }

    pub(super) fn base_slice(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        self.base
            .get_slice(offset, len)
            .map_err(|_| self.spec.out_of_block(offset as u64, len))
    }

    /// Precopy: where a range is to be written.
    pub(super) fn prepare(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        self.set(&self.used, &pages_of(offset, len))?;
        self.base_slice(offset, len)
    }

    /// Precopy: a range is zero.
    pub(super) fn zero(&self, offset: usize, len: usize) -> Result<(), CacheError> {
        for page in pages_of(offset, len) {
            if is_set(&self.used, page) {
                let (start, page_len) = bytes_of(&(page..page + 1));
                let from = start.max(offset);
                let to = (start + page_len).min(offset + len);
                write_zeroes(&self.base_slice(from, to - from)?);
            }
        }
        Ok(())
    }

    /// COLO: where as many of the pages of a range are to be written as follow each other there.
    pub(super) fn stage<'a>(
        &'a self,
        offset: usize,
        len: usize,
        staging: &'a Staging,
    ) -> Result<VolatileSlice<'a>, CacheError> {
        let pages = self.whole_pages(offset, len)?;
        if pages.is_empty() {
            return self.base_slice(offset, 0);
        }
        // Before a byte is written.
        self.set(&self.received, &pages)?;
        let first = pages.start;
        let place = self.place(&pages, staging)?;
        let mut next = first + 1;
        match place {
            Place::Slot(slot) => {
                let follows = |page: usize| match self.table.find(page) {
                    Place::Slot(s) => s as usize == slot as usize + (page - first),
                    _ => false,
                };
                while next < pages.end && follows(next) {
                    next += 1;
                }
                staging.slice(slot, next - first)
            }
            Place::Base | Place::Unknown => {
                while next < pages.end && self.table.find(next) == Place::Base {
                    next += 1;
                }
                let (offset, len) = bytes_of(&(first..next));
                self.base_slice(offset, len)
            }
        }
    }

    /// The place of the first of some pages, which it has found or been given. Those behind it that
    /// have none are given the ones behind it.
    fn place(&self, pages: &Range<usize>, staging: &Staging) -> Result<Place, CacheError> {
        loop {
            match self.table.find(pages.start) {
                Place::Unknown => {}
                place => return Ok(place),
            }
            let without = pages
                .clone()
                .take_while(|&page| self.table.find(page) == Place::Unknown)
                .count();
            let (slot, count) = staging.take(without.max(1))?;
            for (page, slot) in pages.clone().zip(slot..).take(count) {
                // One that has come to another place meanwhile stays there; this one is not used.
                self.table.place(page, slot);
            }
        }
    }

    /// COLO: a range is zero.
    pub(super) fn stage_zero(&self, offset: usize, len: usize) -> Result<(), CacheError> {
        let pages = self.whole_pages(offset, len)?;
        self.set(&self.received, &pages)?;
        for page in pages {
            if self.table.zero(page) == Place::Base {
                let (offset, len) = bytes_of(&(page..page + 1));
                write_zeroes(&self.base_slice(offset, len)?);
            }
        }
        Ok(())
    }

    pub(super) fn note_dirtied(&self, first_page: u64, word: u64) -> Result<(), CacheError> {
        self.dirtied
            .or_word(first_page, word)
            .map_err(|source| self.spec.bitmap_error(source))
    }

    pub(super) fn dirty_pages(&self) -> u64 {
        self.marked_words(&[&self.received, &self.dirtied])
            .map(|word| u64::from(self.dirty(word).count_ones()))
            .sum()
    }

    /// The pages of a word that the next commit is to put in place.
    pub(super) fn dirty(&self, word: usize) -> u64 {
        self.received.word(word) | self.dirtied.word(word)
    }

    /// Words in which one of the block's bitmaps may have a mark.
    fn marked_words(&self, bitmaps: &[&DirtyBitmap]) -> impl Iterator<Item = usize> {
        DirtyBitmap::marked_words(bitmaps, 0..self.received.word_count())
    }

    /// What a commit has to look at.
    pub(super) fn work(&self) -> Work {
        let mut work = Work::default();
        let bitmaps = [&self.received, &self.dirtied, &self.private, &self.cold];
        for word in self.marked_words(&bitmaps) {
            let dirty = self.dirty(word);
            if dirty | self.private.word(word) | self.cold.word(word) != 0 {
                work.pages += u64::from(dirty.count_ones());
                match work.words.last_mut() {
                    Some(last) if last.end == word => last.end += 1,
                    _ => work.words.push(word..word + 1),
                }
            }
        }
        work
    }

    /// Those words cut into ranges with about `pages` dirty pages each.
    pub(super) fn shares(&self, words: &[Range<usize>], pages: u64) -> Vec<Range<usize>> {
        let mut shares = Vec::new();
        for range in words {
            let (mut start, mut dirty) = (range.start, 0);
            for word in range.clone() {
                dirty += u64::from(self.dirty(word).count_ones());
                if dirty >= pages.max(1) {
                    shares.push(start..word + 1);
                    (start, dirty) = (word + 1, 0);
                }
            }
            if start < range.end {
                shares.push(start..range.end);
            }
        }
        shares
    }

    /// Learns which of the pages that the guest has dirtied it has copies of.
    pub(super) fn find_copies_of_dirtied(&self, pagemap: &Pagemap) -> Result<(), CacheError> {
        let dirtied = |word| self.dirtied.word(word);
        self.find_copies(self.marked_words(&[&self.dirtied]), dirtied, pagemap)
    }

    /// Asks the kernel which of the pages that `of` gives for some words the guest has copies of, as
    /// far as that is not known.
    pub(super) fn find_copies(
        &self,
        words: impl Iterator<Item = usize>,
        of: impl Fn(usize) -> u64,
        pagemap: &Pagemap,
    ) -> Result<(), CacheError> {
        let mut near: Option<Range<usize>> = None;
        for word in words {
            for bit in bits_of(of(word) & !self.private.word(word)) {
                let page = word * WORD_BITS + bit;
                near = Some(match near {
                    Some(pages) if page - pages.end < NEAR => pages.start..page + 1,
                    Some(pages) => {
                        self.ask(&pages, pagemap)?;
                        page..page + 1
                    }
                    None => page..page + 1,
                });
            }
        }
        near.map_or(Ok(()), |pages| self.ask(&pages, pagemap))
    }

    fn ask(&self, pages: &Range<usize>, pagemap: &Pagemap) -> Result<(), CacheError> {
        let address = self.spec.addresses().start + pages.start * PAGE_BYTES;
        let mut result = Ok(());
        pagemap
            .own_pages(address, pages.len(), |index| {
                let page = pages.start + index;
                if let Err(error) = self.note_copies(page..page + 1) {
                    result = Err(error);
                }
            })
            .map_err(CacheError::Pagemap)?;
        result
    }

    /// Which of some pages of a word the guest, which is stopped, has copies of. It is found by changing
    /// the base, all of which the caller writes next: the guest's mapping shows the change, or its own
    /// copy. That takes less than asking the kernel.
    pub(super) fn turn_out_private(&self, word: usize, pages: u64) -> Result<u64, CacheError> {
        let (offset, len) = bytes_of(&(word * WORD_BITS..(word + 1) * WORD_BITS));
        let len = len.min(self.spec.len.saturating_sub(offset));
        let base = self.base_slice(offset, len)?;
        let guest = self.spec.guest_slice(offset, len)?;
        // Another line of each page: those at the same place would push each other out of the cache.
        let at = |bit: usize| bit * PAGE_BYTES + bit * LINE;
        let outside = |_| self.spec.out_of_block(offset as u64, len);
        // Volatile accesses, in this order. The two addresses may be of the same memory, which every
        // processor keeps coherent with itself. All changes come before it is looked at the first: the
        // processor need not wait for one after the other.
        let mut before = [0; WORD_BITS];
        for bit in bits_of(pages) {
            before[bit] = guest.get_ref::<u64>(at(bit)).map_err(outside)?.load();
            let base = base.get_ref::<u64>(at(bit)).map_err(outside)?;
            base.store(!before[bit]);
        }
        let mut private = 0;
        for bit in bits_of(pages) {
            let after = guest.get_ref::<u64>(at(bit)).map_err(outside)?.load();
            private |= u64::from(after == before[bit]) << bit;
        }
        for bit in bits_of(private) {
            let page = word * WORD_BITS + bit;
            self.note_copies(page..page + 1)?;
        }
        Ok(private)
    }

    /// Notes that the guest has copies of some pages.
    fn note_copies(&self, pages: Range<usize>) -> Result<(), CacheError> {
        // The table decides; the bitmap must not have a page that is not private there.
        pages.clone().for_each(|page| self.table.set_private(page));
        self.set(&self.private, &pages)
    }

    /// Drops all of the guest's own copies.
    pub(super) fn drop_copies(&self) -> Result<(), CacheError> {
        self.drop_pages(&(0..self.spec.pages()))
    }

    /// Drops the copies that the guest has not written before the last commit, if it has many copies.
    pub(super) fn drop_cold_copies(&self) -> Result<(), CacheError> {
        if self.private.count() <= self.private.pages() / KEEP_ONE_IN {
            return Ok(());
        }
        for run in self.cold.drain_words(0..self.cold.word_count()).pages() {
            let mut from = run.start;
            while from < run.end {
                // What has been received meanwhile behind a copy keeps the copy.
                let to = (from..run.end)
                    .find(|&page| !self.forget_copy(page))
                    .unwrap_or(run.end);
                if from < to {
                    self.drop_pages(&(from..to))?;
                }
                from = to + 1;
            }
        }
        Ok(())
    }

    /// Whether the guest's copy of a page may be dropped; nothing is received behind it any more then.
    fn forget_copy(&self, page: usize) -> bool {
        let may = self.table.drop_private(page);
        if may {
            self.private
                .clear(page / WORD_BITS, 1 << (page % WORD_BITS));
        }
        may
    }

    fn drop_pages(&self, pages: &Range<usize>) -> Result<(), CacheError> {
        let (offset, len) = bytes_of(pages);
        let CacheBlockSpec {
            guest,
            offset_in_region,
            name,
            ..
        } = &self.spec;
        mapping::drop_own_pages(guest.as_mapping(), offset_in_region + offset, len).map_err(
            |source| CacheError::Discard {
                name: name.clone(),
                source,
            },
        )
    }

    fn set(&self, bitmap: &DirtyBitmap, pages: &Range<usize>) -> Result<(), CacheError> {
        bitmap
            .set_range(pages.start as u64, pages.len() as u64)
            .map_err(|source| self.spec.bitmap_error(source))
    }

    /// The pages of a range, if it is whole ones: of the others a place of the staging memory would
    /// keep what another page has left there.
    fn whole_pages(&self, offset: usize, len: usize) -> Result<Range<usize>, CacheError> {
        if offset.is_multiple_of(PAGE_BYTES) && len.is_multiple_of(PAGE_BYTES) {
            Ok(pages_of(offset, len))
        } else {
            Err(CacheError::PartOfPage {
                name: self.spec.name.clone(),
                offset: offset as u64,
                len,
            })
        }
    }
}

/// Whether a page is marked.
fn is_set(bitmap: &DirtyBitmap, page: usize) -> bool {
    has(bitmap.word(page / WORD_BITS), page % WORD_BITS)
}
