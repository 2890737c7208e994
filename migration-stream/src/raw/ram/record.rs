//! Records of a RAM section's body (`migration/ram.c`, QEMU 11.1).
//!
//! A record begins with a be64 whose low 12 bits are flags and the rest an offset in a block (or a
//! size). A page record names its block in a counted string unless CONTINUE is set; then it is the
//! block of the previous page record *of this channel*, in whichever section that was.

use bytes::BufMut;

use super::RamError;
use crate::error::DecodeError;
use crate::name::put_counted;
use crate::ram::{BlockId, RamBlockTable};
use crate::raw::codec::Reader;
use crate::{IdStr, PAGE_SIZE};

pub(super) const FLAG_ZERO: u64 = 0x002;
pub(super) const FLAG_MEM_SIZE: u64 = 0x004;
pub(super) const FLAG_PAGE: u64 = 0x008;
pub(super) const FLAG_EOS: u64 = 0x010;
pub(super) const FLAG_CONTINUE: u64 = 0x020;
pub(super) const FLAG_XBZRLE: u64 = 0x040;
pub(super) const FLAG_HOOK: u64 = 0x080;
pub(super) const FLAG_COMPRESS_PAGE: u64 = 0x100;
pub(super) const FLAG_MULTIFD_FLUSH: u64 = 0x200;
/// The only encoding of an XBZRLE record.
const XBZRLE_ENCODING: u8 = 1;
pub(super) const FLAGS: u64 = PAGE_SIZE - 1;

/// A page: its block and its byte offset there, a multiple of [`PAGE_SIZE`] inside the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageAddress {
    /// The block.
    pub block: BlockId,
    /// Offset in the block, bytes.
    pub offset: u64,
}

/// A record, without the data that follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The block list of set-up follows; the blocks' lengths sum up to `total` bytes.
    MemSize {
        /// Sum of the used lengths, bytes.
        total: u64,
    },
    /// The [`PAGE_SIZE`] bytes of a page follow.
    Page(PageAddress),
    /// A page that is all zero.
    Zero(PageAddress),
    /// The `len` bytes of an encoded page follow ([`crate::raw::xbzrle`]).
    Xbzrle {
        /// The page, which this side already has an older version of.
        page: PageAddress,
        /// At most [`PAGE_SIZE`].
        len: u16,
    },
    /// Main channel's mark of a multifd synchronisation.
    MultifdFlush,
    /// End of this section's body.
    EndOfSection,
}

/// Decodes the records of one channel, whose last named block it remembers.
#[derive(Clone, Debug, Default)]
pub struct RecordDecoder {
    last_block: Option<BlockId>,
    xbzrle: bool,
    mapped_ram: bool,
}

impl RecordDecoder {
    /// For a channel on which no block was named yet.
    #[must_use]
    pub const fn new() -> Self {
        Self::with_xbzrle(false)
    }

    /// The same, which with `xbzrle` takes encoded pages too (the capability `xbzrle`).
    #[must_use]
    pub const fn with_xbzrle(xbzrle: bool) -> Self {
        Self {
            last_block: None,
            xbzrle,
            mapped_ram: false,
        }
    }

    /// From here on there are no pages: they have their places in the file (`mapped-ram`).
    pub(crate) const fn refuse_pages(&mut self) {
        self.mapped_ram = true;
    }

    /// There is a new channel, on which no block was named yet.
    pub(crate) const fn reconnected(&mut self) {
        self.last_block = None;
    }

    /// Whether encoded pages are taken.
    #[must_use]
    pub const fn takes_xbzrle(&self) -> bool {
        self.xbzrle
    }

    /// Reads one record. Unless it is complete and valid the remembered block does not change.
    ///
    /// # Errors
    /// [`RamError`], or the bytes end before the record does.
    pub fn decode(
        &mut self,
        r: &mut Reader<'_>,
        blocks: &RamBlockTable,
    ) -> Result<Record, DecodeError> {
        let at = r.clone();
        let word = r.be64()?;
        let (offset, flags) = (word & !FLAGS, word & FLAGS);
        match flags {
            FLAG_MEM_SIZE => Ok(Record::MemSize { total: offset }),
            _ if self.mapped_ram && flags != FLAG_EOS => {
                Err(at.error(RamError::RecordInMappedRam { flags }))
            }
            FLAG_EOS | FLAG_MULTIFD_FLUSH if offset != 0 => {
                Err(at.error(RamError::UnexpectedOffset { flags, offset }))
            }
            FLAG_EOS => Ok(Record::EndOfSection),
            FLAG_MULTIFD_FLUSH => Ok(Record::MultifdFlush),
            FLAG_HOOK => Err(at.error(RamError::Hook)),
            _ => match flags & !FLAG_CONTINUE {
                FLAG_XBZRLE if !self.xbzrle => Err(at.error(RamError::Xbzrle)),
                kind @ (FLAG_ZERO | FLAG_PAGE | FLAG_XBZRLE) => {
                    let block = self.block(r, flags & FLAG_CONTINUE != 0, blocks)?;
                    check_offset(block, offset, blocks).map_err(|e| at.error(e))?;
                    let page = PageAddress { block, offset };
                    let record = match kind {
                        FLAG_ZERO => {
                            let fill = r.clone();
                            match r.u8()? {
                                0 => Record::Zero(page),
                                value => return Err(fill.error(RamError::FillByte { value })),
                            }
                        }
                        FLAG_XBZRLE => xbzrle_head(page, r)?,
                        _ => Record::Page(page),
                    };
                    self.last_block = Some(block);
                    Ok(record)
                }
                FLAG_COMPRESS_PAGE => Err(at.error(RamError::Compressed)),
                _ => Err(at.error(RamError::UnknownFlags { flags })),
            },
        }
    }

    fn block(
        &self,
        r: &mut Reader<'_>,
        continues: bool,
        blocks: &RamBlockTable,
    ) -> Result<BlockId, DecodeError> {
        let at = r.clone();
        if continues {
            return self
                .last_block
                .ok_or_else(|| at.error(RamError::NothingToContinue));
        }
        let name = r.counted()?;
        match blocks.find(name) {
            Some(block) if blocks.is_ignored(block) => {
                return Err(at.error(RamError::IgnoredBlock {
                    name: String::from_utf8_lossy(name).into_owned(),
                }));
            }
            Some(block) => return Ok(block),
            None => {}
        }
        Err(at.error(RamError::UnknownBlock {
            name: String::from_utf8_lossy(name).into_owned(),
        }))
    }
}

/// What stands before the bytes of an encoded page: the encoding and the length.
fn xbzrle_head(page: PageAddress, r: &mut Reader<'_>) -> Result<Record, DecodeError> {
    let at = r.clone();
    let encoding = r.u8()?;
    if encoding != XBZRLE_ENCODING {
        return Err(at.error(RamError::XbzrleEncoding { encoding }));
    }
    let len = r.be16()?;
    if u64::from(len) > PAGE_SIZE {
        return Err(at.error(RamError::XbzrleLength { len }));
    }
    Ok(Record::Xbzrle { page, len })
}

fn check_offset(block: BlockId, offset: u64, blocks: &RamBlockTable) -> Result<(), RamError> {
    // A block of another table cannot be remembered: the decoder only knows those it found.
    let (name, used_length) = blocks
        .get(block)
        .map_or(("", 0), |b| (b.name(), b.used_length()));
    // Both are multiples of the page size, so that a page that begins in the block ends in it.
    if offset < used_length {
        Ok(())
    } else {
        Err(RamError::OutOfBlock {
            name: name.to_owned(),
            offset,
            used_length,
        })
    }
}

/// Encodes the records of one channel, whose last named block it remembers for as long as the
/// channel lives (through all sections and COLO checkpoints).
#[derive(Clone, Debug, Default)]
pub struct RecordEncoder {
    last_block: Option<BlockId>,
}

impl RecordEncoder {
    /// The longest page record without its data, bytes.
    pub const MAX_LEN: usize = 8 + 1 + IdStr::MAX_LEN + 3;

    /// For a channel on which no block was named yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { last_block: None }
    }

    /// Appends the head of a page record; the page's [`PAGE_SIZE`] bytes are to follow.
    ///
    /// # Errors
    /// The address is not that of a page of `blocks`.
    pub fn page(
        &mut self,
        page: PageAddress,
        blocks: &RamBlockTable,
        out: &mut impl BufMut,
    ) -> Result<(), RamError> {
        self.head(FLAG_PAGE, page, blocks, out)
    }

    /// Appends the record of a zero page.
    ///
    /// # Errors
    /// The address is not that of a page of `blocks`.
    pub fn zero(
        &mut self,
        page: PageAddress,
        blocks: &RamBlockTable,
        out: &mut impl BufMut,
    ) -> Result<(), RamError> {
        self.head(FLAG_ZERO, page, blocks, out)?;
        out.put_u8(0);
        Ok(())
    }

    /// Appends the head of an encoded page's record; its `len` bytes are to follow.
    ///
    /// # Errors
    /// The address is not that of a page of `blocks`, or `len` is more than a page's.
    pub fn xbzrle(
        &mut self,
        page: PageAddress,
        len: u16,
        blocks: &RamBlockTable,
        out: &mut impl BufMut,
    ) -> Result<(), RamError> {
        if u64::from(len) > PAGE_SIZE {
            return Err(RamError::XbzrleLength { len });
        }
        self.head(FLAG_XBZRLE, page, blocks, out)?;
        out.put_u8(XBZRLE_ENCODING);
        out.put_u16(len);
        Ok(())
    }

    fn head(
        &mut self,
        flag: u64,
        page: PageAddress,
        blocks: &RamBlockTable,
        out: &mut impl BufMut,
    ) -> Result<(), RamError> {
        check_offset(page.block, page.offset, blocks)?;
        if page.offset & FLAGS != 0 {
            return Err(RamError::UnexpectedOffset {
                flags: flag,
                offset: page.offset,
            });
        }
        if self.last_block == Some(page.block) {
            out.put_u64(page.offset | flag | FLAG_CONTINUE);
        } else {
            out.put_u64(page.offset | flag);
            put_counted(out, blocks.get(page.block).map_or("", |b| b.name()));
            self.last_block = Some(page.block);
        }
        Ok(())
    }
}

/// Appends the end of a RAM section's body.
pub fn encode_end_of_section(out: &mut impl BufMut) {
    out.put_u64(FLAG_EOS);
}

/// Appends the mark of a multifd synchronisation.
pub fn encode_multifd_flush(out: &mut impl BufMut) {
    out.put_u64(FLAG_MULTIFD_FLUSH);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;
    use crate::ram::RamBlock;

    fn blocks() -> RamBlockTable {
        RamBlockTable::new(vec![
            RamBlock::new("pc.ram", 0x0400_0000).unwrap(),
            RamBlock::new("vga", 0x2000).unwrap(),
        ])
        .unwrap()
    }

    fn page(block: u32, offset: u64) -> PageAddress {
        PageAddress {
            block: BlockId::new(block),
            offset,
        }
    }

    fn cause(bytes: &[u8]) -> Cause {
        RecordDecoder::new()
            .decode(&mut Reader::new(bytes, 0), &blocks())
            .unwrap_err()
            .cause
    }

    #[test]
    fn only_the_first_record_of_a_block_names_it() {
        let mut out = Vec::new();
        let mut encoder = RecordEncoder::new();
        let blocks = blocks();
        encoder.page(page(0, 0x1000), &blocks, &mut out).unwrap();
        encoder.zero(page(0, 0x2000), &blocks, &mut out).unwrap();
        encode_multifd_flush(&mut out);
        encode_end_of_section(&mut out);
        encoder.zero(page(0, 0x3000), &blocks, &mut out).unwrap();
        encoder.page(page(1, 0), &blocks, &mut out).unwrap();
        assert_eq!(
            out,
            [
                b"\0\0\0\0\0\0\x10\x08\x06pc.ram".as_slice(),
                b"\0\0\0\0\0\0\x20\x22\0",
                b"\0\0\0\0\0\0\x02\0",
                b"\0\0\0\0\0\0\0\x10",
                b"\0\0\0\0\0\0\x30\x22\0",
                b"\0\0\0\0\0\0\0\x08\x03vga",
            ]
            .concat()
        );
        let mut r = Reader::new(&out, 0);
        let mut decoder = RecordDecoder::new();
        let mut next = || decoder.decode(&mut r, &blocks).unwrap();
        assert_eq!(next(), Record::Page(page(0, 0x1000)));
        assert_eq!(next(), Record::Zero(page(0, 0x2000)));
        assert_eq!(next(), Record::MultifdFlush);
        assert_eq!(next(), Record::EndOfSection);
        assert_eq!(next(), Record::Zero(page(0, 0x3000)));
        assert_eq!(next(), Record::Page(page(1, 0)));
        assert!(r.rest().is_empty());
    }

    #[test]
    fn the_size_record_is_the_bytes_that_qemu_sends() {
        let bytes = 0x0000_0000_040c_2004_u64.to_be_bytes();
        let record = RecordDecoder::new().decode(&mut Reader::new(&bytes, 0), &blocks());
        assert_eq!(record.unwrap(), Record::MemSize { total: 0x40c_2000 });
    }

    #[test]
    fn a_truncated_record_does_not_change_the_remembered_block() {
        let mut out = Vec::new();
        let blocks = blocks();
        RecordEncoder::new()
            .zero(page(1, 0), &blocks, &mut out)
            .unwrap();
        let mut decoder = RecordDecoder::new();
        for n in 0..out.len() {
            let e = decoder
                .decode(&mut Reader::new(&out[..n], 0), &blocks)
                .unwrap_err();
            assert!(e.missing().is_some());
            assert_eq!(decoder.last_block, None);
        }
    }

    #[test]
    fn a_page_that_continues_nothing_is_refused() {
        assert_eq!(
            cause(&0x28_u64.to_be_bytes()),
            RamError::NothingToContinue.into()
        );
    }

    #[test]
    fn a_page_of_an_unknown_block_is_refused() {
        assert_eq!(
            cause(b"\0\0\0\0\0\0\0\x08\x03foo"),
            RamError::UnknownBlock { name: "foo".into() }.into()
        );
    }

    #[test]
    fn a_page_beyond_its_block_is_refused() {
        for offset in [0x2000_u64, 0x1000_0000, 0xffff_ffff_ffff_f000] {
            let bytes = [&(offset | 8).to_be_bytes()[..], b"\x03vga"].concat();
            assert_eq!(
                cause(&bytes),
                RamError::OutOfBlock {
                    name: "vga".into(),
                    offset,
                    used_length: 0x2000
                }
                .into()
            );
        }
    }

    #[test]
    fn a_zero_page_that_is_not_zero_is_refused() {
        assert_eq!(
            cause(b"\0\0\0\0\0\0\0\x02\x03vga\x05"),
            RamError::FillByte { value: 5 }.into()
        );
    }

    #[test]
    fn flags_that_are_no_record_are_refused() {
        for flags in [
            0_u64, 0x001, 0x00a, 0x018, 0x020, 0x030, 0x220, 0x400, 0x800,
        ] {
            assert_eq!(
                cause(&flags.to_be_bytes()),
                RamError::UnknownFlags { flags }.into()
            );
        }
    }

    #[test]
    fn records_of_features_that_are_not_offered_are_refused_by_name() {
        for (flags, e) in [
            (0x40_u64, RamError::Xbzrle),
            (0x60, RamError::Xbzrle),
            (0x80, RamError::Hook),
            (0x100, RamError::Compressed),
            (0x120, RamError::Compressed),
        ] {
            assert_eq!(cause(&flags.to_be_bytes()), e.into());
        }
    }

    #[test]
    fn an_end_with_an_offset_is_refused() {
        for flags in [0x10_u64, 0x200] {
            assert_eq!(
                cause(&(0x1000 | flags).to_be_bytes()),
                RamError::UnexpectedOffset {
                    flags,
                    offset: 0x1000
                }
                .into()
            );
        }
    }

    #[test]
    fn an_address_that_is_no_page_cannot_be_encoded() {
        let mut out = Vec::new();
        for address in [page(0, 8), page(1, 0x2000), page(2, 0)] {
            assert!(
                RecordEncoder::new()
                    .page(address, &blocks(), &mut out)
                    .is_err()
            );
        }
        assert!(out.is_empty());
    }

    #[test]
    fn an_encoded_page_is_taken_only_where_xbzrle_is_on() {
        let blocks = blocks();
        let mut out = Vec::new();
        let mut encoder = RecordEncoder::new();
        encoder
            .xbzrle(page(1, 0x1000), 3, &blocks, &mut out)
            .unwrap();
        assert_eq!(out, b"\0\0\0\0\0\0\x10\x40\x03vga\x01\0\x03");
        let read = |bytes: &[u8]| {
            RecordDecoder::with_xbzrle(true).decode(&mut Reader::new(bytes, 0), &blocks)
        };
        assert_eq!(
            read(&out).unwrap(),
            Record::Xbzrle {
                page: page(1, 0x1000),
                len: 3
            }
        );
        assert_eq!(cause(&out), RamError::Xbzrle.into());
        for (bytes, error) in [
            (&[2, 0, 3], RamError::XbzrleEncoding { encoding: 2 }),
            (&[1, 0x10, 1], RamError::XbzrleLength { len: 4097 }),
        ] {
            let start = out.len() - 3;
            out[start..].copy_from_slice(bytes);
            assert_eq!(read(&out).unwrap_err().cause, error.into());
        }
        assert_eq!(
            encoder.xbzrle(page(1, 0), 4097, &blocks, &mut out),
            Err(RamError::XbzrleLength { len: 4097 })
        );
    }
}
