//! The return path: every message that is read is written again in the same bytes, and so are
//! requests for pages and bitmaps of received ones.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::PAGE_SIZE;
use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::postcopy::{ReceivedBitmap, RequestDecoder, RequestEncoder};
use migration_stream::raw::return_path::ReturnPathMessage;

fn blocks() -> RamBlockTable {
    let block = |name, pages| RamBlock::new(name, pages * PAGE_SIZE).expect("a block");
    RamBlockTable::new(vec![block("pc.ram", 70), block("vga", 2)]).expect("two blocks")
}

fuzz_target!(|data: &[u8]| {
    let blocks = blocks();
    let mut requests = (RequestDecoder::new(), RequestEncoder::new());
    let mut mirror = RequestDecoder::new();
    let mut rest = data;
    while !rest.is_empty() {
        let mut reader = Reader::new(rest, 0);
        let Ok(message) = ReturnPathMessage::decode(&mut reader) else {
            break;
        };
        let read = reader.consumed();
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(again, rest[..read]);
        if let Ok(Some(request)) = requests.0.request(&message, &blocks) {
            let asked = requests.1.request(request, &blocks).expect("it was one");
            assert_eq!(mirror.request(&asked, &blocks), Ok(Some(request)));
        }
        if let ReturnPathMessage::RecvBitmap { block } = message
            && let Ok((_, of)) = ReceivedBitmap::block_of(&block, &blocks)
        {
            let Ok(bitmap) = ReceivedBitmap::decode(&mut reader, of) else {
                break;
            };
            let mut again = Vec::new();
            bitmap.encode(block, &mut again);
            let end = reader.consumed();
            let mut reader = Reader::new(&again[read..], 0);
            assert_eq!(
                ReceivedBitmap::decode(&mut reader, of).as_ref(),
                Ok(&bitmap)
            );
            assert_eq!(again.len(), end);
        }
        rest = &rest[reader.consumed()..];
    }
});
