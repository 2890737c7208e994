//! Settings that differ between both sides, and memory that has a bound.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{LIMIT, Pages, cause, memory, text};
use migration_stream::io::{FdChannel, SendMode};
use migration_stream::ram::{BlockId, ZeroPageDetection};
use migration_stream::raw::transport::{PageBarrier, SendPages};
use migration_stream::{StreamWriter, TransportError};
use multifd::compression::CompressionError;
use multifd::packet::{Method, PacketError};
use multifd::{
    ChannelCount, ChannelError, Compression, MultifdConfig, RecvSet, SendSet, ZlibLevel, ZstdLevel,
};

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
fn compression_that_differs_is_told_by_both_sides() {
    let source = config(2).compression(Compression::Zlib(ZlibLevel::default()));
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
fn the_memory_of_all_channels_is_one_setting_and_what_does_not_fit_names_it() {
    let receive = |channels: u8, receive_memory, compression| {
        let config = config(channels)
            .receive_memory(receive_memory)
            .compression(compression);
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
