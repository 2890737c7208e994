//! The bitmap of the pages of a block that have arrived.

use bytes::BufMut;

use super::error::{BitmapError, END_MARK};
use crate::IdStr;
use crate::error::DecodeError;
use crate::ram::{BlockId, RamBlock, RamBlockTable};
use crate::raw::codec::Reader;
use crate::raw::return_path::ReturnPathMessage;

/// Which pages of a RAM block the destination has. It goes on the return path behind the message
/// [`ReturnPathMessage::RecvBitmap`], outside of its frame, as the answer to the command
/// [`Command::RecvBitmap`](crate::raw::command::Command::RecvBitmap):
///
/// ```text
/// be64 length  bits  be64 0x0123456789abcdef
/// ```
///
/// Bit `i % 8` of byte `i / 8` is page `i`; the bits are padded to a multiple of 8 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedBitmap {
    pages: u64,
    words: Vec<u64>,
}

impl ReceivedBitmap {
    /// What stands around the bits, bytes.
    pub const OVERHEAD: usize = 16;

    /// No page of `block` has arrived.
    ///
    /// # Errors
    /// [`BitmapError::TooLong`]: the block is larger than memory can be.
    pub fn new(block: &RamBlock) -> Result<Self, BitmapError> {
        let pages = block.pages();
        Ok(Self {
            pages,
            words: vec![0; words_of(pages)?],
        })
    }

    /// How many pages the block has.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits in words, page 0 in the lowest bit of the first. Those beyond the block are clear.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether a page has arrived; never one that the block does not have.
    #[must_use]
    pub fn has(&self, page: u64) -> bool {
        self.word(page)
            .is_some_and(|i| self.words.get(i).is_some_and(|w| w >> (page % 64) & 1 == 1))
    }

    /// A page has arrived. Returns whether the block has such a page.
    pub fn set(&mut self, page: u64) -> bool {
        match self.word(page).and_then(|i| self.words.get_mut(i)) {
            Some(word) => {
                *word |= 1 << (page % 64);
                true
            }
            None => false,
        }
    }

    /// A page was dropped. Returns whether the block has such a page.
    pub fn clear(&mut self, page: u64) -> bool {
        match self.word(page).and_then(|i| self.words.get_mut(i)) {
            Some(word) => {
                *word &= !(1 << (page % 64));
                true
            }
            None => false,
        }
    }

    /// How many pages have arrived.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    fn word(&self, page: u64) -> Option<usize> {
        if page < self.pages {
            usize::try_from(page / 64).ok()
        } else {
            None
        }
    }

    /// Appends the message that names `block`, and the bitmap behind it.
    pub fn encode(&self, block: IdStr, out: &mut impl BufMut) {
        ReturnPathMessage::RecvBitmap { block }.encode(out);
        out.put_u64(self.words.len() as u64 * 8);
        for word in &self.words {
            out.put_u64_le(*word);
        }
        out.put_u64(END_MARK);
    }

    /// Reads what follows the message that names `block`. Its length is checked before the bits are
    /// there, and memory taken when they are. Bits beyond the block mean nothing, and are cleared.
    ///
    /// # Errors
    /// [`BitmapError`], or the bytes end before the bitmap does: [`DecodeError::missing`] says by
    /// how much.
    pub fn decode(r: &mut Reader<'_>, block: &RamBlock) -> Result<Self, DecodeError> {
        let mut attempt = r.clone();
        let bitmap = Self::attempt(&mut attempt, block)?;
        *r = attempt;
        Ok(bitmap)
    }

    fn attempt(r: &mut Reader<'_>, block: &RamBlock) -> Result<Self, DecodeError> {
        let at = r.clone();
        let pages = block.pages();
        let words = words_of(pages).map_err(|e| at.error(e))?;
        let found = r.be64()?;
        let expected = words as u64 * 8;
        if found != expected {
            return Err(at.error(BitmapError::Length { found, expected }));
        }
        let bits = r.take(words * 8)?;
        let at = r.clone();
        let found = r.be64()?;
        if found != END_MARK {
            return Err(at.error(BitmapError::EndMark { found }));
        }
        let mut words: Vec<u64> = bits
            .chunks_exact(8)
            .map(|b| b.iter().rev().fold(0, |word, b| word << 8 | u64::from(*b)))
            .collect();
        if let (Some(last), beyond @ 1..) = (words.last_mut(), pages % 64) {
            *last &= (1 << beyond) - 1;
        }
        Ok(Self { pages, words })
    }

    /// The block that a message [`ReturnPathMessage::RecvBitmap`] names, whose bitmap follows.
    ///
    /// # Errors
    /// [`BitmapError::UnknownBlock`].
    pub fn block_of<'a>(
        name: &IdStr,
        blocks: &'a RamBlockTable,
    ) -> Result<(BlockId, &'a RamBlock), BitmapError> {
        let id = blocks.find(name.as_str().as_bytes());
        id.and_then(|id| Some((id, blocks.get(id)?)))
            .ok_or_else(|| BitmapError::UnknownBlock {
                name: name.as_str().to_owned(),
            })
    }
}

/// Words for so many bits.
fn words_of(pages: u64) -> Result<usize, BitmapError> {
    usize::try_from(pages.div_ceil(64))
        .ok()
        .filter(|words| *words <= isize::MAX.unsigned_abs() / 8)
        .ok_or(BitmapError::TooLong { pages })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PAGE_SIZE;

    fn block(pages: u64) -> RamBlock {
        RamBlock::new("pc.ram", pages * PAGE_SIZE).unwrap()
    }

    fn encoded(bitmap: &ReceivedBitmap) -> Vec<u8> {
        let mut out = Vec::new();
        bitmap.encode(IdStr::new("pc.ram").unwrap(), &mut out);
        out
    }

    #[test]
    fn a_bitmap_is_laid_out_as_qemu_lays_it_out() {
        let mut bitmap = ReceivedBitmap::new(&block(70)).unwrap();
        for page in [0, 9, 63, 64, 69] {
            assert!(bitmap.set(page));
        }
        assert!(!bitmap.set(70));
        assert!(bitmap.set(1) && bitmap.clear(1) && !bitmap.clear(70));
        assert_eq!(bitmap.received(), 5);
        assert!(bitmap.has(9) && !bitmap.has(10) && !bitmap.has(70) && !bitmap.has(u64::MAX));
        assert_eq!(
            encoded(&bitmap),
            b"\0\x05\0\x07\x06pc.ram\
              \0\0\0\0\0\0\0\x10\
              \x01\x02\0\0\0\0\0\x80\x21\0\0\0\0\0\0\0\
              \x01\x23\x45\x67\x89\xab\xcd\xef"
        );
    }

    #[test]
    fn a_bitmap_cut_off_anywhere_asks_for_more() {
        let bytes = encoded(&ReceivedBitmap::new(&block(129)).unwrap()).split_off(11);
        assert_eq!(bytes.len(), 24 + ReceivedBitmap::OVERHEAD);
        for n in 0..bytes.len() {
            let mut r = Reader::new(&bytes[..n], 7);
            let missing = ReceivedBitmap::decode(&mut r, &block(129))
                .unwrap_err()
                .missing()
                .unwrap();
            assert!((1..=bytes.len() - n).contains(&missing));
            assert_eq!(r.consumed(), 0);
        }
    }

    #[test]
    fn a_length_that_is_not_the_blocks_is_refused_before_a_bit_is_there() {
        for found in [0, 8, 17, 24, u64::MAX] {
            let bytes = found.to_be_bytes();
            let e = ReceivedBitmap::decode(&mut Reader::new(&bytes, 7), &block(70)).unwrap_err();
            let expected = 16;
            assert_eq!(
                (e.offset, e.cause),
                (7, BitmapError::Length { found, expected }.into())
            );
        }
    }

    #[test]
    fn another_end_is_refused_and_bits_beyond_the_block_mean_nothing() {
        let mut bytes = encoded(&ReceivedBitmap::new(&block(70)).unwrap()).split_off(11);
        bytes[16..24].fill(0xff);
        let decode = |bytes: &[u8]| ReceivedBitmap::decode(&mut Reader::new(bytes, 0), &block(70));
        let bitmap = decode(&bytes).unwrap();
        assert_eq!((bitmap.received(), bitmap.words()[1]), (6, 0x3f));
        bytes[31] = 0;
        let e = decode(&bytes).unwrap_err();
        assert_eq!(
            (e.offset, e.cause),
            (
                24,
                BitmapError::EndMark {
                    found: 0x0123_4567_89ab_cd00
                }
                .into()
            )
        );
    }

    #[test]
    fn the_bitmap_of_another_block_is_refused() {
        let blocks = RamBlockTable::new(vec![block(1)]).unwrap();
        let of = |name| ReceivedBitmap::block_of(&IdStr::new(name).unwrap(), &blocks);
        assert_eq!(of("pc.ram").unwrap().0, BlockId::new(0));
        assert_eq!(
            of("vga").unwrap_err(),
            BitmapError::UnknownBlock { name: "vga".into() }
        );
    }

    proptest! {
        #[test]
        fn a_bitmap_reads_back(pages in 1_u64..300, set in proptest::collection::vec(0_u64..300, 0..40)) {
            let mut bitmap = ReceivedBitmap::new(&block(pages)).unwrap();
            for page in set {
                prop_assert_eq!(bitmap.set(page), page < pages);
            }
            let bytes = encoded(&bitmap);
            let mut r = Reader::new(&bytes, 0);
            ReturnPathMessage::decode(&mut r).unwrap();
            prop_assert_eq!(ReceivedBitmap::decode(&mut r, &block(pages)).unwrap(), bitmap);
            prop_assert!(r.rest().is_empty());
        }
    }
}
