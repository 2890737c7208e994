//! Both drivers over real sockets, behind a real migration, around a guest that never does the
//! same on both sides.
#![allow(clippy::tests_outside_test_module)] // this whole crate is tests

mod background;
mod guest;
mod hostile;
mod local_copy;
mod loss;
mod received;
mod rig;
mod unchanged;
mod vectors;

use std::time::{Duration, Instant};

use colo_core::driver::LinkError;
use colo_core::{
    Cause, ColoMode, ColoStatus, ExitReason, Message, OnPeerLoss, Outcome, PeerLoss, RequestError,
    Role, StatusReason, Step,
};
use migration_stream::Cause as DecodeCause;
use migration_stream::precopy::{SourceError, TargetError};
use migration_stream::raw::ram::RamError;
use ram_cache::CacheKind;
use rig::{How, LIMIT, NEVER, Side, WAYS, end, migrated, migrated_by, patient};

fn pair(how: impl Into<How>) -> (Side, Side) {
    let (primary, secondary) = migrated(how);
    (primary.start(patient(), NEVER), secondary.start(patient()))
}

/// Takes a checkpoint, and sees both sides through it.
fn checkpoint(primary: &Side, secondary: &Side) {
    primary.control.demand_checkpoint();
    primary.checkpoint();
    secondary.checkpoint();
}

#[test]
fn both_sides_are_equal_at_every_checkpoint_and_different_in_between() {
    for how in WAYS {
        let (primary, secondary) = pair(how);
        for number in 1..=8 {
            primary.control.demand_checkpoint();
            let own = secondary.stopped();
            let (left, right) = (primary.checkpoint_state(), secondary.checkpoint_state());
            assert_eq!(left, right, "checkpoint {number}");
            assert_ne!(own, right, "a guest that ran on its own");
            assert_eq!(primary.resumed(), left);
            assert_eq!(secondary.resumed(), right);
            let (sent, received) = (primary.checkpoint(), secondary.checkpoint());
            assert_eq!((sent.number, received.number), (number, number));
            assert!(received.flushed_pages >= sent.dirty_pages);
            assert_eq!(sent.device_bytes, received.device_bytes);
        }
        end(primary, secondary);
    }
}

#[test]
fn c1_colo_cannot_follow_a_migration_with_differences_at_either_side() {
    let (primary, secondary) = migrated_by(How {
        xbzrle: true,
        ..WAYS[0]
    });
    let e = primary.err().expect("no checkpoints");
    assert!(matches!(e, SourceError::Refused { status: 1 }), "{e}");
    let e = secondary.err().expect("no checkpoints");
    assert!(
        matches!(&e, TargetError::Decode(e)
            if e.cause == DecodeCause::Ram(RamError::XbzrleWithCheckpoints)),
        "{e}"
    );
}

#[test]
fn colo_cannot_follow_a_migration_without_a_return_path_at_either_side() {
    let (primary, secondary) = migrated_by(How {
        return_path: false,
        ..WAYS[0]
    });
    assert_eq!(primary.unwrap().refused(), LinkError::NoReturnPath);
    let e = secondary.err().expect("no checkpoints");
    assert!(matches!(e, TargetError::Missing { .. }), "{e}");
}

#[test]
fn checkpoints_come_by_themselves_after_the_delay() {
    let (primary, secondary) = migrated(0);
    let primary = primary.start(patient(), Duration::from_millis(3));
    let secondary = secondary.start(patient());
    for number in 1..=5 {
        assert_eq!(primary.checkpoint().number, number);
        assert_eq!(secondary.checkpoint().number, number);
    }
    end(primary, secondary);
}

#[test]
fn a_demand_and_a_new_delay_take_a_checkpoint_at_once() {
    let (primary, secondary) = pair(0);
    checkpoint(&primary, &secondary);
    primary.control.set_checkpoint_delay(2 * NEVER);
    primary.checkpoint();
    secondary.checkpoint();
    // From here on the driver needs no more requests.
    primary.control.set_checkpoint_delay(Duration::ZERO);
    for _ in 0..3 {
        primary.checkpoint();
        secondary.checkpoint();
    }
    end(primary, secondary);
}

#[test]
fn a_failover_while_the_peer_is_alive_ends_by_request_on_the_side_that_was_asked() {
    for how in WAYS {
        for asked in [Role::Primary, Role::Secondary] {
            // Between checkpoints, and again and again in the middle of one.
            for round in 0..12 {
                let (primary, secondary) = pair(how);
                checkpoint(&primary, &secondary);
                if round % 2 == 1 {
                    primary.control.demand_checkpoint();
                }
                let (side, peer) = match asked {
                    Role::Primary => (primary, secondary),
                    Role::Secondary => (secondary, primary),
                };
                if round % 4 == 3 {
                    side.stopped();
                }
                side.control.failover().request().unwrap();
                let exit = side.exit();
                assert_eq!((exit.role, exit.cause), (asked, Cause::FailoverRequested));
                assert_eq!(exit.reason(), ExitReason::Request);
                side.alone();
                let lost = peer.exit();
                assert_eq!(lost.reason(), ExitReason::Error, "{lost}");
                peer.give_up();
            }
        }
    }
}

#[test]
fn the_status_says_how_far_a_failover_is() {
    let (primary, secondary) = pair(0);
    checkpoint(&primary, &secondary);
    let failover = secondary.control.failover().clone();
    let status = |mode, last_mode, reason| ColoStatus {
        mode,
        last_mode,
        reason,
    };
    let in_colo = status(ColoMode::Secondary, ColoMode::None, StatusReason::None);
    assert_eq!(failover.status(), in_colo);
    primary.quit();
    assert_eq!(secondary.exit().reason(), ExitReason::Error);
    let undecided = status(ColoMode::Secondary, ColoMode::None, StatusReason::Error);
    assert_eq!(failover.status(), undecided);
    secondary.take_over();
    let over = status(ColoMode::None, ColoMode::Secondary, StatusReason::Request);
    assert_eq!(failover.status(), over);
    assert_eq!(failover.request(), Err(RequestError::NotInColo));
}

#[test]
fn a_vm_that_quits_leaves_colo_stopped_and_its_peer_waits_for_a_decision() {
    for how in WAYS {
        let (primary, secondary) = pair(how);
        checkpoint(&primary, &secondary);
        primary.quit();
        let lost = secondary.exit();
        assert!(
            matches!(
                lost.cause,
                Cause::PeerLost {
                    loss: PeerLoss::Closed,
                    ..
                }
            ),
            "{lost}"
        );
        secondary.take_over();
    }
}

#[test]
fn a_secondary_that_is_to_take_over_does_so_without_being_asked() {
    let (primary, secondary) = migrated(2);
    let primary = primary.start(patient(), NEVER);
    let secondary = secondary.start(patient().on_loss(OnPeerLoss::TakeOver));
    checkpoint(&primary, &secondary);
    primary.quit();
    assert_eq!(secondary.exit().reason(), ExitReason::Error);
    assert!(secondary.alone().guest.undisturbed);
}

#[test]
fn ram_may_be_discarded_again_only_behind_a_mirror() {
    for how in WAYS {
        let (primary, secondary) = migrated(how);
        let discard = secondary.discard.clone();
        let (primary, secondary) = (primary.start(patient(), NEVER), secondary.start(patient()));
        checkpoint(&primary, &secondary);
        // The cache keeps it forbidden as long as it exists.
        assert!(!discard.allowed());
        primary.quit();
        secondary.exit();
        assert!(!discard.allowed(), "not yet decided");
        secondary.take_over();
        // A cache behind the guest's pages stays there.
        assert_eq!(discard.allowed(), how.cache == CacheKind::Mirror);
    }
}

/// Runs a pair whose secondary has a fault, to the exit of the secondary.
fn with_fault(how: impl Into<How>, fault: &'static str) -> (Side, Side, Cause) {
    let (primary, secondary) = migrated(how);
    secondary.faults.inject(fault);
    let (primary, secondary) = (primary.start(patient(), NEVER), secondary.start(patient()));
    primary.control.demand_checkpoint();
    let exit = secondary.exit();
    assert_eq!(exit.role, Role::Secondary);
    (primary, secondary, exit.cause)
}

#[test]
fn every_early_error_of_the_secondary_ends_with_one_exit_and_a_vm_that_can_run() {
    for how in WAYS {
        for (fault, step) in [
            ("gate.hold", Step::HoldOutput),
            ("log.start", Step::StartDirtyLog),
            ("disk.start", Step::StartReplication),
            ("vm.resume", Step::ResumeVm),
            ("vm.pause", Step::PauseVm),
            ("disk.check", Step::CheckReplication),
        ] {
            let (primary, secondary, cause) = with_fault(how, fault);
            assert_eq!(cause, Cause::StepFailed(step), "{fault}");
            assert_eq!(primary.exit().reason(), ExitReason::Error, "{fault}");
            primary.take_over();
            assert!(secondary.take_over().guest.undisturbed, "{fault}");
        }
    }
}

#[test]
fn an_error_while_the_guest_is_replaced_ends_with_one_exit_and_a_vm_that_never_runs() {
    for (fault, step) in [
        ("vm.reset", Step::Reset),
        ("disk.checkpoint", Step::CheckpointReplication),
        ("gate.discard", Step::DiscardOutput),
    ] {
        let (primary, secondary, cause) = with_fault(2, fault);
        assert_eq!(cause, Cause::StepFailed(step), "{fault}");
        let ended = secondary.join();
        assert_eq!(ended.outcome, Outcome::Broken(cause), "{fault}");
        assert!(!ended.guest.running, "{fault}");
        primary.exit();
        primary.take_over();
    }
}

#[test]
fn an_error_of_the_primary_ends_with_one_exit_and_a_vm_that_runs_on() {
    for (fault, step) in [
        ("gate.hold", Step::HoldOutput),
        ("disk.start", Step::StartReplication),
        ("vm.resume", Step::ResumeVm),
        ("vm.pause", Step::PauseVm),
        ("gate.cut", Step::CutOutput),
        ("disk.check", Step::CheckReplication),
        ("disk.checkpoint", Step::CheckpointReplication),
        ("gate.release", Step::ReleaseOutput),
    ] {
        let (primary, secondary) = migrated(0);
        primary.faults.inject(fault);
        let (primary, secondary) = (primary.start(patient(), NEVER), secondary.start(patient()));
        primary.control.demand_checkpoint();
        assert_eq!(primary.exit().cause, Cause::StepFailed(step), "{fault}");
        assert_eq!(secondary.exit().reason(), ExitReason::Error, "{fault}");
        assert!(primary.take_over().guest.undisturbed, "{fault}");
        secondary.give_up();
    }
}

#[test]
fn a_peer_that_stalls_holds_up_nobody_who_asks_for_something() {
    let (mut primary, secondary) = migrated(0);
    // More than a socket takes, and nobody reads it.
    primary.guest.write_everything();
    let secondary = secondary.saying(&[Message::CheckpointReady, Message::CheckpointReply]);
    let primary = primary.start_due(patient());
    primary.checkpoint_state();
    let began = Instant::now();
    primary.control.set_checkpoint_delay(NEVER);
    primary.control.demand_checkpoint();
    assert_eq!(primary.control.failover().status().mode, ColoMode::Primary);
    primary.control.failover().request().unwrap();
    assert_eq!(primary.exit().cause, Cause::FailoverRequested);
    primary.alone();
    assert!(began.elapsed() < LIMIT / 2);
    drop(secondary);
}
