//! A source that does not open all its connections.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod streams;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use migration_net::Address;
use multifd::packet::{Hello, PacketError};
use multifd::{ChannelCount, MultifdConfig};
use multifd::{ChannelError, ChannelId};
use stream_inspect::incoming::{IncomingError, ListenConfig, Listening};
use stream_inspect::scan::{ScanError, scan};

/// Far longer than anything here takes, and shorter than what multifd waits for by itself.
const LONG: Duration = Duration::from_secs(10);

/// What a source that opens its main channel, writes, and maybe leaves, is told within `timeout`.
fn error_of(timeout: Duration, leaves: bool) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listening = Listening::open(ListenConfig {
        at: Address::Unix(path.clone()),
        multifd: Some(MultifdConfig::new(ChannelCount::new(1).unwrap())),
        without_return_path: false,
        timeout,
    })
    .unwrap();
    let mut main = UnixStream::connect(path).unwrap();
    main.write_all(&[&b"QEVM"[..], &[0; 996]].concat()).unwrap();
    if leaves {
        main.shutdown(Shutdown::Write).unwrap();
    }
    let began = Instant::now();
    let error = listening.accept().map(|_| ()).unwrap_err();
    assert!(began.elapsed() < LONG);
    std::error::Error::source(&error).unwrap().to_string()
}

#[test]
fn a_main_channel_that_closes_ends_the_wait_for_channels_at_once() {
    assert_eq!(
        error_of(Duration::MAX, true),
        "the source closed the main channel while connections were missing: multifd channel 0 \
         (the source opened 0 multifd channels, this side wants 1)"
    );
}

#[test]
fn channels_are_waited_for_as_long_as_the_timeout_says() {
    assert_eq!(
        error_of(Duration::from_millis(200), false),
        "connections are missing: multifd channel 0 \
         (the source opened 0 multifd channels, this side wants 1)"
    );
}

#[test]
fn a_stream_that_ends_because_a_channel_failed_is_told_by_what_the_channel_met() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listening = Listening::open(ListenConfig {
        at: Address::Unix(path.clone()),
        multifd: Some(MultifdConfig::new(ChannelCount::new(1).unwrap())),
        without_return_path: true,
        timeout: LONG,
    })
    .unwrap();
    let mut main = UnixStream::connect(&path).unwrap();
    // Until RAM is announced; the rest never comes.
    main.write_all(&streams::whole()[..200]).unwrap();
    let mut channel = UnixStream::connect(&path).unwrap();
    let hello = Hello {
        uuid: [0; 16],
        channel: ChannelId::new(0),
    };
    channel.write_all(&hello.encode()).unwrap();
    channel.write_all(b"neither magic nor version").unwrap();
    let (mut origin, reader) = listening.accept().unwrap();
    let error = scan(reader, &mut origin, 64 << 20, None, &mut |_| ()).unwrap_err();
    let ScanError::Incoming(IncomingError::Channels(error)) = error else {
        panic!("{error:?}");
    };
    assert_eq!(error.channel, Some(0));
    let cause = error.source.downcast_ref().unwrap();
    assert!(
        matches!(
            cause,
            ChannelError::Packet {
                index: 0,
                source: PacketError::Magic { .. }
            }
        ),
        "{cause:?}"
    );
}
