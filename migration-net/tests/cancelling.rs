//! A cancel ends connecting, accepting and what waits for the connections, whatever the peer does.

#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use migration_net::incoming::{Acceptor, Limits};
use migration_net::outgoing::{ConnectError, connect};
use migration_net::{Address, Listener, ResolvedAddress};
use migration_stream::io::{ByteSink, ByteSource, CancelToken, Chunk, FdChannel, is_cancelled};
use multifd::{ChannelCount, MultifdConfig};

/// Far longer than anything here takes, and short enough for a test to fail.
const LIMIT: Duration = Duration::from_secs(20);

/// Long enough that what is to be cancelled waits by then.
const SOON: Duration = Duration::from_millis(50);

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap())
}

/// Runs `wait` with a token that is cancelled while it waits, and checks that it ends then.
fn cancelled<T>(wait: impl FnOnce(&CancelToken) -> T) -> T {
    let token = CancelToken::new().unwrap();
    let other = token.clone();
    let canceller = thread::spawn(move || {
        thread::sleep(SOON);
        other.cancel();
    });
    let begun = Instant::now();
    let result = wait(&token);
    assert!(token.is_cancelled(), "it did not wait");
    assert!(begun.elapsed() < LIMIT / 2);
    canceller.join().unwrap();
    result
}

/// A listener that drops every SYN but the first, and who has made that.
fn full_tcp() -> (TcpListener, TcpStream, Address) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let at = listener.local_addr().unwrap();
    let first = TcpStream::connect(at).unwrap();
    (listener, first, at.into())
}

#[test]
fn connecting_to_a_host_that_drops_syns_is_cancelled() {
    let (_listener, _first, address) = full_tcp();
    let error = cancelled(|token| connect(&address, None, LIMIT, LIMIT, Some(token)).unwrap_err());
    assert!(matches!(&error, ConnectError::Cancelled { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        format!("connecting to {address} was cancelled")
    );
}

#[test]
fn connecting_to_a_full_unix_backlog_is_cancelled_at_any_channel() {
    let directory = tempfile::tempdir().unwrap();
    for places in [0, 3] {
        let path = directory.path().join(places.to_string());
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, places).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let to = Address::Unix(path);
        let error = cancelled(|token| {
            connect(&to, Some(&config(8)), LIMIT, LIMIT, Some(token)).unwrap_err()
        });
        assert!(matches!(error, ConnectError::Cancelled { .. }), "{error}");
    }
}

#[test]
fn a_full_unix_backlog_that_gets_room_is_connected_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let to = Address::Unix(path);
    thread::scope(|scope| {
        let connecting = scope.spawn(|| connect(&to, None, LIMIT, LIMIT, None).unwrap());
        thread::sleep(SOON);
        listener.accept().unwrap();
        let out = connecting.join().unwrap();
        listener.accept().unwrap();
        drop(out);
    });
}

#[test]
fn nothing_is_connected_once_it_was_cancelled() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at: Address = listener.local_addr().unwrap().into();
    let token = CancelToken::new().unwrap();
    token.cancel();
    let late = Instant::now() + LIMIT;
    let route = ResolvedAddress::new(&at, late, None).unwrap();
    assert!(is_cancelled(
        &route.connect(late, Some(&token)).unwrap_err()
    ));
    let named = Address::tcp("localhost", 1);
    let error = connect(&named, None, LIMIT, LIMIT, Some(&token)).unwrap_err();
    assert!(matches!(error, ConnectError::Cancelled { .. }), "{error}");
}

#[test]
fn connections_of_both_sides_hear_the_cancel_afterwards() {
    let listener = Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
    let to = listener.address().clone();
    let config = config(2);
    let mut acceptor = Acceptor::new(listener, Some(&config), Limits::default()).unwrap();
    let (ours, theirs) = (CancelToken::new().unwrap(), CancelToken::new().unwrap());
    let (out, incoming) = thread::scope(|scope| {
        let accepting = scope.spawn(|| acceptor.accept(Some(&theirs)).unwrap());
        let mut out = connect(&to, Some(&config), LIMIT, LIMIT, Some(&ours)).unwrap();
        out.main.write_all(&[Chunk::Bytes(b"QEVM")]).unwrap();
        (out, accepting.join().unwrap())
    });
    let mut each = Vec::new();
    each.extend([out.main.share(), incoming.main.share()]);
    each.extend(out.channels.iter().map(FdChannel::share));
    each.extend(incoming.channels.iter().map(FdChannel::share));
    assert_eq!(each.len(), 6);
    thread::scope(|scope| {
        let begun = Instant::now();
        let waits: Vec<_> = each
            .iter_mut()
            .map(|channel| scope.spawn(|| channel.read(&mut [0]).unwrap_err()))
            .collect();
        thread::sleep(SOON);
        ours.cancel();
        theirs.cancel();
        for wait in waits {
            assert!(is_cancelled(&wait.join().unwrap()));
        }
        assert!(begun.elapsed() < LIMIT / 2);
    });
}
