//! Device state: what is read is written again in bytes that read the same, and nothing takes more memory
//! than it may have elements.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use vmstate::{Bitmap, Timer, VmState, from_bytes, to_bytes};

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(
    name = "all",
    version = 5,
    minimum_version = 3,
    validate = "All::check"
)]
struct All {
    flag: bool,
    small: i8,
    wide: i64,
    buffer: [u8; 5],
    words: [i32; 3],
    timer: Timer,
    bitmap: Bitmap<70>,
    count: u16,
    #[vmstate(len = "count", max = 20)]
    bytes: Vec<u8>,
    #[vmstate(nested, len = "count", max = 20)]
    parts: Vec<Part>,
    #[vmstate(pointers)]
    pointers: [Option<Part>; 3],
    pointer_count: u8,
    #[vmstate(pointers, len = pointer_count, max = 9)]
    more_pointers: Vec<Option<Part>>,
    #[vmstate(nested, since = 4)]
    pair: [Part; 2],
    #[vmstate(since = 5, exists = "*flag", default = "u32::from(*count)")]
    late: u32,
    #[vmstate(subsection)]
    extra: Option<Extra>,
}

impl All {
    fn check(&self) -> Result<(), &'static str> {
        match self.small {
            -128 => Err("small is too small"),
            _ => Ok(()),
        }
    }
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "part", version = 1)]
struct Part {
    value: u16,
    #[vmstate(subsection)]
    more: Option<More>,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "part/more", version = 1)]
struct More {
    value: u8,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "all/extra", version = 1)]
struct Extra {
    words: [u64; 4],
    #[vmstate(nested)]
    part: Part,
}

fuzz_target!(|data: &[u8]| {
    let (version, bytes) = fuzz::choice(data);
    let Ok(state) = from_bytes::<All>(bytes, u32::from(version)) else {
        return;
    };
    let again = to_bytes(&state).expect("what was loaded can be saved");
    let same: All = from_bytes(&again, All::VERSION).expect("what was saved can be loaded");
    assert_eq!(same, state);
});
