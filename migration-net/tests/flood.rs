//! A thousand connections that say nothing, or half of a greeting, and one real source.

#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migration_net::Listener;
use migration_net::incoming::{Acceptor, Incoming, IncomingError, Limits, Refusal};
use migration_stream::io::ByteSource;
use multifd::packet::Hello;
use multifd::{ChannelCount, ChannelId, MultifdConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Far longer than anything here takes, and short enough for a test to fail.
const LIMIT: Duration = Duration::from_secs(20);

const FLOOD: usize = 1000;
const UUID: [u8; 16] = [5; 16];

/// As short a grace as a test can wait for several times.
fn limits() -> Limits {
    Limits::default()
        .greeting(LIMIT)
        .complete(LIMIT)
        .channel(LIMIT)
        .grace(Duration::from_millis(100))
}

/// More time for a source that has to speak within the grace.
fn with_more_grace() -> Limits {
    limits().unknown(600).grace(Duration::from_secs(1))
}

fn config() -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(2).unwrap()).uuid(UUID)
}

fn hello(id: u8) -> [u8; 64] {
    let channel = ChannelId::new(id);
    Hello {
        uuid: UUID,
        channel,
    }
    .encode()
}

/// Both ends of all connections are this process's.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum.unwrap_or(u64::MAX).min(8192);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(current),
            maximum: limit.maximum,
        },
    )
    .unwrap();
    assert!(current >= 4096, "this test opens 4096 descriptors");
}

/// A listening destination, and how to connect to it.
struct Target<S> {
    connect: Box<dyn Fn() -> S>,
    result: JoinHandle<Result<Incoming, IncomingError>>,
    given_way: Arc<AtomicUsize>,
    others: Arc<AtomicUsize>,
    _dir: Option<tempfile::TempDir>,
}

fn target<S>(
    listener: impl Into<Listener>,
    connect: impl Fn() -> S + 'static,
    dir: Option<tempfile::TempDir>,
    limits: Limits,
) -> Target<S> {
    allow_descriptors();
    let (given_way, others) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let counts = (Arc::clone(&given_way), Arc::clone(&others));
    let mut acceptor = Acceptor::new(listener, Some(&config()), limits)
        .unwrap()
        .on_refused(move |refusal| {
            let count = match refusal {
                Refusal::Crowded { .. } => &counts.0,
                _ => &counts.1,
            };
            count.fetch_add(1, Ordering::Relaxed);
        });
    Target {
        connect: Box::new(connect),
        result: thread::spawn(move || acceptor.accept(None)),
        given_way,
        others,
        _dir: dir,
    }
}

fn tcp(limits: Limits) -> Target<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    target(
        listener,
        move || TcpStream::connect(address).unwrap(),
        None,
        limits,
    )
}

fn unix(limits: Limits) -> Target<UnixStream> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let connect = move || UnixStream::connect(&path).unwrap();
    target(listener, connect, Some(dir), limits)
}

impl<S: Read + Write> Target<S> {
    /// Connections that say nothing, or the beginning of a greeting.
    fn flood(&self, connections: usize) -> Vec<S> {
        let half = [&b""[..], b"QE", &hello(0)[..4], &hello(1)[..63]];
        (0..connections)
            .map(|i| {
                let mut stream = (self.connect)();
                stream.write_all(half[i % half.len()]).unwrap();
                stream
            })
            .collect()
    }

    /// What a source does when its connections are there: the channels introduce themselves, and then
    /// the main stream begins.
    fn introduce(mut main: S, channels: Vec<S>) -> Vec<S> {
        let mut all = Vec::new();
        for (id, mut channel) in (0..).zip(channels) {
            channel.write_all(&hello(id)).unwrap();
            channel.write_all(&[id]).unwrap();
            all.push(channel);
        }
        main.write_all(b"QEVM").unwrap();
        main.write_all(&[9]).unwrap();
        all.push(main);
        all
    }

    /// The source's connections were taken, and nobody else's.
    fn takes(self, _source: Vec<S>) {
        let mut incoming = self.result.join().unwrap().unwrap();
        assert_eq!(incoming.channels.len(), 2);
        incoming.channels.push(incoming.main);
        for (channel, expected) in incoming.channels.iter_mut().zip([0, 1, 9]) {
            let mut byte = [0xff];
            assert_eq!(channel.read(&mut byte).unwrap(), 1);
            assert_eq!(byte, [expected]);
        }
        assert_eq!(self.others.load(Ordering::Relaxed), 0);
    }

    fn wait_for_given_way(&self, least: usize) {
        let began = std::time::Instant::now();
        while self.given_way.load(Ordering::Relaxed) < least {
            assert!(began.elapsed() < LIMIT, "the flood is not taken in");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn source_before(self) {
        let main = (self.connect)();
        let channels = vec![(self.connect)(), (self.connect)()];
        let _flood = self.flood(FLOOD);
        // All of it was accepted, and what is too much has been closed; the source is silent still.
        self.wait_for_given_way(FLOOD + 3 - 259);
        let source = Self::introduce(main, channels);
        self.takes(source);
    }

    fn source_after(self) {
        let _flood = self.flood(FLOOD);
        let main = (self.connect)();
        let channels = vec![(self.connect)(), (self.connect)()];
        let source = Self::introduce(main, channels);
        self.takes(source);
    }

    fn source_in_the_middle(self) {
        let _before = self.flood(FLOOD / 2);
        let main = (self.connect)();
        let _between = self.flood(FLOOD / 4);
        let channels = vec![(self.connect)(), (self.connect)()];
        let _behind = self.flood(FLOOD / 4);
        let source = Self::introduce(main, channels);
        self.takes(source);
    }
}

#[test]
fn a_source_that_came_before_a_thousand_silent_connections_is_taken() {
    tcp(limits()).source_before();
    unix(limits()).source_before();
}

#[test]
fn a_source_that_comes_behind_a_thousand_silent_connections_is_taken() {
    tcp(limits()).source_after();
    unix(limits()).source_after();
}

#[test]
fn a_source_that_comes_between_a_thousand_silent_connections_is_taken() {
    tcp(with_more_grace()).source_in_the_middle();
    unix(with_more_grace()).source_in_the_middle();
}
