//! What a driver gets from a network.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests
#![allow(clippy::cast_possible_truncation)] // of numbers that a test has chosen

mod driver;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use colo_virtio::net::{
    Datagram, HEADER_BYTES, MAX_PACKET, Mac, Net, NetBackend, Offloads, Stream, Tap, TapError,
    rarp_frame,
};
use colo_virtio::{MmioDevice, register};
use driver::{BUFFERS, Guest, LIMIT};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const MAC: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_HOST_TSO4: u64 = 1 << 11;
const HEADER: u32 = HEADER_BYTES as u32;

fn net(backend: impl NetBackend + 'static) -> Net {
    Net::new(Box::new(backend), MAC, 1500).unwrap()
}

/// A device on one end of a connection, and the other end.
fn connected(without: u64) -> (Guest<Net>, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    there.set_read_timeout(Some(LIMIT)).unwrap();
    (Guest::live(net(Stream::new(here).unwrap()), without), there)
}

fn give(guest: &mut Guest<Net>, header: [u8; HEADER_BYTES], frame: &[u8]) {
    guest.put(BUFFERS, &header);
    guest.put(BUFFERS + u64::from(HEADER), frame);
    let len = HEADER + frame.len() as u32;
    guest.request(TRANSMIT, &[(BUFFERS, len, false)]);
}

fn frame_of(there: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    there.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    there.read_exact(&mut frame).unwrap();
    frame
}

fn put_frame(there: &mut UnixStream, frame: &[u8]) {
    let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
    bytes.extend(frame);
    there.write_all(&bytes).unwrap();
}

#[test]
fn frames_of_the_driver_leave_with_their_length_before_them() {
    let (mut guest, mut there) = connected(0);
    for frame in [vec![1; 60], vec![2; 1514]] {
        give(&mut guest, [0; HEADER_BYTES], &frame);
        assert_eq!(frame_of(&mut there), frame);
    }
    assert_eq!(guest.device.with_model(|net| net.stats().sent), 2);
}

#[test]
fn a_frame_takes_as_many_buffers_as_it_needs() {
    let (mut guest, mut there) = connected(0);
    for index in 0..3 {
        guest.offer(RECEIVE, &[(BUFFERS + index * 0x1000, 100, true)]);
    }
    guest.kick(0);
    let frame: Vec<u8> = (0..200).collect();
    put_frame(&mut there, &frame);
    let used: Vec<_> = (0..3).map(|_| guest.wait_used(RECEIVE)).collect();
    assert_eq!(used, [(0, 100), (1, 100), (2, 12)]);
    let header = guest.get(BUFFERS, HEADER_BYTES);
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    let mut got = guest.get(BUFFERS + 12, 88);
    got.extend(guest.get(BUFFERS + 0x1000, 100));
    got.extend(guest.get(BUFFERS + 0x2000, 12));
    assert_eq!(got, frame);
}

#[test]
fn a_frame_waits_for_buffers() {
    let (mut guest, mut there) = connected(0);
    guest.offer(RECEIVE, &[(BUFFERS, 100, true)]);
    guest.kick(0);
    put_frame(&mut there, &[7; 200]);
    put_frame(&mut there, &[8; 60]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.used(RECEIVE), None, "half a frame is none");
    guest.offer(RECEIVE, &[(BUFFERS + 0x1000, 1000, true)]);
    guest.offer(RECEIVE, &[(BUFFERS + 0x2000, 1000, true)]);
    guest.kick(0);
    assert_eq!(guest.wait_used(RECEIVE), (0, 100));
    assert_eq!(guest.wait_used(RECEIVE), (1, 112));
    assert_eq!(guest.wait_used(RECEIVE), (2, 72));
}

#[test]
fn without_mergeable_buffers_a_frame_that_is_too_long_for_one_is_dropped() {
    let (mut guest, mut there) = connected(F_MRG_RXBUF);
    guest.offer(RECEIVE, &[(BUFFERS, 100, true)]);
    guest.kick(0);
    put_frame(&mut there, &[7; 200]);
    put_frame(&mut there, &[8; 60]);
    assert_eq!(guest.wait_used(RECEIVE), (0, 72));
    assert_eq!(guest.get(BUFFERS + 12, 60), [8; 60]);
    let stats = guest.device.with_model(|net| net.stats());
    assert_eq!((stats.received, stats.receive_dropped), (1, 1));
}

#[test]
fn an_open_checksum_is_completed_before_a_frame_leaves() {
    let (mut guest, mut there) = connected(0);
    let mut frame = vec![0; 60];
    frame[40..].fill(0x11);
    frame[50..52].copy_from_slice(&[0, 0]);
    // Open, from byte 40 on, ten bytes behind.
    let header = [1, 0, 0, 0, 0, 0, 40, 0, 10, 0, 0, 0];
    give(&mut guest, header, &frame);
    let sent = frame_of(&mut there);
    // Nine words of 0x1111.
    assert_eq!(sent[50..52], (!0x9999u16).to_be_bytes());
    // A place outside of the frame: it is dropped, and the next leaves.
    give(&mut guest, [1, 0, 0, 0, 0, 0, 59, 0, 0, 0, 0, 0], &frame);
    give(&mut guest, [0; HEADER_BYTES], &[3; 60]);
    assert_eq!(frame_of(&mut there), [3; 60]);
    assert_eq!(guest.device.with_model(|net| net.stats().send_dropped), 1);
}

#[derive(Clone, Debug)]
struct Offloading {
    fd: Arc<OwnedFd>,
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
    set: Arc<Mutex<Vec<Offloads>>>,
    fail: bool,
}

impl Offloading {
    fn new() -> Self {
        let (fd, _) = UnixStream::pair().unwrap();
        Self {
            fd: Arc::new(fd.into()),
            sent: Arc::default(),
            set: Arc::default(),
            fail: false,
        }
    }
}

impl NetBackend for Offloading {
    fn has_vnet_header(&self) -> bool {
        true
    }

    fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.set.lock().unwrap().push(offloads);
        if self.fail {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    fn receive(&mut self, _packet: &mut [u8; MAX_PACKET]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.sent.lock().unwrap().push(packet.to_vec());
        Ok(())
    }
}

#[test]
fn offloads_are_passed_through_as_agreed_on() {
    let backend = Offloading::new();
    let mut guest = Guest::live(net(backend.clone()), 1 << 8);
    let expected = Offloads {
        checksum: true,
        tso4: true,
        tso6: false,
        ecn: true,
    };
    assert_eq!(*backend.set.lock().unwrap(), [expected]);
    let large = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    give(&mut guest, large, &[9; 9000]);
    let mut packet = large.to_vec();
    packet.extend([9; 9000]);
    assert_eq!(*backend.sent.lock().unwrap(), [packet]);
    // No kind of segment that was offered.
    give(
        &mut guest,
        [1, 3, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0],
        &[9; 9000],
    );
    assert_eq!(backend.sent.lock().unwrap().len(), 1);
}

#[test]
fn a_large_segment_that_was_not_agreed_on_is_dropped() {
    let backend = Offloading::new();
    let mut guest = Guest::live(net(backend.clone()), F_HOST_TSO4);
    give(
        &mut guest,
        [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0],
        &[9; 9000],
    );
    assert_eq!(backend.sent.lock().unwrap().len(), 0);
    assert_eq!(guest.device.with_model(|net| net.stats().send_dropped), 1);
}

#[test]
fn segments_are_refused_without_checksums() {
    let guest = Guest::new(net(Offloading::new()));
    guest.write(register::STATUS, 3);
    guest.choose(guest.offered() & !F_GUEST_CSUM);
    guest.write(register::STATUS, 11);
    assert_eq!(guest.status(), 3);
}

#[test]
fn a_back_end_that_refuses_its_offloads_makes_the_device_need_a_reset() {
    let mut backend = Offloading::new();
    backend.fail = true;
    let guest = Guest::new(net(backend));
    guest.write(register::STATUS, 3);
    guest.choose(guest.offered());
    guest.write(register::STATUS, 11);
    guest.set_queue_up(0);
    guest.write(register::STATUS, 15);
    assert_eq!(guest.status(), 15 | 64);
}

fn config(guest: &Guest<Net>) -> Vec<u8> {
    let mut config = vec![0; 12];
    guest.device.read(register::CONFIG, &mut config);
    config
}

#[test]
fn a_driver_sees_the_cable_pulled_out() {
    let (mut guest, mut there) = connected(0);
    assert_eq!(
        config(&guest),
        [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0xdc, 5]
    );
    let generation = guest.read(register::CONFIG_GENERATION);
    guest.device.with_model(|net| net.set_link(false));
    assert_eq!(config(&guest)[6], 0);
    assert_eq!(guest.read(register::CONFIG_GENERATION), generation + 1);
    assert_eq!(guest.read(register::INTERRUPT_STATUS) & 2, 2);
    give(&mut guest, [0; HEADER_BYTES], &[1; 60]);
    guest.device.with_model(|net| net.set_link(true));
    give(&mut guest, [0; HEADER_BYTES], &[2; 60]);
    assert_eq!(frame_of(&mut there), [2; 60]);
    // The same again is no change.
    let generation = guest.read(register::CONFIG_GENERATION);
    guest.device.with_model(|net| net.set_link(true));
    assert_eq!(guest.read(register::CONFIG_GENERATION), generation);
}

/// Does a command of two bytes; returns the answer.
fn command(guest: &mut Guest<Net>, class: u8, what: u8) -> u8 {
    guest.put(BUFFERS, &[class, what, 0xee]);
    guest.request(CONTROL, &[(BUFFERS, 2, false), (BUFFERS + 2, 1, true)]);
    guest.get(BUFFERS + 2, 1)[0]
}

#[test]
fn an_announcement_leaves_the_host_and_is_asked_of_the_driver() {
    let (mut guest, mut there) = connected(0);
    guest.device.with_model(Net::announce).unwrap();
    let rarp = frame_of(&mut there);
    assert_eq!(rarp, rarp_frame(MAC));
    assert_eq!(
        rarp[..14],
        [
            255, 255, 255, 255, 255, 255, 0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35
        ]
    );
    assert_eq!(config(&guest)[6], 3);
    assert_eq!(command(&mut guest, 3, 0), 0);
    assert_eq!(config(&guest)[6], 1);
    for (class, what) in [(3, 1), (0, 0), (4, 0), (255, 255)] {
        assert_eq!(command(&mut guest, class, what), 1, "{class} {what}");
    }
}

#[test]
fn frames_wait_for_a_peer_that_does_not_read_and_none_is_lost() {
    let (mut guest, mut there) = connected(0);
    const FRAMES: u64 = 40;
    for index in 0..FRAMES {
        let at = BUFFERS + index * 0x1_0000;
        guest.put(at, &[0; HEADER_BYTES]);
        guest.put(at + 12, &vec![index as u8; 0xf000]);
        guest.offer(TRANSMIT, &[(at, HEADER + 0xf000, false)]);
    }
    guest.kick(TRANSMIT as u32);
    std::thread::sleep(Duration::from_millis(20));
    assert!(u64::from(guest.used_index(TRANSMIT)) < FRAMES);
    // A pause does not wait for the peer.
    guest.device.pause(LIMIT).unwrap();
    guest.device.resume();
    for index in 0..FRAMES {
        let frame = frame_of(&mut there);
        assert_eq!((frame.len(), frame[0]), (0xf000, index as u8));
    }
    for _ in 0..FRAMES {
        guest.wait_used(TRANSMIT);
    }
}

#[test]
fn a_device_outlives_its_connection() {
    let (mut guest, there) = connected(0);
    drop(there);
    for _ in 0..3 {
        give(&mut guest, [0; HEADER_BYTES], &[1; 60]);
    }
    assert_eq!(guest.device.with_model(|net| net.stats().send_dropped), 3);
    assert_eq!(guest.status(), 15);
}

#[test]
fn a_peer_that_announces_no_frame_or_too_long_a_one_is_not_listened_to() {
    for length in [0u32, 65_551, u32::MAX] {
        let (mut guest, mut there) = connected(0);
        guest.offer(RECEIVE, &[(BUFFERS + 0x1000, 4096, true)]);
        guest.kick(0);
        there.write_all(&length.to_be_bytes()).unwrap();
        let _ = there.write_all(&[0, 0, 0, 60]);
        let _ = there.write_all(&[1; 60]);
        std::thread::sleep(Duration::from_millis(20));
        give(&mut guest, [0; HEADER_BYTES], &[1; 60]);
        assert_eq!(guest.used(RECEIVE), None, "{length}");
        assert_eq!(guest.status(), 15);
    }
}

#[test]
fn frames_that_no_network_takes_are_dropped() {
    let (mut guest, mut there) = connected(0);
    let too_long = MAX_PACKET as u32 + 1;
    for len in [1, HEADER - 1, HEADER, too_long, 16 << 20] {
        guest.request(TRANSMIT, &[(BUFFERS, len, false)]);
    }
    assert_eq!(guest.device.with_model(|net| net.stats().send_dropped), 5);
    give(&mut guest, [0; HEADER_BYTES], &[1; 60]);
    assert_eq!(frame_of(&mut there), [1; 60]);
}

#[test]
fn a_receive_buffer_without_room_for_a_header_makes_the_device_need_a_reset() {
    let (mut guest, mut there) = connected(0);
    guest.offer(RECEIVE, &[(BUFFERS, 11, true)]);
    guest.kick(0);
    put_frame(&mut there, &[1; 60]);
    guest.wait_needs_reset();
}

#[test]
fn datagrams_are_frames() {
    let (here, there) = UnixDatagram::pair().unwrap();
    there.set_read_timeout(Some(LIMIT)).unwrap();
    let mut guest = Guest::live(net(Datagram::new(here).unwrap()), 0);
    guest.offer(RECEIVE, &[(BUFFERS + 0x1000, 4096, true)]);
    guest.kick(0);
    there.send(&[5; 90]).unwrap();
    assert_eq!(guest.wait_used(RECEIVE), (0, 102));
    assert_eq!(guest.get(BUFFERS + 0x100c, 90), [5; 90]);
    give(&mut guest, [0; HEADER_BYTES], &[6; 60]);
    let mut frame = [0; 100];
    assert_eq!(there.recv(&mut frame).unwrap(), 60);
    assert_eq!(frame[..60], [6; 60]);
}

#[test]
fn a_name_that_no_interface_has_and_a_file_that_is_no_tap_are_refused() {
    for name in ["", "a name of sixteen", "a\0b"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name(_))));
    }
    let file = File::open("/dev/null").unwrap();
    assert!(matches!(
        Tap::from_fd(file.into()),
        Err(TapError::Host { .. })
    ));
}

#[test]
fn a_tap_is_opened_by_name_and_taken_by_descriptor() {
    let name = format!("colo{}", std::process::id() % 1_000_000);
    let tap = match Tap::open(&name) {
        Ok(tap) => tap,
        Err(error) => {
            // Who may not make one is told so.
            assert!(matches!(error, TapError::Host { .. }), "{error}");
            return;
        }
    };
    let copy = tap.fd().try_clone().unwrap();
    let again = Tap::from_fd(copy).unwrap();
    assert!(again.has_vnet_header());
    drop(again);
    let mut guest = Guest::live(net(tap), 0);
    // The interface is down: the frame is lost, and the device lives.
    give(&mut guest, [0; HEADER_BYTES], &[6; 60]);
    assert_eq!(guest.device.with_model(|net| net.stats().send_dropped), 1);
    assert_eq!(guest.status(), 15);
}

#[test]
fn no_device_has_an_mtu_below_68() {
    let (here, _there) = UnixStream::pair().unwrap();
    let backend = Box::new(Stream::new(here).unwrap());
    assert!(Net::new(backend, MAC, 67).is_err());
}
