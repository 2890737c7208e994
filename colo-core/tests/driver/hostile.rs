//! A primary that lies: the cause is named, and the secondary's VM is as it was.

use colo_core::raw::{DEVICE_SIZE_LEN, encode_message};
use colo_core::{Cause, ExitReason, Message, OnPeerLoss, Step};
use multifd::packet::{HEADER_LEN, Method, PacketFlags, PacketHeader};

use crate::guest::Told;
use crate::rig::{HandPrimary, Wire, impatient, migrated, patient};

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
    // Its memory is a mapping of the last checkpoint.
    assert!(!discard.allowed());
}

fn unexpected(got: Message, expected: Message) -> Cause {
    Cause::UnexpectedMessage {
        got,
        expected: Some(expected),
    }
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
    let cause = Cause::UnknownMessage { number: 7 };
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
        refused(0, |_| encode_message(got).to_vec(), cause);
    }
    let lie = |primary: &mut HandPrimary| {
        let mut bytes = encode_message(Message::VmstateSend).to_vec();
        bytes.extend(primary.capture().ram);
        bytes.extend(encode_message(Message::VmstateSend));
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
    primary.send(&encode_message(Message::VmstateSend));
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

/// A RAM section of the main stream without a record of pages.
fn section(kind: u8, records: &[u64]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0, 1];
    bytes.extend(records.iter().flat_map(|record| record.to_be_bytes()));
    bytes.extend([0x7e, 0, 0, 0, 1]);
    bytes
}

const PART: u8 = 2;
const END: u8 = 3;
const END_OF_SECTION: u64 = 0x10;

/// A checkpoint whose RAM is not all there is refused, although its device state is sound.
fn incomplete(channels: u8, ram: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let lie = |primary: &mut HandPrimary| {
        let mut wire = primary.capture();
        wire.ram = ram(wire.ram);
        wire.bytes()
    };
    refused(channels, lie, Cause::StepFailed(Step::ReceiveRam));
}

#[test]
fn a_checkpoint_without_the_end_of_ram_is_not_committed() {
    for channels in [0, 2] {
        incomplete(channels, |_| vec![0]);
    }
    incomplete(0, |_| [section(PART, &[END_OF_SECTION]), vec![0]].concat());
    // A PART that has all the pages.
    incomplete(0, |mut ram| {
        ram[0] = PART;
        ram
    });
    // A section that begins again after the END.
    incomplete(0, |mut ram| {
        ram.pop();
        ram.extend(section(PART, &[END_OF_SECTION]));
        ram.push(0);
        ram
    });
}

#[test]
fn a_checkpoint_by_channels_without_a_flush_in_the_end_of_ram_is_not_committed() {
    incomplete(2, |_| [section(END, &[END_OF_SECTION]), vec![0]].concat());
    // All flushes, in a PART before.
    incomplete(2, |mut ram| {
        ram[0] = PART;
        ram.pop();
        ram.extend(section(END, &[END_OF_SECTION]));
        ram.push(0);
        ram
    });
}

#[test]
fn pages_behind_the_last_sync_of_a_channel_reach_no_checkpoint_and_no_guest_that_loads_one() {
    for _ in 0..5 {
        let (primary, secondary) = migrated(2);
        let mut primary = primary.by_hand();
        let secondary = secondary.start(patient());
        primary.expect(Message::CheckpointReady);
        let wire = primary.capture();
        primary.spoil_a_channel(&page_packet());
        primary.request_and_send(&wire.bytes());
        // In time to be seen, and the checkpoint is refused; or held until it is loaded.
        let end = secondary.until(|told| match told {
            Told::Exit(exit) => Some(Err(exit)),
            Told::Installed(state) => Some(Ok(state)),
            _ => None,
        });
        match end {
            Err(exit) => {
                assert_eq!(exit.cause, Cause::StepFailed(Step::ReceiveRam));
                assert!(secondary.take_over().guest.undisturbed);
            }
            Ok(state) => {
                assert_eq!(state, primary.state());
                // Its guest runs from that checkpoint.
                secondary.until(|told| matches!(told, Told::Checkpoint(_)).then_some(()));
                primary.die();
                secondary.exit();
                // It runs from the checkpoint, or has run on from there.
                let guest = secondary.take_over().guest;
                assert!(guest.undisturbed || guest.resumed_as == Some(state));
            }
        }
    }
}

/// A packet with one page of the first block.
fn page_packet() -> Vec<u8> {
    let header = PacketHeader {
        flags: PacketFlags {
            sync: false,
            method: Method::None,
        },
        number: 0,
        block: b"pc.ram",
        normal: &[0x3000],
        zero: &[],
        payload_len: 4096,
    };
    let mut bytes = [0; HEADER_LEN];
    header.fill(&mut bytes).unwrap();
    [&bytes[..], &[0xee; 4096]].concat()
}

#[test]
fn a_channel_that_stalls_inside_a_packet_at_the_entry_into_colo_ends_it_like_any_stall() {
    for on_loss in [OnPeerLoss::Wait, OnPeerLoss::TakeOver] {
        let (primary, mut secondary) = migrated(2);
        let primary = primary.by_hand();
        let packet = page_packet();
        primary.spoil_a_channel(&packet[..packet.len() - 1]);
        secondary.until_a_packet_is_under_way();
        let secondary = secondary.start(impatient().on_loss(on_loss));
        let during = Step::StartDirtyLog;
        assert_eq!(secondary.exit().cause, Cause::DeadlineExpired { during });
        match on_loss {
            OnPeerLoss::Wait => secondary.take_over(),
            OnPeerLoss::TakeOver => secondary.alone(),
        };
    }
}
