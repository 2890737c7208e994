//! Postcopy's codecs on bytes from anywhere: the seeded half of the fuzz target `postcopy`.
#![allow(clippy::tests_outside_test_module)] // this whole crate is tests

#[path = "common/postcopy.rs"]
mod postcopy;

use postcopy::{Ending, run};

#[test]
fn no_bytes_make_a_codec_of_postcopy_break_its_promises() {
    let mut state = 23;
    let mut endings = [[0; 2]; 5];
    for _ in 0..20_000 {
        let len = 1 + next(&mut state) % 120;
        let mut input: Vec<u8> = (0..len)
            .map(|_| next(&mut state).to_le_bytes()[5])
            .collect();
        if next(&mut state).is_multiple_of(4) {
            input.resize(input.len() + 60, 0);
        }
        let choice = usize::from(input[0] % 5);
        // A bitmap that ends as one does.
        if choice == 0 && next(&mut state).is_multiple_of(2) && input.len() > 3 {
            let words = (usize::from(input[1]) + 1).div_ceil(64);
            input.resize(3 + words * 8, 0xaa);
            input[2] = 0;
            input.extend([0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        }
        // Whole ranges.
        if choice == 4 {
            input.resize(input.len() / 16 * 16 + 2, 1);
        }
        let was_read = matches!(run(&input), Ending::Read(1..));
        endings[choice][usize::from(was_read)] += 1;
    }
    // Each codec takes some and refuses some, so that none of the promises is about nothing.
    for (choice, [refused, read]) in endings.into_iter().enumerate() {
        assert!(
            refused > 20 && read > 20,
            "{choice}: {refused} refused, {read} read"
        );
    }
}

/// SplitMix64: the same numbers each time.
const fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 27)
}
