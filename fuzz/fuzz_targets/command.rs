//! A command: what is read is written again in the same bytes.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::codec::Reader;
use migration_stream::command::Command;

fuzz_target!(|data: &[u8]| {
    let mut reader = Reader::new(data, 0);
    if let Ok(command) = Command::decode(&mut reader) {
        let mut again = Vec::new();
        command.encode(&mut again);
        // The byte that says that it is one has been read before.
        assert_eq!(again.split_first(), Some((&8, &data[..reader.consumed()])));
    }
});
