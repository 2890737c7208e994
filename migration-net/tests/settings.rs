//! Settings that differ between both sides, and limits that have no end, from connecting to the channels' threads.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

#[path = "../../multifd/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{LIMIT, Pages, cause, memory};
use migration_net::incoming::{Acceptor, IncomingError, Limits};
use migration_net::outgoing::connect;
use migration_net::{Address, Listener};
use migration_stream::io::{ByteSink, Chunk, SendMode};
use migration_stream::ram::{BlockId, ZeroPageDetection};
use migration_stream::raw::transport::{PageBarrier, SendPages};
use migration_stream::{StreamWriter, TransportError};
use multifd::{ChannelCount, ChannelError, MultifdConfig, RecvSet, SendSet};

const PAGES: u64 = 600;

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap())
        .zero_pages(ZeroPageDetection::None)
        .stall_limit(LIMIT)
        .send_mode(SendMode::Copy)
}

/// Sends rounds of pages until it fails.
fn send_until_it_fails(set: &mut SendSet, main: &mut StreamWriter) -> TransportError {
    loop {
        let sent = set.send(main, BlockId::new(0), 0, PAGES);
        if let Err(e) = sent.and_then(|()| set.sync(main)) {
            return e;
        }
    }
}

#[test]
fn a_source_with_more_channels_and_its_target_both_say_how_many_they_have() {
    let (source, target) = (config(3), config(2));
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.address().clone();
    let mut acceptor = Acceptor::new(listener, Some(&target), Limits::default()).unwrap();
    let accept = thread::spawn(move || acceptor.accept(None).unwrap_err());
    let mut out = connect(&address, Some(&source), LIMIT, LIMIT, None).unwrap();
    out.main.write_all(&[Chunk::Bytes(b"QEVM")]).unwrap();
    let refused = accept.join().unwrap();
    assert!(matches!(refused, IncomingError::ChannelCount { .. }));
    assert_eq!(
        refused.to_string(),
        "the source has at least 3 multifd channels, this side wants 2"
    );
    let mut main = StreamWriter::new(out.main);
    let channels = out.channels.into_iter().map(Into::into).collect();
    let mut set = SendSet::start(Arc::new(memory(&[PAGES])), channels, &source).unwrap();
    let e = send_until_it_fails(&mut set, &mut main);
    assert!(
        matches!(
            cause(&e),
            (
                Some(_),
                ChannelError::PeerClosed {
                    packets: Some(0),
                    channels: 3,
                    ..
                }
            )
        ),
        "{e:?}"
    );
}

#[test]
fn limits_without_end_are_none_from_the_first_connection_to_the_last_thread() {
    let config = config(2).stall_limit(Duration::MAX);
    let limits = Limits::default()
        .greeting(Duration::MAX)
        .complete(Duration::MAX)
        .channel(Duration::MAX)
        .grace(Duration::MAX)
        .unknown(0);
    let dir = tempfile::tempdir().unwrap();
    let at = Address::Unix(dir.path().join("socket"));
    let listener = Listener::bind(&at).unwrap();
    let mut acceptor = Acceptor::new(listener, Some(&config), limits).unwrap();
    let accept = thread::spawn(move || acceptor.accept(None).unwrap());
    let mut out = connect(&at, Some(&config), Duration::MAX, Duration::MAX, None).unwrap();
    out.main.write_all(&[Chunk::Bytes(b"QEVM")]).unwrap();
    let incoming = accept.join().unwrap();
    let channels = incoming.channels.into_iter().map(Into::into).collect();
    let received = RecvSet::start(memory(&[PAGES]), channels, &config, |_| {}).unwrap();
    let ram = Arc::new(memory(&[PAGES]));
    (0..PAGES).for_each(|page| ram.fill(0, page, 1));
    let mut main = StreamWriter::new(out.main);
    let channels = out.channels.into_iter().map(Into::into).collect();
    let mut set = SendSet::start(ram.clone(), channels, &config).unwrap();
    set.send(&mut main, BlockId::new(0), 0, PAGES).unwrap();
    set.sync(&mut main).unwrap();
    received.barrier().flush().unwrap();
    received.between_packets(None, |_| ()).unwrap();
    set.join().unwrap();
    let joined = received.join().unwrap();
    joined.outcome.unwrap();
    assert_eq!(ram.differing_pages(&joined.store), []);
}
