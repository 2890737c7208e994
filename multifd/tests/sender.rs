//! A sender against peers that die or stop reading: a typed error in bounded time.

#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Pages, cause, memory, text};
use migration_stream::io::{ByteSink, Chunk, FdChannel, SendMode};
use migration_stream::ram::{BlockId, ZeroPageDetection};
use migration_stream::raw::transport::SendPages;
use migration_stream::{GuestRamMmap, IdStr, InstanceId, StreamWriter, WhenToCompare};
use multifd::device_state::{DeviceId, DeviceStateHeader};
use multifd::packet::{HEADER_LEN, Method, PacketView};
use multifd::{ChannelCount, ChannelError, Flush, MultifdConfig, SendChannel, SendSet};

const PAGES: u64 = 4096;

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap())
        .zero_pages(ZeroPageDetection::None)
        .stall_limit(LIMIT)
        // The peers of these tests read when all is over.
        .send_mode(SendMode::Copy)
}

struct Sender {
    ram: Arc<GuestRamMmap>,
    set: SendSet,
    main: StreamWriter,
    peers: Vec<UnixStream>,
    /// What reads the main stream.
    main_peer: UnixStream,
}

fn sender(config: &MultifdConfig) -> Sender {
    let (channels, peers) = config
        .channels
        .ids()
        .map(|_| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let channel = FdChannel::new(ours, LIMIT).unwrap();
            (SendChannel::from(channel), theirs)
        })
        .unzip();
    let (main, main_peer) = UnixStream::pair().unwrap();
    let ram = Arc::new(memory(&[PAGES]));
    Sender {
        set: SendSet::start(ram.clone(), channels, config).unwrap(),
        ram,
        main: StreamWriter::new(FdChannel::new(main, LIMIT).unwrap()),
        peers,
        main_peer,
    }
}

impl Sender {
    fn send(&mut self, pages: u64) -> Result<(), migration_stream::TransportError> {
        self.set.send(&mut self.main, BlockId::new(0), 0, pages)
    }

    fn sync(&mut self) -> Result<(), migration_stream::TransportError> {
        self.set.sync(&mut self.main)
    }
}

#[test]
fn every_channel_carries_one_sync_packet_behind_its_pages_and_then_main_its_flush() {
    let mut s = sender(&config(3));
    s.send(2).unwrap();
    s.sync().unwrap();
    let mut flush = [0; 8];
    s.main_peer.read_exact(&mut flush).unwrap();
    assert_eq!(flush, [0, 0, 0, 0, 0, 0, 2, 0]);
    s.set.join().unwrap();
    let mut numbers = Vec::new();
    let mut pages = 0;
    for mut peer in s.peers {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        let mut syncs = 0;
        let mut rest = bytes.as_slice();
        while let Some((header, behind)) = rest.split_first_chunk::<HEADER_LEN>() {
            let packet = PacketView::unfill(header, Method::None).unwrap();
            assert_eq!(syncs, 0, "a packet behind the sync packet");
            syncs += usize::from(packet.is_sync());
            pages += packet.normal_pages();
            numbers.push(packet.number());
            rest = &behind[packet.payload_len() as usize..];
        }
        assert_eq!((syncs, rest.len()), (1, 0));
    }
    numbers.sort_unstable();
    assert_eq!((numbers, pages), (vec![0, 1, 2, 3], 2));
}

#[test]
fn synced_with_each_section_the_channels_are_so_at_its_end_and_main_says_nothing() {
    let mut s = sender(&config(2).flush(Flush::EachSection));
    s.send(2).unwrap();
    s.sync().unwrap();
    s.set.end_section(&mut s.main).unwrap();
    s.set.end_section(&mut s.main).unwrap();
    s.set.join().unwrap();
    drop(s.main);
    assert_eq!(s.main_peer.read(&mut [0; 8]).unwrap(), 0);
    for mut peer in s.peers {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() >= 2 * HEADER_LEN);
        for header in bytes[bytes.len() - 2 * HEADER_LEN..].chunks(HEADER_LEN) {
            let header = header.try_into().unwrap();
            assert!(PacketView::unfill(header, Method::None).unwrap().is_sync());
        }
    }
}

#[test]
fn legacy_zero_pages_are_records_of_the_main_stream_ahead_of_its_flush() {
    let mut s = sender(&config(1).zero_pages(ZeroPageDetection::Legacy));
    s.ram.fill(0, 1, 9);
    s.send(3).unwrap();
    s.sync().unwrap();
    let counters = s.set.join().unwrap();
    assert_eq!((counters.normal_pages, counters.zero_pages), (1, 2));
    drop(s.main);
    let mut main = Vec::new();
    s.main_peer.read_to_end(&mut main).unwrap();
    // The first zero page names the block, the second goes on in it.
    let expected = b"\0\0\0\0\0\0\0\x02\x06pc.ram\0\0\0\0\0\0\0\x20\x22\0\0\0\0\0\0\0\x02\0";
    assert_eq!(main, expected);
    let mut bytes = Vec::new();
    s.peers[0].read_to_end(&mut bytes).unwrap();
    let header = bytes.first_chunk().unwrap();
    let packet = PacketView::unfill(header, Method::None).unwrap();
    assert_eq!((packet.normal_pages(), packet.zero_pages()), (1, 0));
    let offsets = &mut [0; 128];
    assert_eq!(packet.offsets(1 << 20, offsets).unwrap().0, [0x1000]);
}

#[test]
fn nothing_leaves_beside_a_main_stream_that_has_zero_pages_of_its_own() {
    for (zero_pages, is_ordered) in [
        (ZeroPageDetection::Legacy, false),
        (ZeroPageDetection::Multifd, true),
        (ZeroPageDetection::None, true),
    ] {
        let mut s = sender(&config(1).zero_pages(zero_pages));
        assert_eq!(s.set.beside().is_some(), is_ordered, "{zero_pages:?}");
    }
}

#[test]
fn device_state_leaves_in_one_packet_ahead_of_the_next_sync() {
    let device = DeviceId {
        idstr: IdStr::new("vfio").unwrap(),
        instance: InstanceId(2),
    };
    let mut s = sender(&config(1));
    s.set.send_device_state(device.clone(), vec![9; 5]).unwrap();
    s.sync().unwrap();
    let e = s.set.send_device_state(device.clone(), Vec::new());
    assert!(matches!(
        cause(&e.unwrap_err()),
        (None, ChannelError::DeviceStateLength { len: 0 })
    ));
    s.set.join().unwrap();
    let mut bytes = Vec::new();
    s.peers[0].read_to_end(&mut bytes).unwrap();
    let (header, behind) = bytes.split_first_chunk().unwrap();
    let payload_len = 5;
    let expected = DeviceStateHeader {
        device,
        payload_len,
    };
    assert_eq!(DeviceStateHeader::decode(header).unwrap(), expected);
    assert_eq!(behind[..5], [9; 5]);
    assert_eq!(behind.len(), 5 + HEADER_LEN);
}

#[test]
fn a_peer_that_closed_a_channel_is_an_error_that_names_it_and_shuts_the_others() {
    let mut s = sender(&config(2));
    drop(s.peers.remove(1));
    let e = s.sync().unwrap_err();
    let (channel, error) = cause(&e);
    assert_eq!(channel, Some(1));
    assert!(
        matches!(
            error,
            ChannelError::PeerClosed {
                packets: Some(0),
                channels: 2,
                method: Method::None,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "the target closed the channel before its first packet (this side has 2 channels, \
         compression None; the target's settings must be the same)"
    );
    let mut rest = Vec::new();
    s.peers[0].read_to_end(&mut rest).unwrap();
    assert!(rest.len() <= HEADER_LEN);
    // It is what every later call says.
    assert_eq!(text(&s.send(1).unwrap_err()), text(&e));
    assert_eq!(text(&s.sync().unwrap_err()), text(&e));
    assert_eq!(text(&s.set.join().unwrap_err()), text(&e));
}

#[test]
fn a_peer_that_dies_while_pages_are_on_their_way_is_an_error() {
    let mut s = sender(&config(2));
    let mut peers = std::mem::take(&mut s.peers);
    let e = thread::scope(|scope| {
        scope.spawn(move || {
            // Inside the payload of a packet. All of them are there until each has got so far: the
            // first that is gone ends the others' channels too.
            for peer in &mut peers {
                peer.read_exact(&mut [0; HEADER_LEN + 100]).unwrap();
            }
        });
        loop {
            if let Err(e) = s.send(PAGES) {
                break e;
            }
        }
    });
    assert!(
        matches!(cause(&e), (Some(_), ChannelError::PeerClosed { .. })),
        "{e}"
    );
}

#[test]
fn a_peer_that_stops_reading_is_late_at_the_deadline() {
    let mut s = sender(&config(2));
    let began = Instant::now();
    s.set.set_deadline(Some(began + Duration::from_millis(50)));
    let e = s.send(PAGES).and_then(|()| s.sync()).unwrap_err();
    // The channel's own deadline is the same: whichever is noticed first.
    match cause(&e) {
        (None, ChannelError::Stalled { .. }) => {}
        (Some(_), ChannelError::Io { source, .. }) => {
            assert_eq!(source.kind(), io::ErrorKind::TimedOut);
        }
        other => panic!("{other:?}"),
    }
    drop(s);
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn without_a_deadline_a_peer_that_stops_reading_is_late_after_the_stall_limit() {
    let mut s = sender(&config(2).stall_limit(Duration::from_millis(50)));
    let e = s.send(PAGES).and_then(|()| s.sync()).unwrap_err();
    assert!(
        matches!(cause(&e), (None, ChannelError::Stalled { .. })),
        "{e}"
    );
    assert!(s.set.join().is_err());
}

#[test]
fn joining_with_a_peer_that_stops_reading_ends_at_the_deadline() {
    let mut s = sender(&config(1));
    s.send(256).unwrap();
    s.set
        .set_deadline(Some(Instant::now() + Duration::from_millis(50)));
    let began = Instant::now();
    assert!(s.set.join().is_err());
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn an_abort_wakes_a_sender_whose_peer_stopped_reading() {
    let mut s = sender(&config(2));
    let abort = s.set.abort_handle();
    let (aborted, began) = (thread::spawn(move || abort.abort()), Instant::now());
    let e = s.send(PAGES).and_then(|()| s.sync()).unwrap_err();
    assert!(matches!(cause(&e), (None, ChannelError::Closed)), "{e}");
    aborted.join().unwrap();
    drop(s);
    assert!(began.elapsed() < LIMIT / 2);
}

/// Panics when it is written to.
struct Broken(Arc<Mutex<bool>>);

impl ByteSink for Broken {
    fn write_all(&mut self, _: &[Chunk<'_>]) -> io::Result<()> {
        *self.0.lock().unwrap() = true;
        panic!("a bug in a transport that was plugged in");
    }
    fn set_write_deadline(&mut self, _: Option<Instant>) {}
}

#[test]
fn a_transport_that_panics_is_an_error_and_no_hang() {
    let reached = Arc::new(Mutex::new(false));
    let channels = vec![SendChannel::new(Broken(reached.clone()), || {})];
    let mut set = SendSet::start(Arc::new(memory(&[1])), channels, &config(1)).unwrap();
    let (main, _peer) = UnixStream::pair().unwrap();
    let mut main = StreamWriter::new(FdChannel::new(main, LIMIT).unwrap());
    let e = set.sync(&mut main).unwrap_err();
    assert!(
        matches!(cause(&e), (Some(0), ChannelError::Panicked)),
        "{e}"
    );
    assert!(set.join().is_err() && *reached.lock().unwrap());
}

#[test]
fn another_number_of_channels_than_configured_is_refused() {
    let e = SendSet::start(Arc::new(memory(&[1])), Vec::new(), &config(2)).unwrap_err();
    assert!(
        matches!(
            cause(&e),
            (
                None,
                ChannelError::ChannelCount {
                    got: 0,
                    expected: 2
                }
            )
        ),
        "{e}"
    );
}

#[test]
fn a_legacy_zero_page_that_was_zero_before_is_no_record_of_the_main_stream() {
    let mut s = sender(&config(1).zero_pages(ZeroPageDetection::Legacy));
    assert!(s.set.leave_out_unchanged(WhenToCompare::Always).unwrap());
    for _ in 0..3 {
        s.send(2).unwrap();
    }
    // By way of other content on the channel, after which it is sent again.
    s.ram.fill(0, 1, 9);
    s.send(2).unwrap();
    s.sync().unwrap();
    s.ram.put(0, 1, &[0; 4096]);
    s.send(2).unwrap();
    s.sync().unwrap();
    let counters = s.set.join().unwrap();
    assert_eq!((counters.normal_pages, counters.zero_pages), (1, 3));
    assert_eq!(counters.unchanged_pages, 4 + 1 + 1);
}

#[test]
fn a_channel_that_broke_is_the_cause_that_is_told_when_the_main_stream_has_failed() {
    let mut s = sender(&config(2));
    assert!(s.set.failure().is_none());
    drop(s.peers.remove(1));
    // Asked while the channel's thread may not have written yet.
    let _ = s.send(256);
    let _ = s.set.sync(&mut s.main);
    let e = s.set.failure().unwrap();
    assert_eq!(cause(&e).0, Some(1));
    let told = s.set.join().unwrap_err();
    assert_eq!(text(&e), text(&told));
}

#[test]
fn a_channel_that_the_peer_closed_is_known_before_anything_is_written_to_it() {
    let s = sender(&config(3));
    let mut peers = s.peers;
    assert!(s.set.failure().is_none());
    drop(peers.remove(2));
    let e = s.set.failure().unwrap();
    assert!(
        matches!(
            cause(&e),
            (Some(2), ChannelError::PeerClosed { packets: None, .. })
        ),
        "{e:?}"
    );
    // A peer that has closed them all says by that nothing of any channel.
    drop(peers);
    assert!(s.set.failure().is_none());
}
