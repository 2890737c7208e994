//! Pages that come once the guest runs at the destination.

use crate::error::DecodeError;
use crate::ram::RamBlockTable;
use crate::raw::codec::Reader;
use crate::raw::ram::{RamError, Record, RecordDecoder};
use crate::raw::section::SectionError;

/// Decodes the RAM records of postcopy: pages, zero pages, marks of a multifd synchronisation and
/// the end. There is no block list any more, and there are no differences.
///
/// On the main stream it stands inside RAM sections, and ends with each of them. The channel of
/// `postcopy-preempt` has no sections and no magic: it begins with a record, has its own memory of
/// the block named last, and ends where it is closed, or with its first end mark (QEMU 7.1).
#[derive(Clone, Debug)]
pub struct PostcopyRecords {
    records: RecordDecoder,
    preempt: bool,
    ended: bool,
}

impl PostcopyRecords {
    /// For the main stream, whose records so far `records` has decoded.
    #[must_use]
    pub const fn of_main_stream(records: RecordDecoder) -> Self {
        Self {
            records,
            preempt: false,
            ended: false,
        }
    }

    /// For a new preempt channel.
    #[must_use]
    pub const fn of_preempt_channel() -> Self {
        Self {
            records: RecordDecoder::new(),
            preempt: true,
            ended: false,
        }
    }

    /// Reads one record. After a page the driver takes its [`PAGE_SIZE`](crate::PAGE_SIZE) bytes.
    ///
    /// # Errors
    /// [`RamError`], or the bytes end before the record does; [`SectionError::AfterEnd`] for
    /// anything after the end of a preempt channel.
    pub fn next(
        &mut self,
        r: &mut Reader<'_>,
        blocks: &RamBlockTable,
    ) -> Result<Record, DecodeError> {
        let at = r.clone();
        if self.ended {
            return Err(at.error(SectionError::AfterEnd));
        }
        match self.records.decode(r, blocks)? {
            Record::MemSize { .. } => Err(at.error(RamError::UnexpectedSetup)),
            Record::Xbzrle { .. } => Err(at.error(RamError::Xbzrle)),
            Record::MultifdFlush if self.preempt => Err(at.error(RamError::UnexpectedFlush)),
            record => {
                self.ended = self.preempt && record == Record::EndOfSection;
                Ok(record)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;
    use crate::ram::{BlockId, RamBlock};
    use crate::raw::ram::PageAddress;

    const PAGE: &[u8] = b"\0\0\0\0\0\0\x10\x08\x06pc.ram";
    const NEXT_ZERO: &[u8] = b"\0\0\0\0\0\0\x20\x22\0";
    const FLUSH: &[u8] = b"\0\0\0\0\0\0\x02\0";
    const EOS: &[u8] = b"\0\0\0\0\0\0\0\x10";

    fn blocks() -> RamBlockTable {
        RamBlockTable::new(vec![RamBlock::new("pc.ram", 0x4000).unwrap()]).unwrap()
    }

    fn page(offset: u64) -> PageAddress {
        PageAddress {
            block: BlockId::new(0),
            offset,
        }
    }

    fn cause(mut records: PostcopyRecords, bytes: &[u8]) -> Cause {
        let mut r = Reader::new(bytes, 0);
        records.next(&mut r, &blocks()).unwrap_err().cause
    }

    #[test]
    fn a_preempt_channel_has_pages_and_one_end() {
        let bytes = [PAGE, NEXT_ZERO, EOS, EOS].concat();
        let mut records = PostcopyRecords::of_preempt_channel();
        let mut r = Reader::new(&bytes, 0);
        for expected in [
            Record::Page(page(0x1000)),
            Record::Zero(page(0x2000)),
            Record::EndOfSection,
        ] {
            assert_eq!(records.next(&mut r, &blocks()).unwrap(), expected);
        }
        let e = records.next(&mut r, &blocks()).unwrap_err();
        assert_eq!(e.cause, SectionError::AfterEnd.into());
    }

    #[test]
    fn a_record_cut_off_anywhere_asks_for_more() {
        for n in 0..PAGE.len() {
            let mut records = PostcopyRecords::of_preempt_channel();
            let e = records.next(&mut Reader::new(&PAGE[..n], 0), &blocks());
            assert!(e.unwrap_err().missing().is_some());
        }
    }

    #[test]
    fn the_main_stream_goes_on_with_its_block_and_ends_again_and_again() {
        let mut before = RecordDecoder::with_xbzrle(true);
        before.decode(&mut Reader::new(PAGE, 0), &blocks()).unwrap();
        let mut records = PostcopyRecords::of_main_stream(before.clone());
        let bytes = [NEXT_ZERO, FLUSH, EOS, EOS].concat();
        let mut r = Reader::new(&bytes, 0);
        for expected in [
            Record::Zero(page(0x2000)),
            Record::MultifdFlush,
            Record::EndOfSection,
            Record::EndOfSection,
        ] {
            assert_eq!(records.next(&mut r, &blocks()).unwrap(), expected);
        }
        let difference = b"\0\0\0\0\0\0\0\x60\x01\0\x04";
        assert_eq!(
            cause(PostcopyRecords::of_main_stream(before), difference),
            RamError::Xbzrle.into()
        );
    }

    #[test]
    fn what_no_postcopy_has_is_refused() {
        let main = || PostcopyRecords::of_main_stream(RecordDecoder::new());
        let preempt = PostcopyRecords::of_preempt_channel;
        let list = b"\0\0\0\0\0\0\x40\x04";
        for records in [main(), preempt()] {
            assert_eq!(
                cause(records.clone(), list),
                RamError::UnexpectedSetup.into()
            );
            assert_eq!(
                cause(records, NEXT_ZERO),
                RamError::NothingToContinue.into()
            );
        }
        assert_eq!(cause(preempt(), FLUSH), RamError::UnexpectedFlush.into());
    }
}
