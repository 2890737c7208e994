//! Sources and destinations that refuse, break off, say nothing or are not there: the guest is never
//! lost, and nobody has it twice.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration_stream::precopy::SourceError;
use stream_relay::incoming::{Incoming, IncomingError};
use stream_relay::memory::HoldError;
use stream_relay::outgoing::OutgoingError;
use stream_relay::relay::RelayError;

use crate::guest::{assert_same, guest};
use crate::rig::{
    incoming, listen, nobody, outgoing_to, pass, pass_on, relay, send_from, stream_of, zlib,
};

#[test]
fn a_destination_that_refuses_leaves_the_guest_at_its_source() {
    let guest = guest("microvm");
    thread::scope(|scope| {
        let passage = pass(scope, &guest, None, None);
        let received = passage.destination.receive(&Arc::default());
        received.unwrap().refuse();
        let error = passage.relaying.join().unwrap().unwrap_err();
        assert!(matches!(error, RelayError::Outgoing(_)), "{error}");
        let error = passage.source.join().unwrap().unwrap_err();
        let OutgoingError::Stream(SourceError::Refused { status: 1 }) = error else {
            panic!("{error:?}");
        };
    });
}

#[test]
fn a_destination_that_says_nothing_may_have_the_guest_and_the_relay_says_so() {
    let guest = guest("microvm");
    thread::scope(|scope| {
        let passage = pass(scope, &guest, None, None);
        let received = passage.destination.receive(&Arc::default());
        drop(received.unwrap());
        let error = passage.relaying.join().unwrap().unwrap_err();
        let RelayError::Uncertain { waiting, .. } = error else {
            panic!("{error:?}");
        };
        // Neither runs the guest on before an operator says which of them.
        assert!(waiting.is_waiting());
        drop(waiting);
        let error = passage.source.join().unwrap().unwrap_err();
        assert!(matches!(error, OutgoingError::Unconfirmed(_)), "{error}");
    });
}

#[test]
fn a_destination_that_is_not_there_stops_no_guest() {
    let guest = guest("microvm");
    let to = outgoing_to(&nobody(), None);
    for channels in [None, zlib(2)] {
        let (relayed, to_relay) = listen(channels);
        let mut from = outgoing_to(&to_relay, channels);
        // So slow that it could not have ended by itself.
        from.max_bandwidth = 10_000;
        thread::scope(|scope| {
            let source = send_from(scope, &guest, from);
            let error = relay(relayed, None, Some(to.clone())).run(&Arc::default());
            assert!(matches!(error, Err(RelayError::Outgoing(_))), "{error:?}");
            let error = source.join().unwrap().unwrap_err();
            assert!(!matches!(error, OutgoingError::Unconfirmed(_)), "{error}");
        });
    }
}

#[test]
fn a_source_that_breaks_off_leaves_the_destination_without_guest() {
    let dir = tempfile::tempdir().unwrap();
    let stream = stream_of(&guest("microvm"));
    let socket = dir.path().join("socket");
    let mut config = incoming(&format!("unix:{}", socket.display()), None);
    config.without_return_path = true;
    let relayed = Incoming::open(config).unwrap();
    let (destination, to_destination) = listen(None);
    thread::scope(|scope| {
        let relaying = pass_on(scope, relayed, outgoing_to(&to_destination, None));
        let mut source = UnixStream::connect(&socket).unwrap();
        source.write_all(&stream[..stream.len() / 2]).unwrap();
        drop(source);
        assert!(destination.receive(&Arc::default()).is_err());
        let error = relaying.join().unwrap().unwrap_err();
        assert!(matches!(error, RelayError::Incoming(_)), "{error}");
    });
}

#[test]
fn a_source_that_does_not_wait_for_the_answer_keeps_its_guest_and_the_destination_gets_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut stream = stream_of(&guest("microvm"));
    let ram = b"\x01\0\0\0\x01\x03ram";
    let ram = stream.windows(ram.len()).position(|bytes| bytes == ram);
    let open_return_path = b"\x08\0\x01\0\0";
    let ram = ram.unwrap();
    stream.splice(ram..ram, *open_return_path);
    let socket = dir.path().join("socket");
    let config = incoming(&format!("unix:{}", socket.display()), None);
    let relayed = Incoming::open(config).unwrap();
    let (destination, to_destination) = listen(None);
    let mut to = outgoing_to(&to_destination, None);
    // The source has gone long before its devices are due.
    to.max_bandwidth = 1 << 20;
    thread::scope(|scope| {
        let relaying = pass_on(scope, relayed, to);
        let mut source = UnixStream::connect(&socket).unwrap();
        source.write_all(&stream).unwrap();
        drop(source);
        assert!(destination.receive(&Arc::default()).is_err());
        let error = relaying.join().unwrap().unwrap_err();
        let RelayError::Outgoing(OutgoingError::Stream(SourceError::Vm { source, .. })) = error
        else {
            panic!("{error:?}");
        };
        assert!(source.to_string().contains("did not wait"), "{source}");
    });
}

#[test]
fn a_source_without_return_path_is_refused_unless_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let guest = guest("microvm");
    let stream = stream_of(&guest);
    for is_asked_for in [false, true] {
        let socket = dir.path().join("socket");
        let mut config = incoming(&format!("unix:{}", socket.display()), None);
        config.without_return_path = is_asked_for;
        let relayed = Incoming::open(config).unwrap();
        let taken = thread::scope(|scope| {
            scope.spawn(|| {
                // The relay may hang up before it has everything.
                let _ = UnixStream::connect(&socket).unwrap().write_all(&stream);
            });
            relayed.receive(&Arc::default())
        });
        assert!(!socket.exists(), "the socket's name is gone");
        match taken {
            Ok(taken) => {
                assert!(is_asked_for && !taken.is_awaited());
                assert_same(&guest, &taken.guest);
            }
            Err(e) => assert!(
                !is_asked_for && matches!(e, IncomingError::NoReturnPath),
                "{e}"
            ),
        }
    }
}

#[test]
fn a_guest_larger_than_may_be_held_runs_on_at_its_source() {
    let guest = guest("microvm");
    let mut config = incoming("tcp:127.0.0.1:0", None);
    config.max_memory = 1 << 20;
    let relayed = Incoming::open(config).unwrap();
    let to_relay = relayed.address().unwrap().to_string();
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let error = relayed.receive(&Arc::default()).unwrap_err();
        assert!(
            matches!(error, IncomingError::Hold(HoldError::TooLarge { .. })),
            "{error}"
        );
        assert!(source.join().unwrap().is_err());
    });
}

#[test]
fn a_source_that_falls_silent_is_an_error_when_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut config = incoming(&format!("unix:{}", socket.display()), None);
    config.timeout = Duration::from_millis(50);
    let relayed = Incoming::open(config).unwrap();
    let mut silent = UnixStream::connect(&socket).unwrap();
    silent.write_all(b"QEVM\0\0\0\x03").unwrap();
    let error = relayed.receive(&Arc::default()).unwrap_err();
    assert!(matches!(error, IncomingError::Stream(_)), "{error}");
}
