//! A receiver against peers that die or lie: a typed error in bounded time, and the store back.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    LIMIT, PAGE, Pages, Receiver, cause, memory, receiver, receiver_into, sharing, text, write,
};
use migration_stream::io::FdChannel;
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{GuestRamMmap, IdStr, InstanceId};
use multifd::device_state::{DeviceId, DeviceStateHeader, DeviceStateSink};
use multifd::packet::{HEADER_LEN, Method, PacketError, PacketFlags, PacketHeader};
use multifd::{ChannelCount, ChannelError, Compression, MultifdConfig, Part, RecvSet, ZstdLevel};

const PAGES: [u64; 1] = [64];

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap()).stall_limit(LIMIT)
}

fn start(channels: u8) -> Receiver {
    receiver(&config(channels), &PAGES)
}

fn packet(header: &PacketHeader<'_>, payload: &[u8]) -> Vec<u8> {
    let mut buf = [0; HEADER_LEN];
    header.fill(&mut buf).unwrap();
    [&buf, payload].concat()
}

fn sync() -> Vec<u8> {
    packet(&PacketHeader::sync(0), &[])
}

fn header(normal: &[u64]) -> PacketHeader<'_> {
    PacketHeader {
        flags: PacketFlags {
            sync: false,
            method: Method::None,
        },
        number: 0,
        block: b"pc.ram",
        normal,
        zero: &[],
        payload_len: u32::try_from(normal.len() * PAGE).unwrap(),
    }
}

fn pages(normal: &[u64]) -> Vec<u8> {
    packet(&header(normal), &vec![0xaa; normal.len() * PAGE])
}

/// Sends `bytes` on channel 1 of 2, ends it if `end`, and returns the error that a flush meets.
/// Checks on the way what holds for every error: it names the channel, the hook was called once
/// with it, before the flush saw it, the other channel was shut, and the store comes back with the error beside it.
fn error_after(config: &MultifdConfig, bytes: &[u8], end: bool) -> ChannelError {
    let mut r = receiver(config, &PAGES);
    write(&r.peers[1], bytes);
    if end {
        r.peers[1].shutdown(Shutdown::Write).unwrap();
    }
    let began = Instant::now();
    let e = r.set.barrier().flush().unwrap_err();
    let (channel, error) = cause(&e);
    assert_eq!(channel, Some(1));
    assert_eq!(r.errors.try_recv().unwrap(), text(&e));
    assert_eq!(
        r.peers[0].read(&mut [0]).unwrap(),
        0,
        "the other channel was not shut"
    );
    let again = r.set.barrier().flush().unwrap_err();
    assert_eq!(text(&again), text(&e));
    let joined = r.set.join().unwrap();
    assert_eq!(text(&joined.outcome.unwrap_err()), text(&e));
    assert_eq!(joined.store.page(0, 63), [0; PAGE]);
    assert!(r.errors.recv().is_err(), "the hook was called twice");
    assert!(began.elapsed() < LIMIT / 2);
    error.clone()
}

fn packet_error(bytes: &[u8]) -> PacketError {
    match error_after(&config(2), bytes, false) {
        ChannelError::Packet { index: 0, source } => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_peer_that_dies_inside_a_header_is_an_error() {
    for len in [1, 11, 12, HEADER_LEN - 1] {
        let error = error_after(&config(2), &pages(&[0])[..len], true);
        assert!(
            matches!(error, ChannelError::Eof { part: Part::Header, index: 0, got, expected: HEADER_LEN } if got == len),
            "{error:?}"
        );
    }
}

#[test]
fn a_peer_that_dies_inside_a_payload_is_an_error() {
    for len in [0, 1, 2 * PAGE - 1] {
        let error = error_after(&config(2), &pages(&[0, 0x3000])[..HEADER_LEN + len], true);
        assert!(
            matches!(error, ChannelError::Eof { part: Part::Payload, index: 0, got, expected: 8192 } if got == len),
            "{error:?}"
        );
    }
}

#[test]
fn a_peer_that_dies_behind_a_packet_is_noticed_at_the_next_one() {
    let bytes = [pages(&[0x1000]), pages(&[0x2000])[..700].to_vec()].concat();
    let error = error_after(&config(2), &bytes, true);
    assert!(
        matches!(
            error,
            ChannelError::Eof {
                part: Part::Header,
                index: 1,
                got: 700,
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_channel_that_ends_instead_of_its_sync_packet_fails_the_flush() {
    let r = start(2);
    write(&r.peers[0], &sync());
    write(&r.peers[1], &pages(&[0]));
    r.peers[1].shutdown(Shutdown::Write).unwrap();
    let e = r.set.barrier().flush().unwrap_err();
    assert!(matches!(cause(&e), (Some(1), ChannelError::Ended)), "{e}");
    // What had come before is there all the same.
    let joined = r.set.join().unwrap();
    assert_eq!(text(&joined.outcome.unwrap_err()), text(&e));
    assert_eq!(joined.store.page(0, 0), [0xaa; PAGE]);
    assert!(r.errors.recv().is_err());
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn channels_that_are_held_take_in_no_page_until_they_are_released() {
    let r = start(2);
    for peer in &r.peers {
        write(peer, &[pages(&[0]), sync()].concat());
    }
    let mut barrier = r.set.barrier();
    barrier.flush().unwrap();
    let held = barrier.hold().unwrap();
    assert!(held.is_any());
    let before = r.set.counters();
    assert_eq!((before.normal_pages, before.zero_pages), (2, 0));
    for peer in &r.peers {
        write(peer, &[pages(&[0x1000]), sync()].concat());
    }
    thread::sleep(Duration::from_millis(30));
    assert_eq!(r.set.counters(), before);
    assert_eq!(r.set.store().page(0, 1), [0; PAGE]);
    drop(held);
    barrier.flush().unwrap();
    assert_eq!(r.set.store().page(0, 1), [0xaa; PAGE]);
    assert_eq!(r.set.counters().bytes, before.bytes * 2);
}

#[test]
fn a_channel_with_pages_behind_its_last_sync_packet_cannot_be_held() {
    let r = start(2);
    for peer in &r.peers {
        write(peer, &sync());
    }
    let mut barrier = r.set.barrier();
    barrier.flush().unwrap();
    drop(barrier.hold().unwrap());
    write(&r.peers[1], &pages(&[0x2000]));
    until("the page has come", || r.set.counters().pages() == 1);
    let e = barrier.hold().unwrap_err();
    assert!(
        matches!(cause(&e), (Some(1), ChannelError::NotSynchronised)),
        "{e}"
    );
    // The channels go on, and with a synchronisation all is well again.
    for peer in &r.peers {
        write(peer, &sync());
    }
    barrier.flush().unwrap();
    drop(barrier.hold().unwrap());
}

#[test]
fn a_channel_that_stays_inside_a_packet_is_not_waited_for_beyond_the_deadline() {
    let r = start(2);
    write(&r.peers[0], &pages(&[0])[..HEADER_LEN + 1]);
    let mut barrier = r.set.barrier();
    let began = Instant::now();
    barrier.set_deadline(Some(began));
    until("the packet has begun", || barrier.hold().is_err());
    let deadline = Duration::from_millis(30);
    barrier.set_deadline(Some(Instant::now() + deadline));
    let e = barrier.hold().unwrap_err();
    assert!(matches!(cause(&e), (None, ChannelError::Stalled { .. })));
    assert!(began.elapsed() >= deadline);
    // Whoever could not hold the channels has let them go on.
    write(&r.peers[0], &pages(&[0])[HEADER_LEN + 1..]);
    until("the page has come", || r.set.counters().pages() == 1);
}

#[test]
fn channels_that_are_held_can_be_ended() {
    let r = start(2);
    let mut barrier = r.set.barrier();
    let held = barrier.hold().unwrap();
    write(&r.peers[1], &pages(&[0]));
    let joined = r.set.join().unwrap();
    assert_eq!(joined.store.page(0, 0), [0; PAGE]);
    drop(held);
}

#[test]
fn channels_that_all_end_between_packets_end_well() {
    let r = start(3);
    for peer in &r.peers {
        write(peer, &pages(&[0x1000]));
        write(peer, &sync());
    }
    r.set.barrier().flush().unwrap();
    drop(r.peers);
    let joined = r.set.join().unwrap();
    joined.outcome.unwrap();
    assert_eq!(joined.store.page(0, 1), [0xaa; PAGE]);
}

#[test]
fn a_flush_waits_for_every_channel_and_nothing_behind_a_sync_is_taken_before_it() {
    let r = start(2);
    let mut barrier = r.set.barrier();
    write(&r.peers[0], &[sync(), pages(&[0x1000])].concat());
    barrier.set_deadline(Some(Instant::now() + LIMIT));
    thread::scope(|scope| {
        let flush = scope.spawn(|| barrier.flush());
        // Channel 1's page belongs before the flush although it comes last.
        write(&r.peers[1], &pages(&[0x2000]));
        assert_eq!(r.set.store().page(0, 1), [0; PAGE]);
        write(&r.peers[1], &sync());
        flush.join().unwrap().unwrap();
    });
    assert_eq!(r.set.store().page(0, 2), [0xaa; PAGE]);
    write(&r.peers[0], &sync());
    write(&r.peers[1], &sync());
    r.set.barrier().flush().unwrap();
    assert_eq!(r.set.store().page(0, 1), [0xaa; PAGE]);
}

#[test]
fn a_sync_packet_of_an_old_source_brings_its_pages() {
    let r = start(1);
    let flags = PacketFlags {
        sync: true,
        method: Method::None,
    };
    let bytes = packet(
        &PacketHeader {
            flags,
            ..header(&[0x5000])
        },
        &[3; PAGE],
    );
    write(&r.peers[0], &bytes);
    r.set.barrier().flush().unwrap();
    assert_eq!(r.set.store().page(0, 5), [3; PAGE]);
}

#[test]
fn pages_in_any_order_and_a_page_twice_are_taken() {
    let r = start(1);
    let mut payload = vec![1; PAGE];
    payload.extend([2; PAGE]);
    payload.extend([3; PAGE]);
    write(
        &r.peers[0],
        &packet(&header(&[0x3000, 0x1000, 0x3000]), &payload),
    );
    write(&r.peers[0], &sync());
    r.set.barrier().flush().unwrap();
    assert_eq!(r.set.store().page(0, 1), [2; PAGE]);
    assert_eq!(r.set.store().page(0, 3), [3; PAGE]);
}

#[test]
fn what_comes_along_with_packets_without_a_payload_is_what_it_would_be_alone() {
    let zeroes = |page: u64| {
        packet(
            &PacketHeader {
                zero: &[page * PAGE as u64],
                ..header(&[])
            },
            &[],
        )
    };
    // All at once, and in pieces that end where no packet does: few packets in a row, and more than are
    // read ahead.
    for (count, piece) in [(3, usize::MAX), (200, usize::MAX), (200, 1000), (7, 4097)] {
        let r = start(1);
        let mut bytes = Vec::new();
        let mut payload = vec![5; PAGE];
        payload.extend([6; PAGE]);
        for (first, second) in [(1, 2), (3, 9)] {
            bytes.extend(packet(&header(&[0x7000, 0x8000]), &vec![4; 2 * PAGE]));
            (0..count).for_each(|index| bytes.extend(zeroes(7 + index % 2)));
            let offsets = [first, second].map(|page: u64| page * PAGE as u64);
            bytes.extend(packet(&header(&offsets), &payload));
            (0..count).for_each(|_| bytes.extend(zeroes(10)));
            bytes.extend(sync());
        }
        let (peer, mut barrier) = (&r.peers[0], r.set.barrier());
        thread::scope(|scope| {
            scope.spawn(|| bytes.chunks(piece).for_each(|piece| write(peer, piece)));
            barrier.set_deadline(Some(Instant::now() + LIMIT));
            barrier.flush().unwrap();
            barrier.flush().unwrap();
        });
        for (page, byte) in [(1, 5), (2, 6), (3, 5), (7, 0), (8, 0), (9, 6)] {
            assert_eq!(r.set.store().page(0, page), [byte; PAGE], "page {page}");
        }
    }
}

#[test]
fn a_peer_that_stops_inside_a_packet_is_late() {
    let config = config(2).stall_limit(Duration::from_millis(50));
    let r = receiver(&config, &PAGES);
    write(&r.peers[0], &sync());
    write(&r.peers[1], &pages(&[0])[..2000]);
    let e = r.set.barrier().flush().unwrap_err();
    assert!(
        matches!(cause(&e), (Some(1), ChannelError::Stalled { .. })),
        "{e}"
    );
    assert!(r.set.join().unwrap().outcome.is_err());
}

#[test]
fn a_flush_ends_at_its_deadline() {
    let r = start(1);
    let mut barrier = r.set.barrier();
    barrier.set_deadline(Some(Instant::now()));
    let e = barrier.flush().unwrap_err();
    assert!(
        matches!(cause(&e), (Some(0), ChannelError::Stalled { .. })),
        "{e}"
    );
}

#[test]
fn a_sync_packet_without_a_flush_is_an_error_in_the_end() {
    let config = config(1).stall_limit(Duration::from_millis(50));
    let r = receiver(&config, &PAGES);
    write(&r.peers[0], &sync());
    assert!(r.errors.recv_timeout(LIMIT).unwrap().contains("no flush"));
    let joined = r.set.join().unwrap();
    let e = joined.outcome.unwrap_err();
    assert!(
        matches!(cause(&e), (Some(0), ChannelError::NoFlush { .. })),
        "{e}"
    );
}

#[test]
fn an_abort_wakes_the_flush_and_is_what_it_says() {
    let r = start(2);
    let abort = r.set.abort_handle();
    let mut barrier = r.set.barrier();
    thread::scope(|scope| {
        let flush = scope.spawn(|| barrier.flush());
        abort.abort();
        let e = flush.join().unwrap().unwrap_err();
        assert!(matches!(cause(&e), (None, ChannelError::Closed)), "{e}");
    });
    assert!(r.errors.try_recv().is_err(), "whoever aborts knows");
    assert!(r.set.join().unwrap().outcome.is_err());
    abort.abort();
}

#[test]
fn joining_does_not_wait_for_a_peer_that_says_nothing_or_a_flush_that_does_not_come() {
    let began = Instant::now();
    let r = start(3);
    write(&r.peers[0], &sync());
    write(&r.peers[1], &pages(&[0])[..3000]);
    r.set.join().unwrap().outcome.unwrap();
    drop(start(255).set);
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn c6_a_channel_that_breaks_is_told_to_the_main_streams_loader_at_once() {
    use migration_stream::io::{ByteSource, FdChannel};
    let (main, _source) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut main = FdChannel::new(main, LIMIT).unwrap();
    let waker = main.share();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let channels = vec![FdChannel::new(ours, LIMIT).unwrap().into()];
    let set = multifd::RecvSet::start(memory(&PAGES), channels, &config(1), move |_| {
        waker.shutdown();
    })
    .unwrap();
    write(&theirs, b"not a packet");
    // The source of the main stream says nothing at all; the loader still wakes.
    let began = Instant::now();
    assert_eq!(main.read(&mut [0; 8]).unwrap(), 0);
    assert!(began.elapsed() < LIMIT / 2);
    let joined = set.join().unwrap();
    assert!(matches!(
        cause(&joined.outcome.unwrap_err()),
        (
            Some(0),
            ChannelError::Packet {
                source: PacketError::Magic { .. },
                ..
            }
        )
    ));
}

#[test]
fn c7_an_offset_inside_a_page_is_an_error_and_nothing_is_written() {
    assert_eq!(
        packet_error(&pages(&[0x1008])),
        PacketError::Alignment {
            index: 0,
            offset: 0x1008
        }
    );
}

#[test]
fn c7_a_payload_length_that_contradicts_the_pages_is_an_error() {
    let bytes = packet(
        &PacketHeader {
            payload_len: 4095,
            ..header(&[0])
        },
        &[],
    );
    assert!(matches!(
        packet_error(&bytes),
        PacketError::PayloadLength { got: 4095, .. }
    ));
}

/// One device, of at most 3 MB a packet.
#[derive(Default)]
struct Device(Mutex<Vec<Vec<u8>>>);

const DEVICE_MAX: u32 = 3_000_000;

fn vfio() -> DeviceId {
    DeviceId {
        idstr: IdStr::new("vfio").unwrap(),
        instance: InstanceId(7),
    }
}

impl DeviceStateSink for Device {
    fn max_len(&self, device: &DeviceId) -> Option<u32> {
        (*device == vfio()).then_some(DEVICE_MAX)
    }

    fn load(
        &self,
        _: &DeviceId,
        payload: Vec<u8>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if payload == b"bad" {
            return Err("checksum".into());
        }
        self.0.lock().unwrap().push(payload);
        Ok(())
    }
}

fn device_packet(device: DeviceId, payload: &[u8]) -> Vec<u8> {
    let payload_len = u32::try_from(payload.len()).unwrap();
    let header = DeviceStateHeader {
        device,
        payload_len,
    };
    [&header.encode(), payload].concat()
}

fn start_with_device(config: &MultifdConfig) -> (RecvSet<GuestRamMmap>, UnixStream, Arc<Device>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let channels = vec![FdChannel::new(ours, LIMIT).unwrap().into()];
    let device = Arc::new(Device::default());
    let store = memory(&PAGES);
    let set = RecvSet::start_with_device_state(store, device.clone(), channels, config, |_| {});
    (set.unwrap(), theirs, device)
}

#[test]
fn device_state_goes_to_its_device_and_pages_behind_it_to_memory() {
    let (set, peer, device) = start_with_device(&config(1));
    let long: Vec<u8> = (0..DEVICE_MAX).map(|i| i.to_le_bytes()[1]).collect();
    for payload in [b"short".as_slice(), &long, &[1; 1344], b"x"] {
        write(&peer, &device_packet(vfio(), payload));
        write(&peer, &pages(&[0x1000]));
    }
    write(&peer, &sync());
    set.barrier().flush().unwrap();
    let loaded = device.0.lock().unwrap();
    assert_eq!(*loaded, [b"short".as_slice(), &long, &[1; 1344], b"x"]);
    assert_eq!(set.store().page(0, 1), [0xaa; PAGE]);
}

#[test]
fn device_state_that_nobody_takes_is_an_error_that_says_why() {
    let other = DeviceId {
        instance: InstanceId(8),
        ..vfio()
    };
    // Refused by its header: that the payload does not come changes nothing.
    let too_long = DeviceStateHeader {
        device: vfio(),
        payload_len: DEVICE_MAX + 1,
    };
    let cases = [
        (device_packet(other, b"x"), "instance 8, which is not there"),
        (too_long.encode().to_vec(), "expected at most 3000000"),
        (device_packet(vfio(), b""), "is empty"),
        (device_packet(vfio(), b"bad"), "checksum"),
    ];
    for (bytes, expected) in cases {
        let (set, peer, device) = start_with_device(&config(1));
        write(&peer, &bytes);
        let e = text(&set.barrier().flush().unwrap_err());
        assert!(e.contains(expected), "{e}");
        assert!(device.0.lock().unwrap().is_empty());
    }
    let compression = Compression::Zstd(ZstdLevel::default());
    let config = config(1).compression(compression);
    let (set, peer, _) = start_with_device(&config);
    write(&peer, &device_packet(vfio(), b"x"));
    let e = text(&set.barrier().flush().unwrap_err());
    assert!(e.contains("not expected here"), "{e}");
}

#[test]
fn c19_a_device_state_packet_is_refused_before_any_of_it_is_taken() {
    let bytes = b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40";
    assert_eq!(packet_error(bytes), PacketError::DeviceState);
}

#[test]
fn pages_of_a_block_that_is_not_migrated_are_an_error_and_nothing_is_written() {
    let shared = |header: PacketHeader<'_>, payload: &[u8]| {
        let r = receiver_into(sharing(&memory(&[64, 64]), "vga.vram"), &config(2));
        // Of the other block they are taken, also right before.
        write(&r.peers[1], &pages(&[0]));
        write(&r.peers[1], &packet(&header, payload));
        let e = r.set.barrier().flush().unwrap_err();
        let (channel, error) = cause(&e);
        assert_eq!(channel, Some(1));
        assert!(
            matches!(
                error,
                ChannelError::Packet {
                    index: 1,
                    source: PacketError::IgnoredBlock { name }
                } if name == "vga.vram"
            ),
            "{error:?}"
        );
        let store = r.set.join().unwrap().store;
        assert_eq!(store.page(0, 0), [0xaa; PAGE]);
        store.page(1, 0)
    };
    let block = b"vga.vram";
    let normal = PacketHeader {
        block,
        ..header(&[0])
    };
    assert_eq!(shared(normal, &[0xaa; PAGE]), [0; PAGE]);
    let zero = PacketHeader {
        block,
        zero: &[0],
        ..header(&[])
    };
    assert_eq!(shared(zero, &[]), [0; PAGE]);
}

#[test]
fn pages_outside_the_block_or_of_an_unknown_block_are_errors() {
    assert!(matches!(
        packet_error(&pages(&[64 * 4096])),
        PacketError::Offset { index: 0, .. }
    ));
    let bytes = packet(
        &PacketHeader {
            block: b"pc.rom",
            ..header(&[0])
        },
        &[],
    );
    assert!(matches!(packet_error(&bytes), PacketError::Block { name } if name == "pc.rom"));
}

#[test]
fn another_compression_than_configured_is_an_error_that_names_both() {
    let zstd = Compression::Zstd(ZstdLevel::default());
    let e = error_after(&config(2).compression(zstd), &pages(&[0]), false);
    let ChannelError::Packet { source, .. } = e else {
        panic!("{e:?}")
    };
    assert_eq!(
        source,
        PacketError::Method {
            got: Method::None,
            expected: Method::Zstd
        }
    );
}

#[test]
fn a_payload_that_is_no_zstd_is_an_error() {
    let zstd = Compression::Zstd(ZstdLevel::default());
    let flags = PacketFlags {
        sync: false,
        method: Method::Zstd,
    };
    let bytes = packet(
        &PacketHeader {
            flags,
            payload_len: 100,
            ..header(&[0])
        },
        &[7; 100],
    );
    let e = error_after(&config(2).compression(zstd), &bytes, false);
    assert!(
        matches!(e, ChannelError::Compression { index: 0, .. }),
        "{e:?}"
    );
}

#[test]
fn a_channel_that_broke_is_the_cause_that_is_told_when_the_main_stream_has_ended() {
    let r = start(2);
    let barrier = r.set.barrier();
    assert!(barrier.failure().is_none());
    write(&r.peers[1], &pages(&[0])[..HEADER_LEN + 7]);
    drop(r.peers);
    // Asked at once, while the channel's thread may not have noticed yet.
    let e = barrier.failure().unwrap();
    let (channel, error) = cause(&e);
    assert_eq!(channel, Some(1));
    assert!(matches!(error, ChannelError::Eof { got: 7, .. }), "{e:?}");
    let told = r.set.join().unwrap().outcome.unwrap_err();
    assert_eq!(text(&e), text(&told));
}

#[test]
fn channels_that_ended_well_or_by_our_own_hand_are_no_cause() {
    let r = start(2);
    let barrier = r.set.barrier();
    drop(r.peers);
    assert!(barrier.failure().is_none());
    let r = start(2);
    let barrier = r.set.barrier();
    r.set.abort_handle().abort();
    assert!(barrier.failure().is_none());
}
