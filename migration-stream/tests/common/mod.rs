//! What several tests of the stream share.
#![allow(dead_code)] // each test file uses a part of it

pub mod guest;
pub mod loads;

use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::decoder::{Item, RamItem, Step, StreamDecoder};
use migration_stream::raw::header;
use migration_stream::raw::ram::{
    RecordEncoder, encode_end_of_section, encode_multifd_flush, encode_setup_list,
};
use migration_stream::raw::section::{
    encode_continuation, encode_eof, encode_footer, encode_vm_description,
};
use migration_stream::{DecodeError, PAGE_SIZE};

pub fn table(blocks: &[(&str, u64)]) -> RamBlockTable {
    RamBlockTable::new(
        blocks
            .iter()
            .map(|(n, l)| RamBlock::new(*n, *l).unwrap())
            .collect(),
    )
    .unwrap()
}

/// How many bytes of payload the driver takes after an item; device bodies are not among them.
pub fn payload_len(item: &Item) -> usize {
    match item {
        Item::Ram(RamItem::Page(_)) => usize::try_from(PAGE_SIZE).unwrap(),
        Item::Ram(RamItem::Xbzrle { len, .. }) => usize::from(*len),
        Item::VmDescription { len } => usize::try_from(*len).unwrap(),
        _ => 0,
    }
}

/// Drives `decoder` through `bytes`, which become visible `piece` bytes at a time, until they are
/// used up.
pub fn decode_all(
    decoder: &mut StreamDecoder,
    bytes: &[u8],
    piece: usize,
) -> Result<Vec<Item>, DecodeError> {
    let mut items = Vec::new();
    let (mut start, mut end) = (0, 0);
    while start < bytes.len() {
        let visible = &bytes[start..end.max(start)];
        let mut r = Reader::new(visible, start as u64);
        let step = decoder.next(&mut r)?;
        start += r.consumed();
        match step {
            Step::NeedMore { at_least } => {
                assert!(at_least > 0);
                if end >= bytes.len() {
                    break;
                }
                end = (end.max(start) + piece).min(bytes.len());
            }
            Step::Item(item) => {
                start += payload_len(&item);
                items.push(item);
            }
        }
    }
    Ok(items)
}

/// The stream of these items, with the payloads that go after them.
pub fn bytes_of(items: &[Item], payloads: &mut impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut records = RecordEncoder::new();
    let mut blocks = None;
    for item in items {
        match item {
            Item::Header => header::encode(&mut out),
            Item::Configuration(configuration) => configuration.encode(&mut out),
            Item::Command(command) => command.encode(&mut out),
            Item::Section(header) => header.encode(&mut out),
            Item::Continuation { kind, id } => encode_continuation(*kind, *id, &mut out),
            Item::Ram(RamItem::BlockList(list)) => {
                encode_setup_list(list, &mut out);
                blocks = Some(list);
            }
            // What is read from a file cannot be one piece of bytes.
            Item::Ram(RamItem::MappedBlock { .. }) => panic!("{item:?}"),
            Item::Ram(RamItem::Page(page)) => {
                records.page(*page, blocks.unwrap(), &mut out).unwrap();
            }
            Item::Ram(RamItem::Zero(page)) => {
                records.zero(*page, blocks.unwrap(), &mut out).unwrap();
            }
            Item::Ram(RamItem::Xbzrle { page, len }) => {
                let blocks = blocks.unwrap();
                records.xbzrle(*page, *len, blocks, &mut out).unwrap();
            }
            Item::Ram(RamItem::MultifdFlush) => encode_multifd_flush(&mut out),
            Item::Ram(RamItem::EndOfSection) => encode_end_of_section(&mut out),
            Item::Footer(id) => encode_footer(*id, &mut out),
            Item::Eof => encode_eof(&mut out),
            Item::VmDescription { len } => encode_vm_description(*len, &mut out),
        }
        if payload_len(item) > 0 {
            out.extend(payloads.next().unwrap());
        }
    }
    out
}
