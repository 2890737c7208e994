//! Peers that die, or say nothing, at every point.

use std::time::Instant;

use colo_core::raw::DEVICE_SIZE_LEN;
use colo_core::{Cause, Deadlines, ExitReason, Message, PeerLoss, Step, Wait};

use crate::rig::{LIMIT, SHORT, Wire, impatient, migrated, patient};

const fn waiting_for(message: Message) -> Step {
    Step::Await(Wait::Message(message))
}

/// How much of a checkpoint arrives, and what the secondary is doing then.
fn cuts(wire: &Wire) -> Vec<(usize, Step)> {
    let ram = 4;
    let size = ram + wire.ram.len();
    let devices = size + 4 + DEVICE_SIZE_LEN;
    vec![
        (0, waiting_for(Message::VmstateSend)),
        (2, waiting_for(Message::VmstateSend)),
        (ram, Step::ReceiveRam),
        (ram + 3, Step::ReceiveRam),
        (ram + 2000, Step::ReceiveRam),
        (ram + wire.ram.len() / 2, Step::ReceiveRam),
        (size - 1, Step::ReceiveRam),
        (size, waiting_for(Message::VmstateSize)),
        (size + 3, waiting_for(Message::VmstateSize)),
        (size + 4, Step::ReceiveDevices),
        (devices - 1, Step::ReceiveDevices),
        (devices, Step::ReceiveDevices),
        (devices + wire.devices.len() / 2, Step::ReceiveDevices),
        (devices + wire.devices.len() - 1, Step::ReceiveDevices),
    ]
}

const CUTS: usize = 14;

#[test]
fn a_primary_that_dies_anywhere_in_a_checkpoint_leaves_a_secondary_with_its_own_state() {
    for cut in 0..CUTS {
        let (primary, secondary) = migrated(0);
        let secondary = secondary.start(patient());
        let mut primary = primary.by_hand();
        primary.expect(Message::CheckpointReady);
        // One whole checkpoint first.
        let whole = primary.capture();
        primary.request_and_send(&whole.bytes());
        primary.expect(Message::CheckpointReply);
        primary.expect(Message::VmstateReceived);
        primary.expect(Message::VmstateLoaded);
        assert_eq!(secondary.checkpoint_state(), primary.state());
        secondary.checkpoint();

        let wire = primary.capture();
        let (len, step) = cuts(&wire)[cut];
        primary.request_and_send(&wire.bytes()[..len]);
        primary.expect(Message::CheckpointReply);
        primary.die();
        let expected = Cause::PeerLost {
            during: step,
            loss: PeerLoss::Closed,
        };
        assert_eq!(secondary.exit().cause, expected, "after {len} bytes");
        assert!(secondary.take_over().guest.undisturbed, "after {len} bytes");
    }
}

#[test]
fn a_primary_that_dies_with_all_its_channels_leaves_a_secondary_with_its_own_state() {
    for cut in 0..CUTS {
        let (primary, secondary) = migrated(3);
        let secondary = secondary.start(patient());
        let mut primary = primary.by_hand();
        primary.expect(Message::CheckpointReady);
        let wire = primary.capture();
        // The channels have all their pages, the main channel has not.
        let len = cuts(&wire)[cut].0.min(wire.bytes().len() - 1);
        primary.request_and_send(&wire.bytes()[..len]);
        primary.expect(Message::CheckpointReply);
        primary.die();
        assert_eq!(secondary.exit().reason(), ExitReason::Error);
        assert!(secondary.take_over().guest.undisturbed, "after {len} bytes");
    }
}

#[test]
fn a_primary_that_falls_silent_anywhere_is_given_up_at_the_deadline() {
    for cut in 0..CUTS {
        let (primary, secondary) = migrated(0);
        let mut primary = primary.by_hand();
        let wire = primary.capture();
        let (len, step) = cuts(&wire)[cut];
        primary.request_and_send(&wire.bytes()[..len]);
        let secondary = secondary.start(impatient());
        let exit = secondary.exit();
        assert_eq!(exit.cause, Cause::DeadlineExpired { during: step });
        assert_eq!(exit.reason(), ExitReason::Error);
        // The primary learns of it at once.
        primary.expect(Message::CheckpointReady);
        primary.expect(Message::CheckpointReply);
        primary.expect_end();
        assert!(secondary.take_over().guest.undisturbed);
    }
}

#[test]
fn a_primary_that_never_requests_a_checkpoint_is_given_up_at_the_idle_deadline() {
    let (primary, secondary) = migrated(2);
    let secondary = secondary.start(patient().deadlines(Deadlines::all(LIMIT).idle(SHORT)));
    let during = waiting_for(Message::CheckpointRequest);
    assert_eq!(secondary.exit().cause, Cause::DeadlineExpired { during });
    secondary.take_over();
    drop(primary);
}

#[test]
fn channels_that_fall_silent_are_given_up_at_the_deadline() {
    let (primary, secondary) = migrated(2);
    let mut primary = primary.by_hand();
    // A RAM section that says that pages have come on the channels, which is not so.
    let mut ram = vec![3, 0, 0, 0, 1];
    ram.extend(0x200_u64.to_be_bytes());
    ram.extend(0x10_u64.to_be_bytes());
    ram.extend([0x7e, 0, 0, 0, 1, 0]);
    let devices = Vec::new();
    primary.request_and_send(&Wire { ram, devices }.bytes());
    let secondary = secondary.start(impatient());
    let exit = secondary.exit();
    let during = Step::ReceiveRam;
    assert_eq!(exit.cause, Cause::DeadlineExpired { during });
    secondary.take_over();
}

#[test]
fn a_secondary_that_falls_silent_anywhere_is_given_up_at_the_deadline() {
    use Message::{CheckpointReady, CheckpointReply, VmstateLoaded, VmstateReceived};
    let said = [
        CheckpointReady,
        CheckpointReply,
        VmstateReceived,
        VmstateLoaded,
    ];
    for (silent, message) in said.into_iter().enumerate() {
        let (primary, secondary) = migrated(0);
        let secondary = secondary.saying(&said[..silent]);
        let primary = primary.start_due(impatient());
        let exit = primary.exit();
        let during = waiting_for(message);
        assert_eq!(exit.cause, Cause::DeadlineExpired { during });
        assert_eq!(exit.reason(), ExitReason::Error);
        primary.take_over();
        drop(secondary);
    }
}

#[test]
fn a_secondary_that_takes_no_ram_is_given_up_at_the_deadline() {
    let (mut primary, secondary) = migrated(0);
    primary.guest.write_everything();
    let secondary = secondary.saying(&[Message::CheckpointReady, Message::CheckpointReply]);
    let primary = primary.start_due(impatient());
    let during = Step::SendRam;
    assert_eq!(primary.exit().cause, Cause::DeadlineExpired { during });
    primary.take_over();
    drop(secondary);
}

#[test]
fn a_secondary_that_dies_between_checkpoints_is_noticed_at_once() {
    let (primary, secondary) = migrated(0);
    let primary = primary.start(patient(), LIMIT * 100);
    let secondary = secondary.saying(&[Message::CheckpointReady]);
    primary.resumed();
    drop(secondary);
    let exit = primary.exit();
    let expected = Cause::PeerLost {
        during: Step::Await(Wait::CheckpointDue),
        loss: PeerLoss::Closed,
    };
    assert_eq!(exit.cause, expected);
    primary.take_over();
}

#[test]
fn a_secondary_asked_to_take_over_while_its_primary_stalls_does_so_at_once() {
    for cut in [0, 4, 9] {
        let (primary, secondary) = migrated(0);
        let mut primary = primary.by_hand();
        let wire = primary.capture();
        primary.request_and_send(&wire.bytes()[..cuts(&wire)[cut].0]);
        let secondary = secondary.start(patient());
        let began = Instant::now();
        // It is waiting for the rest now, or about to.
        secondary.stopped();
        secondary.control.failover().request().unwrap();
        assert_eq!(secondary.exit().cause, Cause::FailoverRequested);
        assert!(secondary.alone().guest.undisturbed);
        assert!(began.elapsed() < LIMIT / 2);
    }
}
