//! State that is saved, loaded elsewhere, and not believed.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests
#![allow(clippy::cast_possible_truncation)] // of numbers that a test has chosen

mod driver;

use std::os::unix::net::UnixStream;

use colo_virtio::blk::{Blk, BlkState};
use colo_virtio::net::{Mac, Net, Stream};
use colo_virtio::rng::{Rng, RngState};
use colo_virtio::{Device, MmioDevice, Model, TransportState, register};
use driver::blk::{MemoryDisk, OUT, put_header, request};
use driver::{BUFFERS, Guest, LIMIT, Memory, RAM};
use proptest::prelude::*;
use vmstate::conformance::conformance;
use vmstate::{Device as _, VmState, from_bytes, to_bytes};

fn net() -> Net {
    let (here, _) = UnixStream::pair().unwrap();
    Net::new(Box::new(Stream::new(here).unwrap()), Mac([2; 6]), 1500).unwrap()
}

/// A live device that is paused, after some use.
fn used<D: Model>(model: D) -> Guest<D> {
    let guest = Guest::live(model, 0);
    guest.device.pause(LIMIT).unwrap();
    guest
}

fn used_blk(disk: &MemoryDisk) -> Guest<Blk> {
    let mut guest = Guest::live(disk.blk(), 0);
    for sector in 0..70 {
        assert_eq!(request(&mut guest, OUT, sector, 512).0, 0);
    }
    guest.device.write(register::CONFIG + 32, &[0]);
    guest.device.pause(LIMIT).unwrap();
    guest
}

#[test]
fn every_device_keeps_the_promises_of_state() {
    conformance(&mut used(Rng).device).unwrap();
    conformance(&mut used_blk(&MemoryDisk::new()).device).unwrap();
    let guest = used(net());
    guest.device.with_model(|net| {
        net.set_link(false);
        net.announce().unwrap();
    });
    conformance(&mut { guest.device }).unwrap();
}

#[test]
fn a_running_device_is_neither_saved_nor_reset_nor_loaded() {
    let mut guest = Guest::live(Rng, 0);
    let error = guest.device.save().unwrap_err();
    assert_eq!(error.to_string(), "the device is not paused");
    assert!(guest.device.reset().is_err());
    assert!(guest.device.install(RngState::default()).is_err());
}

#[test]
fn a_disk_with_a_request_in_flight_is_not_saved() {
    let disk = MemoryDisk::new();
    disk.hold(true);
    let mut guest = Guest::live(disk.blk(), 0);
    put_header(&guest, BUFFERS, OUT, 0);
    guest.offer(
        0,
        &[
            (BUFFERS, 16, false),
            (BUFFERS + 512, 512, false),
            (BUFFERS + 64, 1, true),
        ],
    );
    guest.kick(0);
    driver::until("the request", || (disk.held() == 1).then_some(()));
    guest.device.pause(std::time::Duration::ZERO).unwrap_err();
    assert!(guest.device.save().is_err());
    disk.hold(false);
    disk.release();
    guest.device.pause(LIMIT).unwrap();
    guest.device.save().unwrap();
}

#[test]
fn a_disk_goes_on_elsewhere_with_a_request_that_nobody_has_seen() {
    let disk = MemoryDisk::new();
    let mut guest = used_blk(&disk);
    put_header(&guest, BUFFERS, OUT, 100);
    guest.put(BUFFERS + 512, &[0x77; 512]);
    guest.offer(
        0,
        &[
            (BUFFERS, 16, false),
            (BUFFERS + 512, 512, false),
            (BUFFERS + 64, 1, true),
        ],
    );
    let state = to_bytes(&guest.device.save().unwrap()).unwrap();
    let mut moved = guest.moved_to(disk.blk());
    let state = from_bytes(&state, BlkState::VERSION).unwrap();
    moved.device.check(&state).unwrap();
    moved.device.reset().unwrap();
    moved.device.install(state).unwrap();
    moved.device.resume();
    // Not even notified of: it was, at the other side.
    moved.wait_used(0);
    assert_eq!(disk.hand.lock().unwrap().bytes[51200..51712], [0x77; 512]);
    // The cache is still off, and the next requests work.
    assert_eq!(request(&mut moved, OUT, 5, 512).0, 0);
    assert_eq!(disk.seen().last().unwrap(), "write 2560 512 true");
}

#[test]
fn a_device_that_needs_a_reset_still_does_elsewhere() {
    let disk = MemoryDisk::new();
    let mut guest = Guest::live(disk.blk(), 0);
    guest.set_available_index(0, 999);
    guest.kick(0);
    guest.wait_needs_reset();
    guest.device.pause(LIMIT).unwrap();
    let state = guest.device.save().unwrap();
    let mut moved = guest.moved_to(disk.blk());
    moved.device.check(&state).unwrap();
    moved.device.reset().unwrap();
    moved.device.install(state).unwrap();
    moved.device.resume();
    assert_eq!(moved.status(), 15 | 64);
    moved.set_up(0);
    assert_eq!(request(&mut moved, OUT, 5, 512).0, 0);
}

#[test]
fn a_state_that_cannot_be_is_refused_field_by_field() {
    type Spoil = fn(&mut BlkState);
    let spoils: [(&str, Spoil); 22] = [
        ("device", |s| s.transport.device_id = 4),
        ("status bits", |s| s.transport.status |= 1 << 16),
        ("status without driver", |s| s.transport.status &= !2),
        ("driver_ok alone", |s| s.transport.status &= !8),
        ("features unknown", |s| {
            s.transport.driver_features |= 1 << 60
        }),
        ("features without version 1", |s| {
            s.transport.driver_features &= !(1 << 32)
        }),
        ("cache switch without flush", |s| {
            s.transport.driver_features &= !(1 << 9)
        }),
        ("interrupt", |s| s.transport.interrupt_status = 4),
        ("fewer queues", |s| s.transport.queues.clear()),
        ("more queues", |s| {
            let queue = s.transport.queues[0];
            s.transport.queues.push(queue);
        }),
        ("max_size", |s| s.transport.queues[0].max_size = 1024),
        ("size 0", |s| s.transport.queues[0].size = 0),
        ("size 3", |s| s.transport.queues[0].size = 3),
        ("size too large", |s| s.transport.queues[0].size = 512),
        ("desc crooked", |s| s.transport.queues[0].desc_table += 1),
        ("desc away", |s| s.transport.queues[0].desc_table = RAM),
        ("avail crooked", |s| s.transport.queues[0].avail_ring += 1),
        ("avail away", |s| {
            s.transport.queues[0].avail_ring = u64::MAX - 1
        }),
        ("used crooked", |s| s.transport.queues[0].used_ring += 2),
        ("used away", |s| s.transport.queues[0].used_ring = RAM - 4),
        ("in use", |s| s.transport.queues[0].next_avail += 1),
        ("capacity", |s| s.capacity += 1),
    ];
    let mut guest = used_blk(&MemoryDisk::new());
    let good = guest.device.save().unwrap();
    guest.device.check(&good).unwrap();
    for (what, spoil) in spoils {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(guest.device.check(&bad).is_err(), "{what}");
    }
    let mut guest = used(net());
    let mut bad = guest.device.save().unwrap();
    bad.mtu += 1;
    assert!(guest.device.check(&bad).is_err());
}

/// Loads a state of which bytes were changed, if it is not refused, and uses the device.
fn load_spoiled<D: Model>(mut guest: Guest<D>, model: D, changes: &[(usize, u8)]) {
    let mut bytes = to_bytes(&guest.device.save().unwrap()).unwrap();
    for (at, value) in changes {
        let at = at % bytes.len();
        bytes[at] = *value;
    }
    let Ok(state) = from_bytes::<D::State>(&bytes, D::State::VERSION) else {
        return;
    };
    let mut moved = guest.moved_to(model);
    if moved.device.check(&state).is_err() {
        return;
    }
    moved.device.reset().unwrap();
    // What was checked can be installed.
    moved.device.install(state).unwrap();
    moved.device.resume();
    for queue in 0..3 {
        moved.kick(queue);
    }
    moved.device.pause(LIMIT).unwrap();
    // Whatever it went on with, a driver gets it back.
    moved.device.resume();
    moved.set_up(0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_spoiled_state_of_any_device_is_refused_or_harmless(
        changes in prop::collection::vec((any::<usize>(), prop_oneof![any::<u8>(), 0u8..4]), 1..4),
    ) {
        load_spoiled(used(Rng), Rng, &changes);
        load_spoiled(used(net()), net(), &changes);
        let disk = MemoryDisk::new();
        load_spoiled(used_blk_once(&disk), disk.blk(), &changes);
    }
}

fn used_blk_once(disk: &MemoryDisk) -> Guest<Blk> {
    let mut guest = Guest::live(disk.blk(), 0);
    request(&mut guest, OUT, 1, 512);
    guest.device.pause(LIMIT).unwrap();
    guest
}

#[test]
fn states_are_checked_as_untrusted_whatever_device_they_are_of() {
    let mut device: Device<Rng, Memory> = used(Rng).device;
    assert!(device.check(&RngState::default()).is_err());
    let transport = TransportState {
        device_id: 4,
        ..TransportState::default()
    };
    assert!(device.check(&RngState { transport }).is_err());
    let good = device.save().unwrap();
    assert!(device.check(&good).is_ok());
}
