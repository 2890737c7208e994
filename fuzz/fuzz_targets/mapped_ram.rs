//! A file with mapped-ram: whatever it says of its areas, pages come out of the file and land in the
//! announced blocks.
#![no_main]
#![allow(missing_docs)] // a target has no API

use std::sync::Arc;

use fuzz::{Bytes, load};
use libfuzzer_sys::fuzz_target;
use migration_stream::StreamReader;
use migration_stream::mapped_ram::FileReader;

const BEGINNING: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1\
    \x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram\
    \x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04";

/// A real file has each block's pages at a boundary of a mebibyte: length of ours, bytes.
const FILE: u64 = 8 << 20;

fuzz_target!(|data: &[u8]| {
    let (choice, rest) = fuzz::choice(data);
    let (piece, bytes) = fuzz::choice(rest);
    let file = if choice & 1 == 0 {
        [BEGINNING, bytes].concat()
    } else {
        bytes.to_vec()
    };
    let file = Arc::new(Bytes::new(&file, usize::from(piece) * 16).sparse(FILE));
    let reader = StreamReader::from_file(file.clone(), 0);
    let _ = load(reader, &mut FileReader::new(file), false);
});
