//! One side of a pair: beats in and out of turn, late and damaged ones, processes that come again, an
//! arbiter that says anything. What must hold is in the script's interpreter, which colo-heartbeat's tests
//! share.
#![no_main]
#![allow(missing_docs)] // a target has no API

#[path = "../../colo-heartbeat/tests/heartbeat/script.rs"]
mod script;

use fuzz as _; // its bound on memory
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    script::run(bytes);
});
