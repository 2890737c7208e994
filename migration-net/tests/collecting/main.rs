//! The connections of an incoming migration under random scripts: order, timing, partial greetings,
//! closings, floods.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod script;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use script::Outcome;

/// The same scripts in every run, or other ones.
fn scripts(config: Config, rng: Option<TestRng>, mut each: impl FnMut(Outcome)) {
    let mut runner = match rng {
        Some(rng) => TestRunner::new_with_rng(config, rng),
        None => TestRunner::new(config),
    };
    let script = vec(any::<u8>(), 0..400);
    for _ in 0..1500 {
        let script = script.new_tree(&mut runner).unwrap().current();
        each(script::run(&script));
    }
}

#[test]
fn whatever_connects_leaves_or_is_silent_the_rules_of_a_collection_hold() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut all = Outcome::default();
    scripts(Config::default(), Some(rng), |outcome| {
        all.complete += outcome.complete;
        all.crowded += outcome.crowded;
        all.silent += outcome.silent;
        all.failed += outcome.failed;
        all.surplus += outcome.surplus;
    });
    // They led everywhere.
    for (what, times) in [
        ("complete", all.complete),
        ("crowded", all.crowded),
        ("silent", all.silent),
        ("failed", all.failed),
        ("surplus", all.surplus),
    ] {
        assert!(times >= 10, "{what}: {times}");
    }
}

#[test]
fn other_scripts_in_every_run() {
    let mut runs = 0;
    scripts(Config::default(), None, |_| runs += 1);
    assert_eq!(runs, 1500);
}
