//! Source and target over a real socket: what a migration promises to both ends.
#![allow(clippy::tests_outside_test_module)] // this whole crate is tests

mod bitmaps;
mod bodies;
mod cancel;
#[path = "../common/mod.rs"]
mod common;
mod differences;
mod early;
mod failure;
mod limits;
mod outcome;
mod rig;
mod script;
mod switchover;
mod throttle;
mod unknown;

use migration_stream::PAGE_SIZE;
use migration_stream::precopy::TargetError;
use migration_stream::ram::NoMultifd;

use crate::common::guest::{Pages, memory};
use crate::common::loads::Only;
use crate::rig::{BLOCKS, Devices, between, channels, receive, send, source, target};

#[test]
fn a_guest_that_writes_arrives_with_its_last_write_and_its_devices() {
    let (ram, mut guest) = source();
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let mut devices = Devices::default();
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        let received = receive(&b, &landed, &mut devices);
        (sender.join().unwrap(), received)
    });
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert!(!guest.running);
    assert_eq!(devices.loaded, 1);
    assert!(guest.passes >= 1);
    ram.assert_equals(&landed);
    assert!(received.zero_pages >= 350);
    assert!(sent.progress.transferred > 350 * PAGE_SIZE);
    assert!(guest.log.0.lock().unwrap().0, "the log goes on for COLO");
    drop(sent);
    assert!(!guest.log.0.lock().unwrap().0);
}

#[test]
fn checkpoints_follow_on_the_same_stream_and_cannot_set_ram_up() {
    let (ram, mut guest) = source();
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = send(&mut guest, &a).unwrap();
            for round in 0..3 {
                for page in 0..round * 100 {
                    guest.write(page);
                }
                let pages = sent.ram.end(&mut sent.out).unwrap();
                assert_eq!(pages, round * 100);
                sent.out.write_bytes(&[0]).unwrap();
            }
            sent
        });
        let mut devices = Devices::default();
        let mut devices = Only(&mut devices);
        let arrived = target(&b, &landed).load((&*landed, NoMultifd), &mut devices);
        let settled = arrived.unwrap().settle_for_checkpoints(&mut devices);
        let (mut checkpoints, _) = settled.unwrap().confirm().unwrap();
        for round in 0..3 {
            let complete = checkpoints.receive_ram(&*landed, &mut NoMultifd).unwrap();
            assert_eq!(complete.received().normal_pages, round * 100);
            assert!(!complete.into_held().is_any());
        }
        let mut sent = sender.join().unwrap();
        // A START section of RAM, as at the beginning of a stream.
        sent.out
            .write_bytes(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04")
            .unwrap();
        let error = checkpoints
            .receive_ram(&*landed, &mut NoMultifd)
            .unwrap_err();
        assert!(matches!(error, TargetError::Decode(_)), "{error}");
    });
    ram.assert_equals(&landed);
}

#[test]
fn a_uuid_that_the_source_wants_compared_is_known_where_this_side_has_none() {
    for uuid in [None, Some([7; 16])] {
        let (_, mut guest) = source();
        guest.uuid = uuid;
        let (sent, received) = between(&mut guest, Ok, |t| t);
        sent.unwrap();
        assert_eq!(received.unwrap().unwrap().uuid, uuid);
    }
}
