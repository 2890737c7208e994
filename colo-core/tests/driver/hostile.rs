//! A primary that lies: the cause is named, and the secondary's VM is as it was.

use colo_core::message::{DEVICE_SIZE_LEN, UnexpectedMessage, UnknownMessage};
use colo_core::{Cause, ExitReason, Message, Step};

use crate::rig::{HandPrimary, Wire, migrated, patient};

/// Sends `lie` behind *checkpoint-request*. The secondary gives it as `cause`, and goes on from its
/// own state.
fn refused(channels: u8, lie: impl FnOnce(&mut HandPrimary) -> Vec<u8>, cause: Cause) {
    let (primary, secondary) = migrated(channels);
    let discard = secondary.discard.clone();
    let mut primary = primary.by_hand();
    let bytes = lie(&mut primary);
    primary.request_and_send(&bytes);
    let secondary = secondary.start(patient());
    let exit = secondary.exit();
    assert_eq!(exit.cause, cause);
    assert_eq!(exit.reason(), ExitReason::Error);
    assert!(secondary.take_over().guest.undisturbed);
    assert!(discard.allowed());
}

fn unexpected(got: Message, expected: Message) -> Cause {
    Cause::UnexpectedMessage(UnexpectedMessage {
        got,
        expected: Some(expected),
    })
}

fn refused_ram(ram: &[u8]) {
    let wire = Wire {
        ram: ram.to_vec(),
        devices: Vec::new(),
    };
    refused(0, |_| wire.bytes(), Cause::StepFailed(Step::ReceiveRam));
}

/// An END section of RAM with one record, and what follows it.
fn end_section(record: u64, rest: &[u8]) -> Vec<u8> {
    [&[3, 0, 0, 0, 1][..], &record.to_be_bytes(), rest].concat()
}

#[test]
fn an_unknown_message() {
    let cause = Cause::UnknownMessage(UnknownMessage { number: 7 });
    for channels in [0, 2] {
        refused(channels, |_| vec![0, 0, 0, 7], cause);
    }
}

#[test]
fn a_message_that_is_the_secondarys_or_out_of_turn() {
    for got in [
        Message::CheckpointReady,
        Message::CheckpointRequest,
        Message::VmstateSize,
        Message::VmstateLoaded,
    ] {
        let cause = unexpected(got, Message::VmstateSend);
        refused(0, |_| got.encode().to_vec(), cause);
    }
    let lie = |primary: &mut HandPrimary| {
        let mut bytes = Message::VmstateSend.encode().to_vec();
        bytes.extend(primary.capture().ram);
        bytes.extend(Message::VmstateSend.encode());
        bytes
    };
    refused(
        0,
        lie,
        unexpected(Message::VmstateSend, Message::VmstateSize),
    );
}

#[test]
fn more_device_state_than_is_accepted() {
    for size in [1001_u64, u64::MAX] {
        let lie = |primary: &mut HandPrimary| {
            let wire = primary.capture();
            let mut bytes = wire.bytes();
            bytes.truncate(bytes.len() - wire.devices.len() - DEVICE_SIZE_LEN);
            bytes.extend(size.to_be_bytes());
            bytes
        };
        refused(0, lie, Cause::StepFailed(Step::ReceiveDevices));
    }
}

#[test]
fn device_state_that_is_not_sound_behind_ram_that_is() {
    for channels in [0, 2] {
        let lie = |primary: &mut HandPrimary| {
            let mut wire = primary.capture();
            wire.devices[7] ^= 0x40;
            wire.bytes()
        };
        refused(channels, lie, Cause::StepFailed(Step::StageDevices));
    }
}

#[test]
fn ram_that_is_garbage() {
    refused_ram(&[0x99; 64]);
    refused_ram(&[
        3, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ]);
}

#[test]
fn ram_of_a_section_that_was_never_announced() {
    refused_ram(&[3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0x10]);
}

#[test]
fn a_page_of_an_unknown_block_or_outside_of_its_block() {
    refused_ram(&end_section(0x08, b"\x06pc.rom"));
    refused_ram(&end_section((90 << 12) | 0x08, b"\x06pc.ram"));
    refused_ram(&end_section(0xffff_ffff_ffff_f008, b"\x06pc.ram"));
}

#[test]
fn ram_that_is_set_up_again() {
    refused_ram(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    let setup = [
        &end_section(0x6_1004, b"")[..],
        b"\x06pc.ram\0\0\0\0\0\0\x10\0",
    ]
    .concat();
    refused_ram(&setup);
}

#[test]
fn a_multifd_flush_where_there_is_no_multifd() {
    refused_ram(&end_section(0x200, &[]));
}

#[test]
fn a_message_that_is_no_request_between_checkpoints() {
    let (primary, secondary) = migrated(2);
    let mut primary = primary.by_hand();
    primary.send(&Message::VmstateSend.encode());
    let secondary = secondary.start(patient());
    let cause = unexpected(Message::VmstateSend, Message::CheckpointRequest);
    assert_eq!(secondary.exit().cause, cause);
    assert!(secondary.take_over().guest.undisturbed);
}

#[test]
fn garbage_on_a_channel_ends_the_checkpoint_and_not_the_vm() {
    let (primary, secondary) = migrated(2);
    let mut primary = primary.by_hand();
    let secondary = secondary.start(patient());
    primary.expect(Message::CheckpointReady);
    primary.spoil_a_channel(&[0x5a; 512]);
    assert_eq!(secondary.exit().reason(), ExitReason::Error);
    assert!(secondary.take_over().guest.undisturbed);
}
