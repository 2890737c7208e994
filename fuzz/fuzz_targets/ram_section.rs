//! The RAM section behind a good beginning of a stream, by all that a target does with it: pages land in
//! memory only where the announced blocks are.
#![no_main]
#![allow(missing_docs)] // a target has no API

use fuzz::{Bytes, load};
use libfuzzer_sys::fuzz_target;
use migration_stream::StreamReader;
use migration_stream::ram::NoMultifd;

const BEGINNING: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1\
    \x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04";

fuzz_target!(|data: &[u8]| {
    let (choice, rest) = fuzz::choice(data);
    let (piece, bytes) = fuzz::choice(rest);
    let stream = [BEGINNING, bytes].concat();
    let source = Bytes::new(&stream, usize::from(piece) * 16);
    let reader = StreamReader::new(source, b"");
    let _ = load(reader, &mut NoMultifd, choice & 1 != 0);
});
