//! What a driver may write when, and what the registers say.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests
#![allow(clippy::cast_possible_truncation)] // of numbers that a test has chosen

mod driver;

use colo_virtio::rng::Rng;
use colo_virtio::{MmioDevice, register};
use driver::{BUFFERS, EVENT_IDX, Guest, VERSION_1, until};

const RING: usize = 0;

#[test]
fn a_driver_finds_an_entropy_device_and_gets_random_bytes() {
    let mut guest = Guest::new(Rng);
    assert_eq!(guest.read(register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(guest.read(register::VERSION), 2);
    assert_eq!(guest.read(register::DEVICE_ID), 4);
    assert_eq!(guest.read(register::QUEUE_NUM_MAX), 64);
    guest.set_up(0);
    guest.put(BUFFERS, &[0; 256]);
    let (head, written) = guest.request(RING, &[(BUFFERS, 64, true), (BUFFERS + 64, 64, true)]);
    assert_eq!((head, written), (0, 128));
    assert_ne!(guest.get(BUFFERS, 128), [0; 128]);
    assert_eq!(guest.get(BUFFERS + 128, 128), [0; 128]);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 1);
    until("an interrupt", || guest.line.read().ok());
    guest.write(register::INTERRUPT_ACK, 1);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn features_that_are_not_offered_or_lack_version_1_are_refused() {
    let guest = Guest::new(Rng);
    let offered = guest.offered();
    for features in [offered | 1 << 50, offered & !VERSION_1, 0] {
        guest.write(register::STATUS, 0);
        guest.write(register::STATUS, 3);
        guest.choose(features);
        guest.write(register::STATUS, 11);
        assert_eq!(guest.status(), 3, "{features:#x}");
        guest.write(register::STATUS, 15);
        assert_eq!(guest.status(), 3, "{features:#x}");
    }
    guest.choose(offered & !EVENT_IDX);
    guest.write(register::STATUS, 11);
    assert_eq!(guest.status(), 11);
    // They are settled now.
    guest.choose(offered | 1 << 50);
    guest.set_queue_up(0);
    guest.write(register::STATUS, 15);
    assert_eq!(guest.status(), 15);
}

#[test]
fn a_status_bit_is_cleared_by_a_reset_alone() {
    let mut guest = Guest::live(Rng, 0);
    guest.write(register::STATUS, 3);
    assert_eq!(guest.status(), 15);
    guest.write(register::STATUS, 15 | 64);
    assert_eq!(guest.status(), 15, "a driver cannot ask for a reset");
    guest.write(register::STATUS, 0);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    guest.set_up(0);
    guest.request(RING, &[(BUFFERS, 16, true)]);
}

#[test]
fn a_queue_is_set_up_between_features_and_driver_ok() {
    let guest = Guest::new(Rng);
    guest.set_queue_up(0);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
    guest.write(register::STATUS, 3);
    guest.choose(guest.offered());
    guest.write(register::STATUS, 11);
    guest.set_queue_up(0);
    assert_eq!(guest.read(register::QUEUE_READY), 1);
    guest.write(register::QUEUE_SEL, 7);
    assert_eq!(guest.read(register::QUEUE_NUM_MAX), 0);
    guest.write(register::QUEUE_READY, 1);
    assert_eq!(guest.read(register::QUEUE_READY), 0);
}

#[test]
fn a_queue_that_cannot_be_makes_the_device_need_a_reset() {
    type Spoil = fn(&Guest<Rng>);
    let spoils: [(&str, Spoil); 7] = [
        ("size 0", |g| g.write(register::QUEUE_NUM, 0)),
        ("size 3", |g| g.write(register::QUEUE_NUM, 3)),
        ("size 65536", |g| g.write(register::QUEUE_NUM, 1 << 16)),
        ("beyond memory", |g| {
            g.write(register::QUEUE_DESC_HIGH, 0xffff_ffff);
        }),
        ("across the end", |g| {
            g.write(register::QUEUE_USED_LOW, (driver::RAM - 8) as u32);
        }),
        ("crooked", |g| g.write(register::QUEUE_DESC_LOW, 0x1_0008)),
        ("nowhere", |g| g.write(register::QUEUE_AVAIL_LOW, 0)),
    ];
    for (what, spoil) in spoils {
        let guest = Guest::new(Rng);
        guest.write(register::STATUS, 3);
        guest.choose(guest.offered());
        guest.write(register::STATUS, 11);
        guest.set_queue_up(0);
        // Back to what can be changed, and spoiled.
        guest.write(register::QUEUE_READY, 0);
        spoil(&guest);
        guest.write(register::QUEUE_READY, 1);
        guest.write(register::STATUS, 15);
        assert_eq!(guest.status(), 15 | 64, "{what}");
        assert_eq!(guest.read(register::INTERRUPT_STATUS), 2, "{what}");
        guest.kick(0);
        guest.write(register::STATUS, 0);
        assert_eq!(guest.status(), 0, "{what}");
    }
}

#[test]
fn accesses_of_another_width_read_zeroes_and_write_nothing() {
    let guest = Guest::live(Rng, 0);
    for len in [0, 1, 2, 3, 8, 16] {
        let mut bytes = vec![0xaa; len];
        guest.device.read(register::MAGIC_VALUE, &mut bytes);
        assert_eq!(bytes, vec![0; len]);
        guest.device.write(register::STATUS, &vec![0; len]);
        assert_eq!(guest.status(), 15);
    }
    let mut bytes = [0xaa; 4];
    for offset in [register::CONFIG, register::CONFIG + 0xfe, u64::MAX, 2] {
        guest.device.read(offset, &mut bytes);
        assert_eq!(bytes, [0; 4]);
        guest.device.write(offset, &bytes);
    }
}

#[test]
fn a_driver_without_event_indices_is_served_and_interrupted_as_well() {
    let mut guest = Guest::live(Rng, EVENT_IDX);
    for round in 0..3 {
        let (_, written) = guest.request(RING, &[(BUFFERS, 16, true)]);
        assert_eq!(written, 16);
        until("an interrupt", || guest.line.read().ok());
        assert_eq!(guest.read(register::INTERRUPT_STATUS), 1, "{round}");
        guest.write(register::INTERRUPT_ACK, 1);
    }
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again_when_the_guest_resumes() {
    let mut guest = Guest::live(Rng, 0);
    guest.request(RING, &[(BUFFERS, 16, true)]);
    until("an interrupt", || guest.line.read().ok());
    guest.device.pause(driver::LIMIT).unwrap();
    guest.device.resume();
    until("the interrupt again", || guest.line.read().ok());
    guest.write(register::INTERRUPT_ACK, 1);
    guest.device.pause(driver::LIMIT).unwrap();
    guest.device.resume();
    assert!(guest.line.read().is_err());
}

#[test]
fn a_driver_that_has_failed_gets_no_more_buffers() {
    let mut guest = Guest::live(Rng, 0);
    guest.write(register::STATUS, 15 | 128);
    guest.offer(RING, &[(BUFFERS, 16, true)]);
    guest.kick(0);
    guest.device.pause(driver::LIMIT).unwrap();
    assert_eq!(guest.used(RING), None);
}

#[test]
fn a_notification_of_a_paused_device_is_kept() {
    let mut guest = Guest::live(Rng, 0);
    guest.device.pause(driver::LIMIT).unwrap();
    guest.offer(RING, &[(BUFFERS, 16, true)]);
    guest.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(guest.used(RING), None);
    guest.device.resume();
    assert_eq!(guest.wait_used(RING), (0, 16));
}
