//! A primary of COLO against a secondary that plays a script: see `colo-core/tests/scripted`.
#![no_main]
#![allow(missing_docs)] // a target has no API

// Its allocator bounds what an input can take.
use fuzz as _;
use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unused_imports)] // the other side's half
#[path = "../../colo-core/tests/scripted/play/mod.rs"]
mod play;

fuzz_target!(|data: &[u8]| {
    play::primary(data);
});
