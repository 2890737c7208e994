//! Postcopy's codecs: bitmaps of received pages, requests for pages, page records on both channels,
//! ranges to discard.
#![no_main]
#![allow(missing_docs)] // a target has no API

#[path = "../../migration-stream/tests/common/postcopy.rs"]
mod postcopy;

use fuzz as _; // its bound on memory
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    postcopy::run(data);
});
