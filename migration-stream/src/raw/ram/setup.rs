//! The block list with which a RAM section is set up (`migration/ram.c`, QEMU 11.1).
//!
//! ```text
//! be64 total | 0x004  { counted idstr  be64 used length }  until the lengths sum up to the total
//! ```
//!
//! Three capabilities put more into each entry, in this order: `postcopy-ram`, which the ADVISE command
//! announces, the page size of a block that consists of huge pages (be64); `x-ignore-shared` the block's
//! guest physical address (be64); `mapped-ram` the places of its pages in the file ([`MappedArea`]). The
//! configuration section names the last two.
//!
//! Nothing says which blocks have a page size: a destination of QEMU knows it from its own blocks. It can
//! be told apart all the same. It is a power of two that ADVISE has named, while a name begins with a
//! length that is not 0, an address is a multiple of the page size, and a record has a flag.

use bytes::BufMut;

use super::RamError;
use super::record::{FLAG_MEM_SIZE, FLAGS};
use crate::error::DecodeError;
use crate::name::put_counted;
use crate::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable};
use crate::raw::codec::Reader;
use crate::raw::configuration::{IGNORE_SHARED, MAPPED_RAM};
use crate::raw::mapped_ram::{HEADER_LEN, LayoutError, MappedArea};
use crate::{Configuration, IdStr, PAGE_SIZE};

/// Eight bytes that begin with a name are this number at least.
const NAME: u64 = 1 << 56;

/// Which optional fields the entries of a block list have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetupFields {
    /// The guest physical address (the capability `x-ignore-shared`).
    pub address: bool,
    /// The places of the pages in the file (the capability `mapped-ram`).
    pub mapped_ram: bool,
    /// The page sizes of all blocks, combined by OR, as the ADVISE command has them; 0 without the
    /// capability `postcopy-ram`. An entry has the page size of its block if that is a huge page.
    pub page_sizes: u64,
}

impl SetupFields {
    /// Those of a stream with this configuration section: QEMU names there both capabilities that
    /// change the block list.
    #[must_use]
    pub fn of(configuration: &Configuration) -> Self {
        Self {
            address: configuration.has(IGNORE_SHARED),
            mapped_ram: configuration.has(MAPPED_RAM),
            page_sizes: 0,
        }
    }
}

/// Appends the block list; with addresses if the table is one
/// [ignoring shared blocks](RamBlockTable::ignoring_shared), and without `mapped-ram`.
pub fn encode_setup_list(blocks: &RamBlockTable, out: &mut impl BufMut) {
    put_total(blocks, out);
    for (_, block) in blocks.iter() {
        put_counted(out, block.name());
        out.put_u64(block.used_length());
        if blocks.ignores_shared() {
            out.put_u64(block.address());
        }
    }
}

/// Whether this is the size record of a block list, and a size that memory can have.
pub(crate) const fn is_setup_total(word: u64) -> bool {
    word & FLAGS == FLAG_MEM_SIZE && word & !FLAGS != 0
}

/// Appends what goes before the entries.
pub(crate) fn put_total(blocks: &RamBlockTable, out: &mut impl BufMut) {
    // Every length is a multiple of the page size, so that the flag's bit is free.
    out.put_u64(blocks.total_bytes() | FLAG_MEM_SIZE);
}

/// An entry that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetupEntry<'a> {
    /// Its position in the list.
    pub index: BlockId,
    /// The block.
    pub block: &'a RamBlock,
    /// Where its pages are, with `mapped-ram` and unless it is a block that both sides share.
    pub area: Option<MappedArea>,
}

/// Decodes a block list entry by entry, so that no more than one entry need be there at a time.
#[derive(Clone, Debug)]
pub struct SetupDecoder {
    remaining: u64,
    fields: SetupFields,
    blocks: Vec<RamBlock>,
}

impl SetupDecoder {
    /// The longest entry, bytes.
    pub const MAX_ENTRY_LEN: usize = 1 + IdStr::MAX_LEN + 8 + 8 + 8 + HEADER_LEN;

    /// For the entries after a size record of `total` bytes.
    #[must_use]
    pub const fn new(total: u64, fields: SetupFields) -> Self {
        Self {
            remaining: total,
            fields,
            blocks: Vec::new(),
        }
    }

    /// Reads the size record with which a set-up begins; no other record can be read before the
    /// blocks are known.
    ///
    /// # Errors
    /// [`RamError::SetupMissing`] for any other record, or the bytes end before it does.
    pub fn begin(r: &mut Reader<'_>, fields: SetupFields) -> Result<Self, DecodeError> {
        let at = r.clone();
        match r.be64()? {
            word if word & FLAGS == FLAG_MEM_SIZE => Ok(Self::new(word & !FLAGS, fields)),
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

    /// Reads one entry. Where it has an area the list goes on [behind that](MappedArea::end), and
    /// the reader's offset has to be the one in the file.
    ///
    /// # Errors
    /// [`RamError`], or the bytes end before the entry does; then nothing has changed.
    pub fn entry(&mut self, r: &mut Reader<'_>) -> Result<SetupEntry<'_>, DecodeError> {
        let at = r.clone();
        let name = r.idstr()?;
        let used_length = r.be64()?;
        let mut block =
            RamBlock::new(name.as_str(), used_length).map_err(|e| at.error(RamError::Block(e)))?;
        self.pass_page_size(r)?;
        if self.fields.address {
            block = block.at(r.be64()?);
        }
        let area = if self.fields.mapped_ram {
            self.area(&block, r)?
        } else {
            None
        };
        if self.blocks.len() == RamBlockTable::MAX_BLOCKS {
            return Err(at.error(RamError::Block(RamBlockError::Count {
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
        if self.fields.mapped_ram && self.fields.address && area.is_none() {
            block = block.shared();
        }
        #[allow(clippy::cast_possible_truncation)] // fewer than MAX_BLOCKS
        let index = BlockId::new(self.blocks.len() as u32);
        self.blocks.push(block);
        // Just pushed.
        let block = self.blocks.last();
        let block = block.ok_or_else(|| at.error(RamError::NotSetUp))?;
        Ok(SetupEntry { index, block, area })
    }

    /// Passes over the page size of a block of huge pages, if one is next. It is of no use here: pages
    /// of the target's size are what the stream has.
    fn pass_page_size(&self, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        if self.fields.page_sizes & !PAGE_SIZE == 0 {
            return Ok(());
        }
        let mut ahead = r.clone();
        let word = ahead.be64()?;
        let is_named = word.is_power_of_two()
            && word > PAGE_SIZE
            && word < NAME
            && self.fields.page_sizes & word != 0;
        if !is_named {
            return Ok(());
        }
        if self.fields.address {
            // What would be the address of this block if the word is its page size.
            let address = ahead.clone().be64()?;
            if address >= NAME || !address.is_multiple_of(PAGE_SIZE) {
                return Ok(());
            }
        }
        *r = ahead;
        Ok(())
    }

    /// The place of `block`'s pages; `None` for a block that both sides share, which has none.
    fn area(
        &self,
        block: &RamBlock,
        r: &mut Reader<'_>,
    ) -> Result<Option<MappedArea>, DecodeError> {
        let at = r.clone();
        let bytes = r.array::<HEADER_LEN>()?;
        let area = MappedArea::decode(&bytes, r.offset(), block.used_length());
        match area {
            Err(LayoutError::NoArea) if self.fields.address => Ok(None),
            other => other.map(Some).map_err(|source| {
                at.error(RamError::MappedRam {
                    name: block.name().to_owned(),
                    source,
                })
            }),
        }
    }

    /// The announced blocks, in the order announced. To be called when the list
    /// [is complete](Self::is_complete).
    ///
    /// # Errors
    /// The list is empty or names a block twice.
    pub fn finish(&mut self) -> Result<RamBlockTable, RamError> {
        let table = RamBlockTable::new(std::mem::take(&mut self.blocks))?;
        Ok(if self.fields.address {
            table.ignoring_shared()
        } else {
            table
        })
    }
}

/// Whether the blocks `announced` by a source are those of this side: the same names with the same
/// lengths, in any order, and what is shared at the same address.
///
/// # Errors
/// The first difference.
pub fn check_announced(local: &RamBlockTable, announced: &RamBlockTable) -> Result<(), RamError> {
    let received = announced.ignores_shared();
    if local.ignores_shared() != received {
        return Err(RamError::IgnoreShared { received });
    }
    for (_, block) in announced.iter() {
        find_announced(local, block)?;
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

/// Which block of this side an announced one is.
///
/// # Errors
/// There is none, or it is another in length or, where it is shared, in address.
pub(crate) fn find_announced(local: &RamBlockTable, block: &RamBlock) -> Result<BlockId, RamError> {
    let name = || block.name().to_owned();
    let id = local.find(block.name().as_bytes());
    let (id, here) = id
        .and_then(|id| Some((id, local.get(id)?)))
        .ok_or_else(|| RamError::UnknownBlock { name: name() })?;
    if here.used_length() != block.used_length() {
        return Err(RamError::BlockLength {
            name: name(),
            received: block.used_length(),
            local: here.used_length(),
        });
    }
    if local.is_ignored(id) && here.address() != block.address() {
        return Err(RamError::Address {
            name: name(),
            received: block.address(),
            local: here.address(),
        });
    }
    Ok(id)
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
        let mut decoder = SetupDecoder::new(0x040c_2000, SetupFields::default());
        while !decoder.is_complete() {
            decoder.entry(&mut r).unwrap();
        }
        assert!(r.rest().is_empty());
        assert_eq!(decoder.finish().unwrap(), blocks);
    }

    /// Entries with what they have behind their lengths, and a record behind the list.
    fn entries(list: &[(&str, u64, &[u64])]) -> (u64, Vec<u8>) {
        let mut out = Vec::new();
        for (name, length, more) in list {
            put_counted(&mut out, name);
            out.put_u64(*length);
            more.iter().for_each(|word| out.put_u64(*word));
        }
        out.put_u64(0x10);
        (list.iter().map(|(_, length, _)| length).sum(), out)
    }

    const HUGE: u64 = 2 << 20;

    fn read(fields: SetupFields, (total, bytes): (u64, Vec<u8>)) -> RamBlockTable {
        let mut r = Reader::new(&bytes, 0);
        let mut decoder = SetupDecoder::new(total, fields);
        while !decoder.is_complete() {
            decoder.entry(&mut r).unwrap();
        }
        assert_eq!(r.rest(), 0x10u64.to_be_bytes());
        decoder.finish().unwrap()
    }

    #[test]
    fn the_page_sizes_of_huge_pages_are_passed_over() {
        let fields = SetupFields {
            page_sizes: HUGE | PAGE_SIZE,
            ..SetupFields::default()
        };
        let list = entries(&[
            ("pc.ram", 64 << 20, &[HUGE]),
            ("vga", 0xc2000, &[]),
            ("more", HUGE, &[HUGE]),
        ]);
        let blocks = table(&[("pc.ram", 64 << 20), ("vga", 0xc2000), ("more", HUGE)]);
        assert_eq!(read(fields, list), blocks);
    }

    #[test]
    fn a_page_size_is_told_from_an_address() {
        let fields = SetupFields {
            page_sizes: HUGE | PAGE_SIZE,
            address: true,
            ..SetupFields::default()
        };
        for list in [
            entries(&[("a", HUGE, &[HUGE, 0]), ("b", HUGE, &[HUGE])]),
            entries(&[("b", HUGE, &[HUGE]), ("a", HUGE, &[HUGE, HUGE])]),
        ] {
            assert_eq!(read(fields, list).len(), 2);
        }
        // No size that ADVISE has not named.
        let (total, bytes) = entries(&[("a", HUGE, &[1 << 30])]);
        let fields = SetupFields {
            address: false,
            ..fields
        };
        let mut decoder = SetupDecoder::new(total, fields);
        let mut r = Reader::new(&bytes, 0);
        decoder.entry(&mut r).unwrap();
        assert_eq!(r.rest().len(), 16);
    }

    #[test]
    fn c18_a_total_smaller_than_its_blocks_is_refused_instead_of_wrapping() {
        let entry = b"\x03vga\0\0\0\0\0\0\x20\0";
        let mut decoder = SetupDecoder::new(0x1000, SetupFields::default());
        let e = decoder.entry(&mut Reader::new(entry, 0x40)).unwrap_err();
        assert_eq!(
            e.to_string(),
            "byte 0x40 of the stream: ram block 'vga' of 0x2000 bytes, but only 0x1000 of the \
             announced total are left"
        );
    }

    #[test]
    fn c18_a_list_that_never_reaches_its_total_is_bounded() {
        let mut decoder = SetupDecoder::new(!0xfff, SetupFields::default());
        let mut result = Ok(());
        let mut entries = 0;
        while result.is_ok() {
            let name = format!("b{entries}");
            let mut out = Vec::new();
            put_counted(&mut out, &name);
            out.put_u64(0x1000);
            result = decoder.entry(&mut Reader::new(&out, 0)).map(drop);
            entries += 1;
        }
        assert_eq!(entries, RamBlockTable::MAX_BLOCKS + 1);
    }

    #[test]
    fn c18_a_block_of_no_length_is_refused() {
        let mut decoder = SetupDecoder::new(0x1000, SetupFields::default());
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

    #[test]
    fn a_list_of_shared_blocks_has_addresses_that_are_compared() {
        let blocks = |address| {
            let block = RamBlock::new("pc.ram", 0x2000).unwrap().shared();
            RamBlockTable::new(vec![block.at(address)])
                .unwrap()
                .ignoring_shared()
        };
        let mut out = Vec::new();
        encode_setup_list(&blocks(0x1000), &mut out);
        assert_eq!(
            out,
            b"\0\0\0\0\0\0\x20\x04\x06pc.ram\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\x10\0"
        );
        let fields = SetupFields {
            address: true,
            mapped_ram: false,
            page_sizes: 0,
        };
        let mut r = Reader::new(&out, 0);
        let mut decoder = SetupDecoder::begin(&mut r, fields).unwrap();
        decoder.entry(&mut r).unwrap();
        let announced = decoder.finish().unwrap();
        assert_eq!(check_announced(&blocks(0x1000), &announced), Ok(()));
        assert_eq!(
            check_announced(&blocks(0), &announced),
            Err(RamError::Address {
                name: "pc.ram".into(),
                received: 0x1000,
                local: 0
            })
        );
        assert_eq!(
            check_announced(&table(&[("pc.ram", 0x2000)]), &announced),
            Err(RamError::IgnoreShared { received: true })
        );
    }
}
