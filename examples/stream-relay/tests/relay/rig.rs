//! A source, the relay and a destination, each with an end of its own.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use migration_stream::ram::ZeroPageDetection;
use multifd::{ChannelCount, Compression, ZlibLevel, ZstdLevel};
use stream_relay::guest::Guest;
use stream_relay::incoming::{Incoming, IncomingConfig};
use stream_relay::outgoing::{self, OutgoingConfig, OutgoingError};
use stream_relay::progress::{Figures, Progress};
use stream_relay::relay::{Origin, Relay, RelayError, Report};
use stream_relay::{Access, Channels};

use crate::guest::PAGES;

pub fn incoming(from: &str, channels: Option<Channels>) -> IncomingConfig {
    IncomingConfig {
        from: from.parse().unwrap(),
        channels,
        access: Access::default(),
        xbzrle: false,
        machine_version: None,
        uuid: [0; 16],
        max_memory: 1 << 30,
        max_device_state: 64 << 20,
        without_return_path: false,
        timeout: Duration::from_secs(20),
        pause_timeout: Duration::from_secs(20),
    }
}

pub fn outgoing_to(to: &str, channels: Option<Channels>) -> OutgoingConfig {
    OutgoingConfig {
        to: to.parse().unwrap(),
        channels,
        mapped_ram: None,
        zero_pages: ZeroPageDetection::Legacy,
        max_bandwidth: 0,
        machine_version: None,
        uuid: [0; 16],
        timeout: Duration::from_secs(20),
    }
}

/// A listener on a port of its own, and its address.
pub fn listen(channels: Option<Channels>) -> (Incoming, String) {
    let incoming = Incoming::open(incoming("tcp:127.0.0.1:0", channels)).unwrap();
    let address = incoming.address().unwrap().to_string();
    (incoming, address)
}

pub fn relay(from: Incoming, store: Option<&Path>, to: Option<OutgoingConfig>) -> Relay {
    Relay {
        from: Origin::Source(Box::new(from)),
        store: store.map(Into::into),
        to,
        remove_store: false,
    }
}

pub fn zstd(count: u8) -> Option<Channels> {
    Some(Channels {
        count: ChannelCount::new(count).unwrap(),
        compression: Compression::Zstd(ZstdLevel::default()),
    })
}

pub fn zlib(count: u8) -> Option<Channels> {
    Some(Channels {
        count: ChannelCount::new(count).unwrap(),
        compression: Compression::Zlib(ZlibLevel::default()),
    })
}

pub type Sending<'a> = ScopedJoinHandle<'a, Result<Figures, OutgoingError>>;

pub fn send_from<'a>(
    scope: &'a thread::Scope<'a, '_>,
    guest: &'a Guest,
    to: OutgoingConfig,
) -> Sending<'a> {
    scope.spawn(move || outgoing::send(guest, &to, &Progress::default()))
}

type Relaying<'a> = ScopedJoinHandle<'a, Result<Report, RelayError>>;

/// Passes a guest on as it comes, without keeping it.
pub fn pass_on<'a>(
    scope: &'a thread::Scope<'a, '_>,
    from: Incoming,
    to: OutgoingConfig,
) -> Relaying<'a> {
    scope.spawn(move || relay(from, None, Some(to)).run(&Arc::default()))
}

/// A guest on its way through the relay.
pub struct Passage<'a> {
    pub source: Sending<'a>,
    pub relaying: Relaying<'a>,
    /// To be received.
    pub destination: Incoming,
}

/// Sends a guest to the relay by the channels of `from`, and on from there by those of `to`.
pub fn pass<'a>(
    scope: &'a thread::Scope<'a, '_>,
    guest: &'a Guest,
    from: Option<Channels>,
    to: Option<Channels>,
) -> Passage<'a> {
    let (relayed, to_relay) = listen(from);
    let (destination, to_destination) = listen(to);
    Passage {
        source: send_from(scope, guest, outgoing_to(&to_relay, from)),
        relaying: pass_on(scope, relayed, outgoing_to(&to_destination, to)),
        destination,
    }
}

/// The address of a port on which nobody listens.
pub fn nobody() -> String {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    format!("tcp:{}", address.unwrap())
}

/// The stream that goes into a file, in which there is no return path.
pub fn stream_of(guest: &Guest) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let to = format!("file:{}", path.display());
    outgoing::send(guest, &outgoing_to(&to, None), &Progress::default()).unwrap();
    fs::read(&path).unwrap()
}

pub fn expect_figures(report: Report) {
    // The two thirds of memory that are not zero, and the page of the rom.
    let content = PAGES as u64 - PAGES.div_ceil(3) as u64 + 1;
    for figures in [report.received, report.sent].into_iter().flatten() {
        // Each page once, passed on as it comes or not.
        assert_eq!(figures.pages, content);
        assert_eq!(figures.pages + figures.zero_pages, PAGES as u64 + 2);
        assert!(figures.bytes > 0 && figures.mib_per_second() > 0.0);
    }
}
