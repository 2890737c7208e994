//! Settings that differ between both sides, limits that have no end, and memory that has one.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{LIMIT, Pages, cause, memory, text};
use migration_stream::io::{ByteSink, Chunk, FdChannel, Lending};
use migration_stream::ram::{BlockId, ZeroPageDetection};
use migration_stream::{PageBarrier, PageTransport, StreamWriter, TransportError};
use multifd::compression::CompressionError;
use multifd::incoming::{Acceptor, IncomingError, Limits};
use multifd::outgoing::connect;
use multifd::packet::{Method, PacketError};
use multifd::{
    ChannelCount, ChannelError, Compression, Listener, MultifdConfig, RecvSet, SendSet, ZlibLevel,
    ZstdLevel,
};

const PAGES: u64 = 600;

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig {
        channels: ChannelCount::new(channels).unwrap(),
        zero_pages: ZeroPageDetection::None,
        stall_limit: LIMIT,
        lending: Lending::Never,
        ..MultifdConfig::default()
    }
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
fn compression_that_differs_is_told_by_both_sides() {
    let source = MultifdConfig {
        compression: Compression::Zlib(ZlibLevel::default()),
        ..config(2)
    };
    let pair = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let end = |stream| FdChannel::new(stream, LIMIT).unwrap();
        (end(ours).into(), end(theirs).into())
    };
    let (sends, receives) = (0..2).map(|_| pair()).unzip();
    let received = RecvSet::start(memory(&[PAGES]), receives, &config(2), |_| {}).unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut main = StreamWriter::new(FdChannel::new(ours, LIMIT).unwrap());
    let mut set = SendSet::start(Arc::new(memory(&[PAGES])), sends, &source).unwrap();
    let e = send_until_it_fails(&mut set, &mut main);
    assert!(
        matches!(
            cause(&e),
            (
                Some(_),
                ChannelError::PeerClosed {
                    method: Method::Zlib,
                    ..
                }
            )
        ),
        "{e:?}"
    );
    let at_target = received.join().unwrap().outcome.unwrap_err();
    assert!(
        matches!(
            cause(&at_target).1,
            ChannelError::Packet {
                source: PacketError::Method {
                    got: Method::Zlib,
                    expected: Method::None
                },
                ..
            }
        ),
        "{at_target:?}"
    );
}

#[test]
fn limits_without_end_are_none_from_the_first_connection_to_the_last_thread() {
    let config = MultifdConfig {
        stall_limit: Duration::MAX,
        ..config(2)
    };
    let limits = Limits {
        greeting: Duration::MAX,
        complete: Duration::MAX,
        channel: Duration::MAX,
        grace: Duration::MAX,
        unknown: 0,
    };
    let dir = tempfile::tempdir().unwrap();
    let at = multifd::Address::Unix(dir.path().join("socket"));
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

#[test]
fn the_memory_of_all_channels_is_one_setting_and_what_does_not_fit_names_it() {
    let receive = |channels: u8, receive_memory, compression| {
        let config = MultifdConfig {
            receive_memory,
            compression,
            ..config(channels)
        };
        let (peers, ours): (Vec<_>, Vec<_>) = (0..channels)
            .map(|_| {
                let (peer, ours) = UnixStream::pair().unwrap();
                (peer, FdChannel::new(ours, LIMIT).unwrap().into())
            })
            .unzip();
        let set = RecvSet::start(memory(&[PAGES]), ours, &config, |_| {});
        set.map(|set| (set, peers, config))
    };
    let zstd = |level| Compression::Zstd(ZstdLevel::new(level).unwrap());
    // Too little for a codec, and none is needed without compression.
    let e = receive(2, 1 << 20, zstd(1)).unwrap_err();
    assert!(matches!(
        cause(&e).1,
        ChannelError::Setup {
            source: CompressionError::Memory { .. }
        }
    ));
    assert!(text(&e).contains("receive_memory"), "{}", text(&e));
    receive(2, 1 << 20, Compression::None).unwrap();
    // 8 MiB for each of 2 channels are too little for the window of level 20.
    let (received, peers, config) = receive(2, 16 << 20, zstd(20)).unwrap();
    let ends = peers.into_iter();
    let channels = ends.map(|peer| FdChannel::new(peer, LIMIT).unwrap().into());
    let ram = Arc::new(memory(&[PAGES]));
    (0..PAGES).for_each(|page| ram.fill(0, page, 1));
    let mut set = SendSet::start(ram, channels.collect(), &config).unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut main = StreamWriter::new(FdChannel::new(ours, LIMIT).unwrap());
    let _ = set.send(&mut main, BlockId::new(0), 0, PAGES);
    let _ = set.sync(&mut main);
    let e = received.barrier().flush().unwrap_err();
    assert!(
        matches!(
            cause(&e).1,
            ChannelError::Compression {
                source: CompressionError::Window { max: 0x40_0000 },
                ..
            }
        ),
        "{e:?}"
    );
    assert!(text(&e).contains("receive_memory"), "{}", text(&e));
}
