//! What was captured of a checkpoint of QEMU 11.1.3, byte for byte.
//!
//! | captured | test |
//! |---|---|
//! | secondary to primary | [`what_a_secondary_says_to_the_captured_primary`] |
//! | primary to secondary | [`what_a_secondary_says_to_the_captured_primary`], [`what_a_primary_sends_is_framed_as_captured`] |

use crate::rig::{migrated, patient};

#[test]
fn what_a_secondary_says_to_the_captured_primary() {
    for channels in [0, 2] {
        let (primary, secondary) = migrated(channels);
        let mut primary = primary.by_hand();
        let secondary = secondary.start(patient());
        assert_eq!(primary.receive(), [0, 0, 0, 0]);
        for _ in 0..2 {
            let wire = primary.capture();
            let size = u64::try_from(wire.devices.len()).unwrap();
            primary.send(&[0, 0, 0, 1]);
            assert_eq!(primary.receive(), [0, 0, 0, 2]);
            primary.send(&[0, 0, 0, 3]);
            primary.send(&wire.ram);
            primary.send(&[&[0, 0, 0, 4], &size.to_be_bytes()[..], &wire.devices].concat());
            assert_eq!(primary.receive(), [0, 0, 0, 5, 0, 0, 0, 6]);
        }
        primary.die();
        secondary.exit();
        secondary.take_over();
    }
}

/// With multifd there are no pages in the section, only the marks of the channels' SYNC packets.
#[test]
fn what_a_primary_sends_is_framed_as_captured() {
    let (primary, secondary) = migrated(2);
    let mut primary = primary.by_hand();
    let wire = primary.capture();
    let ram = wire.ram.strip_prefix(&[3, 0, 0, 0, 1][..]).unwrap();
    let end = [0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 1, 0];
    let flushes = ram.strip_suffix(&end[..]).unwrap();
    assert!(!flushes.is_empty());
    for flush in flushes.chunks(8) {
        assert_eq!(flush, [0, 0, 0, 0, 0, 0, 2, 0]);
    }
    let bytes = wire.bytes();
    assert_eq!(bytes[..4], [0, 0, 0, 3]);
    let device_message = 4 + wire.ram.len();
    assert_eq!(bytes[device_message..device_message + 4], [0, 0, 0, 4]);
    primary.die();
    drop(secondary);
}
