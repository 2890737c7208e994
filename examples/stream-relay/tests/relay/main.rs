//! A guest through the relay without any QEMU: the relay's own sender is the source, its own receiver
//! the destination.
#![allow(clippy::tests_outside_test_module)] // this whole crate is tests

mod failure;
mod file;
mod guest;
mod limits;
mod rig;
mod store;

use std::sync::Arc;
use std::thread;

use migration_stream::MachineVersion;
use stream_relay::endpoint::Endpoint;
use stream_relay::incoming::Incoming;
use stream_relay::outgoing::{OutgoingConfig, OutgoingError};
use stream_relay::relay::RelayError;

use crate::guest::{assert_same, guest};
use crate::rig::{
    expect_figures, incoming, listen, outgoing_to, pass, relay, send_from, zlib, zstd,
};

#[test]
fn every_transport_is_changed_into_every_other_and_nothing_of_the_guest() {
    for machine in ["microvm", "pc-q35-9.2", "pc-i440fx-7.2"] {
        let guest = guest(machine);
        for (a, b) in [
            (None, None),
            (None, zstd(2)),
            (zstd(3), None),
            (zlib(2), zstd(1)),
        ] {
            let taken = thread::scope(|scope| {
                let passage = pass(scope, &guest, a, b);
                let received = passage.destination.receive(&Arc::default()).unwrap();
                let taken = received.guest.clone();
                received.confirm().unwrap();
                expect_figures(passage.relaying.join().unwrap().unwrap());
                passage.source.join().unwrap().unwrap();
                taken
            });
            assert_same(&guest, &taken);
        }
    }
}

#[test]
fn a_source_hears_nothing_before_the_destination_has_confirmed() {
    let guest = guest("microvm");
    thread::scope(|scope| {
        let passage = pass(scope, &guest, None, None);
        let received = passage.destination.receive(&Arc::default()).unwrap();
        assert!(received.is_awaited());
        assert!(!passage.source.is_finished());
        received.confirm().unwrap();
        passage.source.join().unwrap().unwrap();
        passage.relaying.join().unwrap().unwrap();
    });
}

#[test]
fn an_old_machine_without_a_name_for_it_is_told_by_its_version() {
    let version = Some(MachineVersion::new(7, 2));
    let guest = guest("microvm");
    let mut config = incoming("tcp:127.0.0.1:0", zlib(2));
    config.machine_version = version;
    let relayed = Incoming::open(config).unwrap();
    let mut to = outgoing_to(&relayed.address().unwrap().to_string(), zlib(2));
    to.machine_version = version;
    thread::scope(|scope| {
        let source = send_from(scope, &guest, to);
        let received = relayed.receive(&Arc::default()).unwrap();
        assert_same(&guest, &received.guest);
        received.confirm().unwrap();
        source.join().unwrap().unwrap();
    });
}

#[test]
fn nothing_is_done_without_a_place_for_the_guest() {
    let (relayed, _) = listen(None);
    let error = relay(relayed, None, None).run(&Arc::default()).unwrap_err();
    assert!(matches!(error, RelayError::Nothing));
    let file: Endpoint = "file:Cargo.toml".parse().unwrap();
    let to = OutgoingConfig {
        to: file,
        ..outgoing_to("tcp::1", None)
    };
    let (relayed, _) = listen(None);
    let error = relay(relayed, None, Some(to))
        .run(&Arc::default())
        .unwrap_err();
    assert!(
        matches!(error, RelayError::Outgoing(OutgoingError::Exists { .. })),
        "{error}"
    );
}
