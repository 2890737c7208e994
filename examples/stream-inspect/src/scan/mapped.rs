//! Pages that have their places in a file (mapped-ram).

use std::ops::Range;

use migration_stream::PAGE_SIZE;
use migration_stream::ram::BlockId;
use migration_stream::raw::mapped_ram::MappedArea;

use super::file::read_exact;
use super::{Scan, ScanError};

/// How much of a bitmap is read at once, bytes.
const BITMAP_PIECE: usize = 64 << 10;

impl Scan<'_> {
    /// Pages that have their places in the file.
    pub(super) fn mapped(&mut self, id: BlockId, area: &MappedArea) -> Result<(), ScanError> {
        let file = self.origin.file().ok_or(ScanError::NoFile)?;
        let failed = |offset| move |source| ScanError::Stream { offset, source };
        let total = area.used_length() / PAGE_SIZE;
        let (mut normal, mut first) = (0, 0);
        let mut bits = vec![0; BITMAP_PIECE];
        while first < total {
            let rest = area.bitmap_len() - first / 8;
            let len = BITMAP_PIECE.min(usize::try_from(rest).unwrap_or(BITMAP_PIECE));
            let Some(bits) = bits.get_mut(..len) else {
                break;
            };
            let at = area.bitmap() + first / 8;
            read_exact(&**file, at, bits).map_err(failed(at))?;
            let pages = (total - first).min(len as u64 * 8);
            for run in runs(bits, pages) {
                normal += run.end - run.start;
                if let Some(extract) = &mut self.extract {
                    let from = area.pages() + (first + run.start) * PAGE_SIZE;
                    let count = run.end - run.start;
                    extract.copy(&**file, from, id, first + run.start, count)?;
                }
            }
            first += pages;
            (self.progress)(at);
        }
        if let Some(block) = self.found.blocks.get_mut(id.index()) {
            block.normal = normal;
            block.zero = total - normal;
        }
        if let Some(unique) = self.unique.get_mut(id.index()) {
            unique.insert(0, total);
        }
        Ok(())
    }
}

/// The runs of bits that are set among the first `count`.
fn runs(bits: &[u8], count: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let is_set = move |bit: u64| {
        let byte = usize::try_from(bit / 8).ok().and_then(|i| bits.get(i));
        byte.is_some_and(|b| b >> (bit % 8) & 1 == 1)
    };
    let uniform = move |bit: u64, value: u8| {
        let word = usize::try_from(bit / 8)
            .ok()
            .and_then(|i| bits.get(i..i + 8));
        bit.is_multiple_of(8) && word.is_some_and(|w| w.iter().all(|b| *b == value))
    };
    let beyond = move |mut bit: u64, set: bool| {
        while bit < count {
            if uniform(bit, if set { 0xff } else { 0 }) {
                bit += 64;
            } else if is_set(bit) == set {
                bit += 1;
            } else {
                break;
            }
        }
        bit.min(count)
    };
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = beyond(next, false);
        next = beyond(start, true);
        (start < next).then_some(start..next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_bitmap_are_found_across_bytes_and_words() {
        let mut bits = vec![0xff; 40];
        bits[0] = 0b0110;
        bits[20] = 0;
        bits[21] = 0x80;
        let found: Vec<_> = runs(&bits, 317).collect();
        assert_eq!(found, [1..3, 8..160, 175..317]);
        assert_eq!(runs(&[0; 9], 70).count(), 0);
        assert_eq!(runs(&[0xff; 9], 70).next(), Some(0..70));
        assert_eq!(runs(&[], 0).count(), 0);
    }
}
