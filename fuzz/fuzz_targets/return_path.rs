//! The return path: every message that is read is written again in the same bytes.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::codec::Reader;
use migration_stream::return_path::ReturnPathMessage;

fuzz_target!(|data: &[u8]| {
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
        rest = &rest[read..];
    }
});
