//! The block list with which a RAM section is set up (`migration/ram.c`, QEMU 11.1).
//!
//! ```text
//! be64 total | 0x004  { counted idstr  be64 used length }  until the lengths sum up to the total
//! ```
//!
//! The optional fields of postcopy (block page size), `x-ignore-shared` (guest physical address)
//! and `mapped-ram` (header) are absent: those capabilities are not offered.

use bytes::BufMut;

use super::record::{FLAG_MEM_SIZE, FLAGS};
use super::{RamBlock, RamBlockTable, RamError};
use crate::codec::{IdStr, Reader, put_counted};
use crate::error::DecodeError;

/// Appends the block list.
pub fn encode_setup_list(blocks: &RamBlockTable, out: &mut impl BufMut) {
    // Every length is a multiple of the page size, so that the flag's bit is free.
    out.put_u64(blocks.total_bytes() | FLAG_MEM_SIZE);
    for (_, block) in blocks.iter() {
        put_counted(out, block.name());
        out.put_u64(block.used_length());
    }
}

/// Decodes a block list entry by entry, so that no more than one entry need be there at a time.
#[derive(Clone, Debug)]
pub struct SetupDecoder {
    remaining: u64,
    blocks: Vec<RamBlock>,
}

impl SetupDecoder {
    /// The longest entry, bytes.
    pub const MAX_ENTRY_LEN: usize = 1 + IdStr::MAX_LEN + 8;

    /// For the entries after a size record of `total` bytes.
    #[must_use]
    pub const fn new(total: u64) -> Self {
        Self {
            remaining: total,
            blocks: Vec::new(),
        }
    }

    /// Reads the size record with which a set-up begins; no other record can be read before the
    /// blocks are known.
    ///
    /// # Errors
    /// [`RamError::SetupMissing`] for any other record, or the bytes end before it does.
    pub fn begin(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.clone();
        match r.be64()? {
            word if word & FLAGS == FLAG_MEM_SIZE => Ok(Self::new(word & !FLAGS)),
            word => Err(at.error(RamError::SetupMissing {
                flags: word & FLAGS,
            })),
        }
    }

    /// Whether the lengths sum up to the total: the list ends here.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.remaining == 0
    }

    /// Reads one entry.
    ///
    /// # Errors
    /// [`RamError`], or the bytes end before the entry does; then nothing has changed.
    pub fn entry(&mut self, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        let at = r.clone();
        let name = r.idstr()?;
        let used_length = r.be64()?;
        let block =
            RamBlock::new(name.as_str(), used_length).map_err(|e| at.error(RamError::Block(e)))?;
        if self.blocks.len() == RamBlockTable::MAX_BLOCKS {
            return Err(at.error(RamError::Block(super::RamBlockError::Count {
                count: self.blocks.len() + 1,
            })));
        }
        self.remaining = self.remaining.checked_sub(used_length).ok_or_else(|| {
            at.error(RamError::SetupOverrun {
                name: block.name().to_owned(),
                used_length,
                remaining: self.remaining,
            })
        })?;
        self.blocks.push(block);
        Ok(())
    }

    /// The announced blocks, in the order announced. To be called when the list
    /// [is complete](Self::is_complete).
    ///
    /// # Errors
    /// The list is empty or names a block twice.
    pub fn finish(&mut self) -> Result<RamBlockTable, RamError> {
        Ok(RamBlockTable::new(std::mem::take(&mut self.blocks))?)
    }
}

/// Whether the blocks `announced` by a source are those of this side: the same names with the same
/// lengths, in any order.
///
/// # Errors
/// The first difference.
pub fn check_announced(local: &RamBlockTable, announced: &RamBlockTable) -> Result<(), RamError> {
    for (_, block) in announced.iter() {
        let here = local
            .find(block.name().as_bytes())
            .and_then(|id| local.get(id));
        match here {
            None => {
                return Err(RamError::UnknownBlock {
                    name: block.name().to_owned(),
                });
            }
            Some(here) if here.used_length() != block.used_length() => {
                return Err(RamError::BlockLength {
                    name: block.name().to_owned(),
                    received: block.used_length(),
                    local: here.used_length(),
                });
            }
            Some(_) => {}
        }
    }
    match local
        .iter()
        .find(|(_, b)| announced.find(b.name().as_bytes()).is_none())
    {
        None => Ok(()),
        Some((_, block)) => Err(RamError::BlockMissing {
            name: block.name().to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(blocks: &[(&str, u64)]) -> RamBlockTable {
        RamBlockTable::new(
            blocks
                .iter()
                .map(|(n, l)| RamBlock::new(*n, *l).unwrap())
                .collect(),
        )
        .unwrap()
    }

    #[test]
    fn the_list_is_the_bytes_that_qemu_sends_and_reads_back() {
        let blocks = table(&[("pc.ram", 0x0400_0000), ("vga", 0xc2000)]);
        let mut out = Vec::new();
        encode_setup_list(&blocks, &mut out);
        assert_eq!(
            out,
            b"\0\0\0\0\x04\x0c\x20\x04\x06pc.ram\0\0\0\0\x04\0\0\0\x03vga\0\0\0\0\0\x0c\x20\0"
        );
        let mut r = Reader::new(&out[8..], 0);
        let mut decoder = SetupDecoder::new(0x040c_2000);
        while !decoder.is_complete() {
            decoder.entry(&mut r).unwrap();
        }
        assert!(r.rest().is_empty());
        assert_eq!(decoder.finish().unwrap(), blocks);
    }

    #[test]
    fn c18_a_total_smaller_than_its_blocks_is_refused_instead_of_wrapping() {
        let entry = b"\x03vga\0\0\0\0\0\0\x20\0";
        let mut decoder = SetupDecoder::new(0x1000);
        let e = decoder.entry(&mut Reader::new(entry, 0x40)).unwrap_err();
        assert_eq!(
            e.to_string(),
            "byte 0x40 of the stream: ram block 'vga' of 0x2000 bytes, but only 0x1000 of the \
             announced total are left"
        );
    }

    #[test]
    fn c18_a_list_that_never_reaches_its_total_is_bounded() {
        let mut decoder = SetupDecoder::new(!0xfff);
        let mut result = Ok(());
        let mut entries = 0;
        while result.is_ok() {
            let name = format!("b{entries}");
            let mut out = Vec::new();
            put_counted(&mut out, &name);
            out.put_u64(0x1000);
            result = decoder.entry(&mut Reader::new(&out, 0));
            entries += 1;
        }
        assert_eq!(entries, RamBlockTable::MAX_BLOCKS + 1);
    }

    #[test]
    fn c18_a_block_of_no_length_is_refused() {
        let mut decoder = SetupDecoder::new(0x1000);
        assert!(
            decoder
                .entry(&mut Reader::new(b"\x03vga\0\0\0\0\0\0\0\0", 0))
                .is_err()
        );
    }

    #[test]
    fn every_way_in_which_the_blocks_of_two_sides_differ_is_named() {
        let local = table(&[("pc.ram", 0x0200_0000), ("vga", 0x2000)]);
        let check = |blocks: &[(&str, u64)]| check_announced(&local, &table(blocks));
        assert_eq!(check(&[("vga", 0x2000), ("pc.ram", 0x0200_0000)]), Ok(()));
        assert_eq!(
            check(&[("foo", 0x2000)]),
            Err(RamError::UnknownBlock { name: "foo".into() })
        );
        assert_eq!(
            check(&[("pc.ram", 0x0100_0000)]).unwrap_err().to_string(),
            "ram block 'pc.ram' of 0x1000000 bytes, expected 0x2000000"
        );
        assert_eq!(
            check(&[("pc.ram", 0x0200_0000)]),
            Err(RamError::BlockMissing { name: "vga".into() })
        );
    }
}
