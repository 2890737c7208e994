//! Pages that were written without being changed, and that do not cross. Both guests write, each in its own
//! way: what a secondary is not sent it has to have, whatever its guest has made of it.

use std::time::{Duration, Instant};

use colo_core::Cause;
use colo_core::driver::{BackgroundTransfer, DriverConfig};
use migration_stream::WhenToCompare;
use proptest::prelude::*;

use crate::rig::{How, LIMIT, NEVER, Side, WAYS, end, migrated, patient};

fn config(ahead: bool) -> DriverConfig {
    let transfer = BackgroundTransfer::default().interval(Duration::from_millis(1));
    patient()
        .background(ahead.then_some(transfer))
        .elide_unchanged(WhenToCompare::Always)
}

fn pair(how: How, early: bool, ahead: bool) -> (Side, Side) {
    let (mut primary, secondary) = migrated(how);
    if early {
        primary = primary.resume_on_local_copy();
    }
    let secondary = secondary.start(patient());
    (primary.start(config(ahead), NEVER), secondary)
}

/// One of a checkpoint's reports of pages that crossed and that did not.
fn checkpoint(primary: &Side, secondary: &Side, number: u64) -> (u64, u64) {
    primary.control.demand_checkpoint();
    let own = secondary.stopped();
    let (left, right) = (primary.checkpoint_state(), secondary.checkpoint_state());
    assert_eq!(left, right, "checkpoint {number}");
    assert_ne!(own, right, "a guest that ran on its own");
    let (sent, received) = (primary.checkpoint(), secondary.checkpoint());
    let total = sent.dirty_pages + sent.background_pages;
    assert!(sent.unchanged_pages <= total, "{sent:?}");
    assert!(sent.compared_pages <= total, "{sent:?}");
    // What was sent, ahead or not and on whatever channel, is what was received.
    let crossed = total - sent.unchanged_pages;
    assert_eq!(received.dirty_pages, crossed, "{sent:?}, {received:?}");
    assert!(received.ram_bytes >= crossed * 8, "{received:?}");
    (total - sent.unchanged_pages, sent.unchanged_pages)
}

#[test]
fn both_sides_are_equal_at_every_checkpoint_whatever_either_guest_writes() {
    let case = (
        0..WAYS.len(),
        any::<bool>(),
        any::<bool>(),
        any::<u32>(),
        1..25u64,
    );
    let config = ProptestConfig::with_cases(24);
    proptest!(config, |((way, early, ahead, seed, checkpoints) in case)| {
        let how = How { seed: seed.into(), ..WAYS[way] };
        let (primary, secondary) = pair(how, early, ahead);
        for number in 1..=checkpoints {
            checkpoint(&primary, &secondary, number);
        }
        // The last checkpoint is what a survivor goes on from.
        primary.control.demand_checkpoint();
        let installed = secondary.checkpoint_state();
        prop_assert_eq!(secondary.resumed(), installed);
        secondary.control.failover().request().unwrap();
        prop_assert_eq!(secondary.exit().cause, Cause::FailoverRequested);
        prop_assert!(secondary.alone().guest.undisturbed);
        primary.exit();
        primary.give_up();
    });
}

#[test]
fn some_pages_cross_and_some_do_not_by_every_way() {
    for how in WAYS {
        for early in [false, true] {
            let (primary, secondary) = pair(how, early, false);
            let (mut crossed, mut left_out) = (0, 0);
            let began = Instant::now();
            for number in 1.. {
                if number > 8 && crossed > 0 && left_out > 0 {
                    break;
                }
                assert!(began.elapsed() < LIMIT, "{crossed} crossed, {left_out} not");
                let (sent, unchanged) = checkpoint(&primary, &secondary, number);
                crossed += sent;
                left_out += unchanged;
            }
            end(primary, secondary);
        }
    }
}

#[test]
fn without_being_asked_for_all_dirty_pages_cross() {
    for how in WAYS {
        let (primary, secondary) = migrated(how);
        let primary = primary.start(patient(), NEVER);
        let secondary = secondary.start(patient());
        for _ in 0..4 {
            primary.control.demand_checkpoint();
            let (sent, received) = (primary.checkpoint(), secondary.checkpoint());
            assert_eq!((sent.compared_pages, sent.unchanged_pages), (0, 0));
            assert!(sent.dirty_pages > 0);
            // A plain stream's receiver counts them all.
            if how.channels == 0 {
                assert_eq!(received.dirty_pages, sent.dirty_pages);
            }
        }
        end(primary, secondary);
    }
}
