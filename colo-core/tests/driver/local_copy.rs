//! A primary whose VM resumes before its checkpoint is complete. The guest writes in the moment that it
//! is let run, so what is sent after that is never what its memory holds.

use std::time::Instant;

use colo_core::driver::LinkError;
use colo_core::{Cause, ExitReason, Message, Step};

use crate::rig::{How, LIMIT, NEVER, Side, WAYS, end, impatient, migrated, patient};

fn pair(how: How) -> (Side, Side) {
    let (primary, secondary) = migrated(how);
    let primary = primary.resume_on_local_copy();
    (primary.start(patient(), NEVER), secondary.start(patient()))
}

#[test]
fn the_secondary_gets_what_the_primary_was_when_it_stopped_though_it_has_gone_on() {
    for how in WAYS {
        let (primary, secondary) = pair(how);
        for number in 1..=8 {
            primary.control.demand_checkpoint();
            let captured = primary.checkpoint_state();
            assert_eq!(primary.resumed(), captured);
            assert_eq!(
                secondary.checkpoint_state(),
                captured,
                "checkpoint {number}"
            );
            let (sent, received) = (primary.checkpoint(), secondary.checkpoint());
            assert!(sent.frozen_pages > 0 && sent.frozen_pages <= sent.dirty_pages);
            assert!(sent.pause <= sent.until_loaded && sent.transfer <= sent.until_loaded);
            assert_eq!(sent.device_bytes, received.device_bytes);
            let at = |step| sent.steps.iter().position(|(taken, _)| *taken == step);
            assert!(at(Step::ResumeVm) < at(Step::SendRam), "{:?}", sent.steps);
        }
        end(primary, secondary);
    }
}

#[test]
fn a_primary_that_loses_its_peer_after_it_has_resumed_goes_on_as_it_is() {
    for how in WAYS {
        // The secondary has received all but fails before its promise, or in its commit.
        for fault in ["disk.check", "vm.reset"] {
            let (primary, secondary) = migrated(how);
            secondary.faults.inject(fault);
            let primary = primary.resume_on_local_copy().start(patient(), NEVER);
            let secondary = secondary.start(patient());
            primary.control.demand_checkpoint();
            let captured = primary.checkpoint_state();
            assert_eq!(primary.resumed(), captured);
            assert_eq!(secondary.exit().reason(), ExitReason::Error, "{fault}");
            assert_eq!(primary.exit().reason(), ExitReason::Error, "{fault}");
            let gone_on = primary.take_over().guest;
            assert!(gone_on.undisturbed, "{fault}");
            assert_ne!(gone_on.state(), captured);
        }
    }
}

#[test]
fn a_peer_that_takes_no_ram_does_not_hold_the_vm_up() {
    let (mut primary, secondary) = migrated(0);
    primary.guest.write_everything();
    let secondary = secondary.saying(&[Message::CheckpointReady, Message::CheckpointReply]);
    let primary = primary.resume_on_local_copy().start_due(impatient());
    let captured = primary.checkpoint_state();
    assert_eq!(primary.resumed(), captured);
    let during = Step::SendRam;
    assert_eq!(primary.exit().cause, Cause::DeadlineExpired { during });
    assert!(primary.take_over().guest.undisturbed);
    drop(secondary);
}

#[test]
fn a_failover_requested_after_the_resume_ends_by_request_on_either_side() {
    let began = Instant::now();
    for how in WAYS {
        for primary_asked in [true, false] {
            let (primary, secondary) = pair(how);
            primary.control.demand_checkpoint();
            let captured = primary.checkpoint_state();
            assert_eq!(primary.resumed(), captured);
            let (side, peer) = if primary_asked {
                (primary, secondary)
            } else {
                (secondary, primary)
            };
            side.control.failover().request().unwrap();
            assert_eq!(side.exit().cause, Cause::FailoverRequested);
            // A secondary may have had all of the checkpoint by then: it goes on as the primary was.
            let guest = side.alone().guest;
            let is_primary_then = !primary_asked && guest.resumed_as.as_ref() == Some(&captured);
            assert!(guest.undisturbed || is_primary_then);
            peer.exit();
            peer.give_up();
        }
    }
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn copies_of_another_memory_are_refused() {
    let (primary, _secondary) = migrated(0);
    assert_eq!(primary.refused_staging(), LinkError::OtherRam);
}

/// A transport that sends the guest's own memory would send pages that the guest, which runs by then, has
/// written since.
#[test]
fn a_transport_of_another_memory_than_the_copies_is_refused() {
    for way in WAYS {
        let (primary, _secondary) = migrated(How {
            staged: false,
            ..way
        });
        assert_eq!(primary.refused_transport(), LinkError::OtherRam);
    }
}
