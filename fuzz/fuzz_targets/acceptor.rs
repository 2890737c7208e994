//! The connections of an incoming migration: order, timing, partial greetings, closings, floods.
//! What must hold is in the script's interpreter, which migration-net's tests share.
#![no_main]
#![allow(missing_docs)] // a target has no API

#[path = "../../migration-net/tests/collecting/script.rs"]
mod script;

use fuzz as _; // its bound on memory
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    script::run(bytes);
});
