//! A primary whose VM resumes when the secondary has received its checkpoint, and loads it. The guest
//! writes in the moment that it is let run.

use colo_core::{Cause, ExitReason, Message, Step, Wait};

use crate::rig::{LIMIT, NEVER, WAYS, end, impatient, migrated, patient};

const LOADED: Step = Step::Await(Wait::Message(Message::VmstateLoaded));

#[test]
fn both_sides_are_equal_at_every_checkpoint_which_ends_when_it_is_loaded() {
    for how in WAYS {
        let (primary, secondary) = migrated(how);
        let primary = primary.resume_on_received().start(patient(), NEVER);
        let secondary = secondary.start(patient());
        for number in 1..=8 {
            primary.control.demand_checkpoint();
            let captured = primary.checkpoint_state();
            assert_eq!(primary.resumed(), captured);
            let loaded = secondary.checkpoint_state();
            assert_eq!(loaded, captured, "checkpoint {number}");
            let (sent, _) = (primary.checkpoint(), secondary.checkpoint());
            assert_eq!((sent.number, sent.frozen_pages), (number, 0));
            assert!(sent.transfer <= sent.pause && sent.pause <= sent.until_loaded);
            let at = |step| sent.steps.iter().position(|(taken, _)| *taken == step);
            let order = [Step::ReleaseOutput, Step::ResumeVm, LOADED].map(at);
            assert!(order.is_sorted() && order[0].is_some(), "{order:?}");
        }
        end(primary, secondary);
    }
}

#[test]
fn a_secondary_that_never_says_loaded_holds_up_no_vm_and_is_not_waited_for_forever() {
    let (primary, secondary) = migrated(0);
    let secondary = secondary.saying(&[
        Message::CheckpointReady,
        Message::CheckpointReply,
        Message::VmstateReceived,
    ]);
    let primary = primary.resume_on_received().start_due(impatient());
    let captured = primary.checkpoint_state();
    assert_eq!(primary.resumed(), captured);
    let during = LOADED;
    assert_eq!(primary.exit().cause, Cause::DeadlineExpired { during });
    assert!(primary.take_over().guest.undisturbed);
    drop(secondary);
}

#[test]
fn a_primary_whose_secondary_fails_in_its_commit_goes_on_as_it_is() {
    let began = std::time::Instant::now();
    for how in WAYS {
        let (primary, secondary) = migrated(how);
        secondary.faults.inject("vm.reset");
        let primary = primary.resume_on_received().start(patient(), NEVER);
        let secondary = secondary.start(patient());
        primary.control.demand_checkpoint();
        let captured = primary.checkpoint_state();
        assert_eq!(primary.resumed(), captured);
        assert_eq!(secondary.exit().reason(), ExitReason::Error);
        assert_eq!(primary.exit().reason(), ExitReason::Error);
        let gone_on = primary.take_over().guest;
        assert!(gone_on.undisturbed);
        assert_ne!(gone_on.state(), captured);
    }
    assert!(began.elapsed() < LIMIT / 2);
}
