//! The main stream, item by item: the same items, or the same error, however the bytes arrive.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::decoder::{Item, RamItem, Step, StreamDecoder};
use migration_stream::{ConfigurationRule, DecodeError, DecoderConfig, PAGE_SIZE};

fn decoder(choice: u8) -> StreamDecoder {
    let rule = if choice & 1 == 0 {
        ConfigurationRule::Any
    } else {
        ConfigurationRule::Absent
    };
    let config = DecoderConfig::new(rule)
        .footers(choice & 2 == 0)
        .xbzrle(choice & 4 != 0)
        .flush_each_section(choice & 8 != 0);
    let blocks = (choice & 16 != 0).then(|| {
        let block = |name, pages| RamBlock::new(name, pages * PAGE_SIZE).expect("a block");
        RamBlockTable::new(vec![block("pc.ram", 30), block("vga", 2)]).expect("two blocks")
    });
    StreamDecoder::new(config, blocks)
}

/// What a driver takes after an item.
fn payload(item: &Item) -> usize {
    match item {
        Item::Ram(RamItem::Page(_)) => 4096,
        Item::Ram(RamItem::Xbzrle { len, .. }) => usize::from(*len),
        Item::VmDescription { len } => usize::try_from(*len).expect("64 bits"),
        _ => 0,
    }
}

fn decode(choice: u8, bytes: &[u8], piece: usize) -> (Vec<Item>, Option<DecodeError>) {
    let mut decoder = decoder(choice);
    let mut items = Vec::new();
    let (mut start, mut end) = (0, 0);
    while start < bytes.len() {
        let mut reader = Reader::new(&bytes[start..end.max(start)], start as u64);
        let step = match decoder.next(&mut reader) {
            Ok(step) => step,
            Err(error) => return (items, Some(error)),
        };
        start += reader.consumed();
        match step {
            Step::NeedMore { at_least } => {
                assert!(at_least > 0);
                if end >= bytes.len() {
                    break;
                }
                end = (end.max(start) + piece).min(bytes.len());
            }
            Step::Item(item) => {
                start = start.saturating_add(payload(&item));
                items.push(item);
            }
        }
    }
    (items, None)
}

fuzz_target!(|data: &[u8]| {
    let (choice, rest) = fuzz::choice(data);
    let (piece, bytes) = fuzz::choice(rest);
    let whole = decode(choice, bytes, bytes.len().max(1));
    let pieces = decode(choice, bytes, usize::from(piece) + 1);
    assert_eq!(whole, pieces);
});
