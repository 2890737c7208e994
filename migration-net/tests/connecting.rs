//! Incoming connections of friends, strangers and peers that change their mind.

#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration_net::Address;
use migration_net::incoming::{Acceptor, Incoming, IncomingError, Limits, Refusal, Role};
use migration_net::outgoing::{ConnectError, connect};
use migration_stream::io::{ByteSource, CancelToken};
use multifd::packet::{Hello, PacketError};
use multifd::{ChannelCount, ChannelId, MultifdConfig};

/// Far longer than anything here takes, and short enough for a test to fail.
const LIMIT: Duration = Duration::from_secs(20);

/// Far beyond what a test waits for, unless the test says otherwise.
const LIMITS: Limits = Limits::new()
    .greeting(LIMIT)
    .complete(LIMIT)
    .channel(LIMIT)
    .unknown(64)
    .grace(Duration::from_millis(50));
const SOON: Duration = Duration::from_millis(50);

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap()).uuid([5; 16])
}

/// A listening destination.
struct Door {
    port: u16,
    result: JoinHandle<Result<Incoming, IncomingError>>,
    /// Sources that have failed.
    failed: mpsc::Receiver<IncomingError>,
    refused: mpsc::Receiver<Refusal>,
    cancel: CancelToken,
}

impl Door {
    /// One that waits for another source when one has failed.
    fn open(multifd: Option<MultifdConfig>, limits: Limits) -> Self {
        Self::begin(multifd, limits, false)
    }

    /// One that takes the failure of a source for the end.
    fn open_once(multifd: Option<MultifdConfig>, limits: Limits) -> Self {
        Self::begin(multifd, limits, true)
    }

    fn begin(multifd: Option<MultifdConfig>, limits: Limits, is_last: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (tell, refused) = mpsc::channel();
        let cancel = CancelToken::new().unwrap();
        let cancelled = cancel.clone();
        let mut acceptor = Acceptor::new(listener, multifd.as_ref(), limits)
            .unwrap()
            .on_refused(move |refusal| tell.send(refusal.clone()).unwrap());
        let (fail, failed) = mpsc::channel();
        let result = thread::spawn(move || {
            loop {
                match acceptor.accept(Some(&cancelled)) {
                    Err(e) if e.is_of_the_source() && !is_last => fail.send(e).unwrap(),
                    other => return other,
                }
            }
        });
        Self {
            port,
            result,
            failed,
            refused,
            cancel,
        }
    }

    fn knock(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    fn failure(&self) -> IncomingError {
        self.failed.recv_timeout(LIMIT).unwrap()
    }

    fn refusal(&self) -> Refusal {
        self.refused.recv_timeout(LIMIT).unwrap()
    }
}

fn hello(id: u8) -> Vec<u8> {
    let hello = Hello {
        uuid: [5; 16],
        channel: ChannelId::new(id),
    };
    hello.encode().to_vec()
}

fn is_closed(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    !matches!(stream.read(&mut [0]), Ok(1..))
}

#[test]
fn c2_a_multifd_hello_while_multifd_is_off_closes_that_connection_only() {
    let door = Door::open(None, LIMITS);
    let stranger = door.knock(&hello(0));
    assert!(matches!(door.refusal(), Refusal::MultifdOff));
    assert!(is_closed(stranger));
    let _main = door.knock(b"QEVM");
    let incoming = door.result.join().unwrap().unwrap();
    assert_eq!((&incoming.prefix, incoming.channels.len()), (b"QEVM", 0));
}

#[test]
fn main_and_three_channels_are_told_apart_in_every_order_of_their_coming() {
    let mut order = [0, 1, 2, 3];
    let mut permutations = Vec::new();
    permute(&mut order, 0, &mut permutations);
    assert_eq!(permutations.len(), 24);
    for order in permutations {
        let door = Door::open(Some(config(3)), LIMITS);
        let mut ends: Vec<_> = order
            .iter()
            .map(|id| match id {
                3 => (*id, door.knock(b"QEVM")),
                _ => (*id, door.knock(&hello(*id))),
            })
            .collect();
        let mut incoming = door.result.join().unwrap().unwrap();
        assert_eq!(&incoming.prefix, b"QEVM");
        // Each connection came out where its greeting says, with nothing lost behind that.
        for (id, end) in &mut ends {
            end.write_all(&[*id + 0x40]).unwrap();
        }
        incoming.channels.push(incoming.main);
        for (id, channel) in (0..).zip(&mut incoming.channels) {
            let mut byte = [0];
            assert_eq!(channel.read(&mut byte).unwrap(), 1);
            assert_eq!(byte, [id + 0x40], "order {order:?}");
        }
    }
}

/// All orders of `items` from `at` on.
fn permute(items: &mut [u8; 4], at: usize, found: &mut Vec<[u8; 4]>) {
    if at == items.len() {
        found.push(*items);
    }
    for other in at..items.len() {
        items.swap(at, other);
        permute(items, at + 1, found);
        items.swap(at, other);
    }
}

#[test]
fn c3_connections_that_say_nothing_keep_nobody_waiting() {
    let began = Instant::now();
    let door = Door::open(Some(config(2)), LIMITS);
    let _silent: Vec<_> = (0..20).map(|_| door.knock(b"")).collect();
    let _slow = door.knock(b"QE");
    let _slow_hello = door.knock(&hello(1)[..63]);
    let _channel_1 = door.knock(&hello(1));
    let _channel_0 = door.knock(&hello(0));
    let _main = door.knock(b"QEVM");
    door.result.join().unwrap().unwrap();
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn c3_a_connection_that_says_nothing_in_time_is_closed_and_named() {
    let limits = LIMITS.greeting(SOON);
    let door = Door::open(None, limits);
    let silent = door.knock(b"QEV");
    assert!(matches!(door.refusal(), Refusal::Silent { limit: SOON }));
    assert!(is_closed(silent));
    let _main = door.knock(b"QEVM");
    door.result.join().unwrap().unwrap();
}

#[test]
fn c3_a_flood_of_silent_connections_pushes_out_its_own_oldest() {
    let door = Door::open(None, LIMITS);
    let _silent: Vec<_> = (0..70).map(|_| door.knock(b"")).collect();
    assert!(matches!(door.refusal(), Refusal::Crowded { .. }));
    let _main = door.knock(b"QEVM");
    door.result.join().unwrap().unwrap();
}

#[test]
fn channels_are_handed_out_in_the_order_of_their_ids_with_what_follows_unread() {
    let door = Door::open(Some(config(3)), LIMITS);
    let mut peers = Vec::new();
    for id in [2, 0, 1] {
        let mut bytes = hello(id);
        bytes.push(100 + id);
        peers.push(door.knock(&bytes));
    }
    peers.push(door.knock(b"QEVM\0\0\0\x03"));
    let mut incoming = door.result.join().unwrap().unwrap();
    let mut buf = [0; 8];
    assert_eq!(incoming.main.read(&mut buf).unwrap(), 4);
    assert_eq!(buf[..4], [0, 0, 0, 3]);
    for (id, channel) in (0..).zip(&mut incoming.channels) {
        assert_eq!(channel.read(&mut buf).unwrap(), 1);
        assert_eq!(buf[0], 100 + id);
    }
}

#[test]
fn both_ends_of_every_tcp_connection_have_nodelay_and_local_ones_hold_little() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: Address = format!("tcp:{}", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    let config = config(2);
    let mut acceptor = Acceptor::new(listener, Some(&config), LIMITS).unwrap();
    let out = thread::scope(|scope| {
        let accept = scope.spawn(|| acceptor.accept(None).unwrap());
        let mut out = connect(&address, Some(&config), LIMIT, LIMIT, None).unwrap();
        use migration_stream::io::{ByteSink, Chunk};
        out.main.write_all(&[Chunk::Bytes(b"QEVM")]).unwrap();
        let incoming = accept.join().unwrap();
        let ends = [&out.main, &incoming.main];
        for end in ends
            .into_iter()
            .chain(&out.channels)
            .chain(&incoming.channels)
        {
            assert!(rustix::net::sockopt::tcp_nodelay(end).unwrap());
        }
        // The connection is to this host: nothing is gained by keeping more on its way.
        let most = std::fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap();
        let most: usize = most.trim().parse().unwrap();
        for end in [&out.main].into_iter().chain(&out.channels) {
            let held = rustix::net::sockopt::socket_send_buffer_size(end).unwrap();
            assert_eq!(held, 2 * most.min(256 << 10));
        }
        out
    });
    assert_eq!(out.channels.len(), 2);
}

#[test]
fn connections_that_are_not_of_this_migration_are_closed_and_named() {
    let door = Door::open(Some(config(2)), LIMITS);
    let _main = door.knock(b"QEVM");
    let _channel = door.knock(&hello(0));
    let mut other_vm = hello(1);
    other_vm[8] = 0;
    let mut version_2 = hello(1);
    version_2[7] = 2;
    let refusal = |bytes: &[u8]| {
        let stream = door.knock(bytes);
        let refusal = door.refusal();
        assert!(is_closed(stream));
        refusal
    };
    assert!(matches!(
        refusal(&other_vm),
        Refusal::Hello(PacketError::Uuid { .. })
    ));
    assert!(matches!(
        refusal(&version_2),
        Refusal::Hello(PacketError::Version { got: 2 })
    ));
    assert!(matches!(refusal(&hello(0)), Refusal::ChannelTwice { .. }));
    assert!(matches!(refusal(b"QEVM"), Refusal::SecondMain));
    assert!(matches!(
        refusal(b"SSH-2.0-x"),
        Refusal::Magic { got: 0x5353_482d }
    ));
    let _channel = door.knock(&hello(1));
    door.result.join().unwrap().unwrap();
}

#[test]
fn a_source_that_leaves_makes_room_for_the_next_one() {
    let door = Door::open(Some(config(1)), LIMITS);
    drop(door.knock(&hello(0)));
    let left = Role::Channel(ChannelId::new(0));
    assert!(matches!(door.refusal(), Refusal::Left { role } if role == left));
    assert!(matches!(door.failure(), IncomingError::Left { role, .. } if role == left));
    drop(door.knock(b"QEVM"));
    assert!(matches!(door.refusal(), Refusal::Left { role: Role::Main }));
    assert!(matches!(
        door.failure(),
        IncomingError::Left {
            role: Role::Main,
            ..
        }
    ));
    let _channel = door.knock(&hello(0));
    let _main = door.knock(b"QEVM");
    door.result.join().unwrap().unwrap();
}

#[test]
fn a_set_that_does_not_become_complete_is_an_error_that_names_what_is_missing() {
    let limits = LIMITS.complete(SOON);
    let door = Door::open_once(Some(config(3)), limits);
    let _channel = door.knock(&hello(1));
    let e = door.result.join().unwrap().unwrap_err();
    assert!(
        matches!(&e, IncomingError::Incomplete { main: false, missing, last_refusal: None, .. }
        if *missing == [ChannelId::new(0), ChannelId::new(2)])
    );
    assert_eq!(
        e.to_string(),
        "connections are missing: the main channel, multifd channel 0, multifd channel 2 \
         (the source opened 1 multifd channel, this side wants 3)"
    );
}

#[test]
fn a_main_channel_that_closes_ends_the_wait_for_its_channels_at_once() {
    let began = Instant::now();
    let door = Door::open_once(Some(config(2)), LIMITS);
    let _channel = door.knock(&hello(1));
    // More than the greeting, none of it read; only the writing end is shut.
    let main = door.knock(&[&b"QEVM"[..], &[0; 1000]].concat());
    main.shutdown(std::net::Shutdown::Write).unwrap();
    let e = door.result.join().unwrap().unwrap_err();
    assert_eq!(
        e.to_string(),
        "the source closed the main channel while connections were missing: multifd channel 0 \
         (the source opened 1 multifd channel, this side wants 2)"
    );
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn a_source_that_gives_up_is_reported_once_by_what_was_missing_before_it_left() {
    let door = Door::open(Some(config(3)), LIMITS);
    let connections = [
        door.knock(b"QEVM"),
        door.knock(&hello(0)),
        door.knock(&hello(1)),
    ];
    // That they were taken is seen by what is refused: twins of them.
    for twin in [&b"QEVM"[..], &hello(0), &hello(1)] {
        door.knock(twin);
        door.refusal();
    }
    for connection in connections {
        drop(connection);
        assert!(matches!(door.refusal(), Refusal::Left { .. }));
    }
    let e = door.failure();
    assert!(
        matches!(&e, IncomingError::Left { role: Role::Main, main: true, opened, missing, .. }
            if opened.len() == 2 && *missing == [ChannelId::new(2)]),
        "{e:?}"
    );
    let _next = [door.knock(b"QEVM"), door.knock(&hello(0))];
    let _next = [_next, [door.knock(&hello(1)), door.knock(&hello(2))]];
    door.result.join().unwrap().unwrap();
    assert!(door.failed.try_recv().is_err());
}

#[test]
fn a_source_with_more_channels_is_refused_by_the_numbers_of_both_sides() {
    let door = Door::open_once(Some(config(2)), LIMITS);
    let _third = door.knock(&hello(2));
    assert!(matches!(
        door.refusal(),
        Refusal::Hello(PacketError::Channel { .. })
    ));
    let _channels = [door.knock(&hello(0)), door.knock(&hello(1))];
    let _main = door.knock(b"QEVM");
    let e = door.result.join().unwrap().unwrap_err();
    assert_eq!(
        e.to_string(),
        "the source has at least 3 multifd channels, this side wants 2"
    );
}

#[test]
fn a_limit_without_end_is_none() {
    let limits = Limits::default()
        .greeting(Duration::MAX)
        .complete(Duration::MAX)
        .channel(Duration::MAX)
        .grace(Duration::MAX)
        .unknown(1);
    let door = Door::open(Some(config(1)), limits);
    let _silent = door.knock(b"");
    let _channel = door.knock(&hello(0));
    let _main = door.knock(b"QEVM");
    door.result.join().unwrap().unwrap();
}

#[test]
fn waiting_for_nobody_can_be_cancelled() {
    for knock in [&b""[..], b"QEVM"] {
        let door = Door::open(Some(config(1)), LIMITS);
        let _somebody = door.knock(knock);
        door.cancel.cancel();
        assert!(matches!(
            door.result.join().unwrap(),
            Err(IncomingError::Cancelled)
        ));
    }
}

#[test]
fn connecting_where_nobody_listens_is_refused() {
    // The near end's port of a connection is given to nobody who would listen.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let address: Address = format!("tcp:{}", taken.local_addr().unwrap())
        .parse()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    for address in [address, Address::Unix(dir.path().join("nobody"))] {
        let e = connect(&address, None, LIMIT, LIMIT, None).unwrap_err();
        assert!(
            matches!(
                &e,
                ConnectError::Refused {
                    role: Role::Main,
                    ..
                }
            ),
            "{e}"
        );
    }
}

#[test]
fn a_listener_that_takes_no_connections_is_busy_in_bounded_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let began = Instant::now();
    let e = connect(&Address::Unix(path), Some(&config(255)), SOON, LIMIT, None).unwrap_err();
    assert!(
        matches!(
            &e,
            ConnectError::Busy {
                role: Role::Channel(_),
                ..
            }
        ),
        "{e}"
    );
    assert!(began.elapsed() < LIMIT / 2);
}
