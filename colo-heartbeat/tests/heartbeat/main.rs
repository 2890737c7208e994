//! A side of a pair under random scripts: beats in and out of turn, late and damaged ones, processes that
//! come again, an arbiter that says anything.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod script;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use script::Outcome;

const SCRIPTS: usize = 3000;

fn scripts(mut runner: TestRunner, mut each: impl FnMut(Outcome)) {
    let script = vec(any::<u8>(), 0..600);
    for _ in 0..SCRIPTS {
        let script = script.new_tree(&mut runner).unwrap().current();
        each(script::run(&script));
    }
}

#[test]
fn whatever_the_peer_the_arbiter_and_the_clock_do_the_rules_of_a_side_hold() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut all = Outcome::default();
    scripts(
        TestRunner::new_with_rng(Config::default(), rng),
        |outcome| {
            all.heard += outcome.heard;
            all.refused += outcome.refused;
            all.lost += outcome.lost;
            all.took_over += outcome.took_over;
            all.suspended += outcome.suspended;
            all.stopped += outcome.stopped;
        },
    );
    // They led everywhere.
    for (what, times) in [
        ("heard", all.heard),
        ("refused", all.refused),
        ("lost", all.lost),
        ("took over", all.took_over),
        ("suspended", all.suspended),
        ("stopped", all.stopped),
    ] {
        assert!(times >= 10, "{what}: {times}");
    }
}

#[test]
fn other_scripts_in_every_run() {
    let mut runs = 0;
    scripts(TestRunner::new(Config::default()), |_| runs += 1);
    assert_eq!(runs, SCRIPTS);
}
