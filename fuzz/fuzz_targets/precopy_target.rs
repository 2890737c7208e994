//! The driver of an incoming migration against a scripted source: nothing that the source does, in
//! whatever order, length, content or timing, makes it panic, confirm a guest that it has not loaded, take
//! memory beyond its limits or work out of proportion to the stream.
#![no_main]
#![allow(missing_docs)] // a target has no API

#[path = "../../migration-stream/tests/common/grammar.rs"]
mod grammar;

use fuzz as _; // its bound on memory
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    grammar::run(data);
});
