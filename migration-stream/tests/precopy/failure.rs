//! Migrations that fail: each side hears why, and the guest goes on at the source.

use std::sync::Arc;

use migration_stream::precopy::{Control, SourceError, TargetError};
use migration_stream::{GuestRamMmap, StreamWriter};

use crate::common::guest::memory;
use crate::rig::{BLOCKS, Devices, channels, receive, send, source};

/// Runs a migration that must fail at the target, and checks that the guest goes on at the source.
fn refused(landed: &Arc<GuestRamMmap>, refuse: bool) -> (SourceError, TargetError) {
    let (_, mut guest) = source();
    let (a, b) = channels();
    let mut devices = Devices { loaded: 0, refuse };
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        let received = receive(&b, landed, &mut devices);
        b.shutdown();
        (sender.join().unwrap(), received)
    });
    assert!(guest.running, "the guest goes on");
    assert!(!guest.log.0.lock().unwrap().0, "nothing is logged any more");
    (sent.err().unwrap(), received.err().unwrap())
}

#[test]
fn a_target_that_refuses_a_device_says_so_to_the_source() {
    let (source, target) = refused(&memory(BLOCKS), true);
    assert!(
        matches!(source, SourceError::Refused { status: 1 }),
        "{source}"
    );
    assert!(
        target
            .to_string()
            .contains("device section 'thing' instance 3"),
        "{target}"
    );
}

#[test]
fn a_target_with_another_ram_size_or_block_name_refuses_it() {
    for blocks in [&[("pc.ram", 701), ("rom", 3)], &[("ram", 700), ("rom", 3)]] {
        let (_, target) = refused(&memory(blocks), false);
        assert!(matches!(target, TargetError::Decode(_)), "{target}");
        assert!(target.to_string().contains("ram"), "{target}");
    }
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running() {
    let (_, mut guest) = source();
    guest.control = Control::Cancel;
    let (a, _b) = channels();
    let error = send(&mut guest, &a).err().unwrap();
    assert!(matches!(error, SourceError::Cancelled), "{error}");
    assert!(guest.running);
}

#[test]
fn a_source_that_dies_in_the_middle_is_an_error_that_says_where() {
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let mut out = StreamWriter::new(a.share());
    out.write_bytes(&[0x51, 0x45, 0x56, 0x4d, 0, 0]).unwrap();
    a.shutdown();
    let mut devices = Devices::default();
    let error = receive(&b, &landed, &mut devices).unwrap_err();
    assert!(
        matches!(error, TargetError::Stream { offset: 0, .. }),
        "{error}"
    );
}
