//! A target against a source that says what it likes: the seeded half of the fuzz target
//! `precopy_target`.
#![allow(clippy::tests_outside_test_module)] // this whole crate is tests

#[path = "common/grammar.rs"]
mod grammar;

use grammar::{Ending, run};

/// Whatever the source does, the target neither panics nor confirms what it has not loaded, and its
/// work is in proportion to the stream. See [`run`].
#[test]
fn no_source_makes_a_target_break_its_promises() {
    let mut state = 17;
    let mut endings = Vec::new();
    for _ in 0..3000 {
        let len = 8 + next(&mut state) % 600;
        let input: Vec<u8> = (0..len)
            .map(|_| next(&mut state).to_le_bytes()[5])
            .collect();
        endings.push(run(&input));
    }
    // The grammar leads to each end, so that none of the promises is about nothing.
    for ending in [Ending::Confirmed, Ending::Refused, Ending::Failed] {
        let count = endings.iter().filter(|e| **e == ending).count();
        assert!(count > 20, "{count} of {ending:?}");
    }
}

/// SplitMix64: the same numbers each time.
const fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 27)
}
