//! Pages that are sent between two checkpoints. The guest writes in the moment that it is let run, so
//! all of that can be sent before the next checkpoint.

use std::thread;
use std::time::{Duration, Instant};

use colo_core::driver::{BackgroundTransfer, DriverConfig};
use colo_core::{Cause, ExitReason};

use crate::rig::{LIMIT, NEVER, Side, end, migrated, patient};

/// Some rounds of pages.
const A_WHILE: Duration = Duration::from_millis(5);

fn config() -> DriverConfig {
    patient().background(BackgroundTransfer::default().interval(Duration::from_millis(1)))
}

fn pair(channels: u8, early: bool) -> (Side, Side) {
    let (mut primary, secondary) = migrated(channels);
    if early {
        primary = primary.resume_on_local_copy();
    }
    (primary.start(config(), NEVER), secondary.start(patient()))
}

#[test]
fn both_sides_are_equal_at_every_checkpoint_of_which_pages_were_sent_ahead() {
    for early in [false, true] {
        let (primary, secondary) = pair(2, early);
        let began = Instant::now();
        let (mut ahead, mut within) = (0, 0);
        // On a slow machine a checkpoint may come before any page was sent ahead of it.
        for number in 1.. {
            if number > 8 && ahead > 0 && within > 0 {
                break;
            }
            assert!(began.elapsed() < LIMIT, "{ahead} ahead, {within} within");
            thread::sleep(A_WHILE);
            primary.control.demand_checkpoint();
            let own = secondary.stopped();
            let (left, right) = (primary.checkpoint_state(), secondary.checkpoint_state());
            assert_eq!(left, right, "checkpoint {number}");
            assert_ne!(own, right, "a guest that ran on its own");
            let sent = primary.checkpoint();
            secondary.checkpoint();
            ahead += sent.background_pages;
            within += sent.dirty_pages;
        }
        end(primary, secondary);
    }
}

#[test]
fn a_secondary_that_takes_over_has_seen_nothing_of_pages_that_were_sent_ahead() {
    let began = Instant::now();
    let mut ahead = 0;
    for round in 0.. {
        if round >= 6 && ahead > 0 {
            break;
        }
        assert!(began.elapsed() < LIMIT);
        let (primary, secondary) = pair(2, true);
        thread::sleep(A_WHILE);
        primary.control.demand_checkpoint();
        ahead += primary.checkpoint().background_pages;
        let installed = secondary.checkpoint_state();
        assert_eq!(secondary.resumed(), installed);
        thread::sleep(A_WHILE);
        secondary.control.failover().request().unwrap();
        assert_eq!(secondary.exit().cause, Cause::FailoverRequested);
        // Its guest checks as it is stopped that nobody else has written to it.
        assert!(secondary.alone().guest.undisturbed);
        assert_eq!(primary.exit().reason(), ExitReason::Error);
        primary.give_up();
    }
}

#[test]
fn a_primary_that_loses_its_peer_while_it_sends_ahead_goes_on() {
    for asked in [false, true] {
        let (primary, secondary) = pair(2, false);
        primary.control.demand_checkpoint();
        primary.checkpoint();
        if asked {
            primary.control.failover().request().unwrap();
            assert_eq!(primary.exit().cause, Cause::FailoverRequested);
        } else {
            secondary.control.quit();
            assert_eq!(primary.exit().reason(), ExitReason::Error);
            primary.control.failover().request().unwrap();
        }
        assert!(primary.alone().guest.undisturbed);
        drop(secondary);
    }
}

/// At one page a round, no more than that many can be sent in the time there was.
fn rounds(began: Instant, interval: Duration) -> u64 {
    2 + u64::try_from(began.elapsed().as_micros() / interval.as_micros()).unwrap()
}

#[test]
fn the_limit_changes_in_the_gap_that_goes_on() {
    let interval = Duration::from_millis(20);
    let config = patient().background(
        BackgroundTransfer::default()
            .bandwidth(1)
            .interval(interval),
    );
    let (primary, secondary) = migrated(2);
    let (primary, secondary) = (primary.start(config, NEVER), secondary.start(patient()));
    let control = primary.control.clone();
    let began = Instant::now();
    let mut before = began;
    let mut next_gap = |change: Option<u64>| {
        if let Some(bandwidth) = change {
            control.set_background_bandwidth(bandwidth);
        }
        thread::sleep(2 * interval);
        control.demand_checkpoint();
        let ahead = primary.checkpoint().background_pages;
        let most = rounds(before, interval);
        before = Instant::now();
        assert!(began.elapsed() < LIMIT);
        (ahead, most)
    };
    for _ in 0..3 {
        let (ahead, most) = next_gap(None);
        assert!(ahead <= most, "{ahead} of at most {most}");
    }
    assert_eq!(control.background_bandwidth(), Some(1));
    // On a slow machine a round may not come to any page before the next checkpoint.
    let (mut ahead, mut most) = next_gap(Some(0));
    while ahead <= most {
        (ahead, most) = next_gap(Some(0));
    }
    assert_eq!(control.background_bandwidth(), Some(0));
    // The gap after a checkpoint begins with the limit that there was.
    let _ = next_gap(Some(1));
    let (ahead, most) = next_gap(None);
    assert!(ahead <= most, "{ahead} of at most {most}");
    end(primary, secondary);
}

#[test]
fn without_channels_nothing_is_sent_between_checkpoints() {
    let began = Instant::now();
    let (primary, secondary) = pair(0, false);
    for _ in 0..2 {
        thread::sleep(A_WHILE);
        primary.control.demand_checkpoint();
        assert_eq!(primary.checkpoint_state(), secondary.checkpoint_state());
        assert_eq!(primary.checkpoint().background_pages, 0);
        secondary.checkpoint();
    }
    primary.control.set_background_bandwidth(0);
    assert_eq!(primary.control.background_bandwidth(), None);
    end(primary, secondary);
    assert!(began.elapsed() < LIMIT);
}
