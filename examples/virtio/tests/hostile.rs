//! Drivers that do what none may: the device says so, and nothing else happens.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests
#![allow(clippy::cast_possible_truncation)] // of numbers that a test has chosen

mod driver;

use colo_virtio::blk::Blk;
use colo_virtio::rng::Rng;
use colo_virtio::{MmioDevice, Model, register};
use driver::blk::{HEADER, MemoryDisk, OUT, STATUS, put_header};
use driver::{BUFFERS, Guest, INDIRECT, LIMIT, NEXT, RAM, WRITE};
use proptest::prelude::*;

type Spoil = fn(&mut Guest<Blk>);

#[test]
fn a_chain_that_cannot_be_makes_the_device_need_a_reset() {
    let spoils: [(&str, Spoil); 12] = [
        ("a loop", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            g.put_descriptor(0, 1, (BUFFERS, 16, NEXT, 0));
        }),
        ("a loop of one", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 16, NEXT, 0));
        }),
        ("next beyond the table", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 16, NEXT, 64));
        }),
        ("an empty buffer", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 0, 0, 0));
        }),
        ("4 GiB", |g| {
            g.put_descriptor(0, 0, (BUFFERS, u32::MAX, 0, 0));
        }),
        ("beyond memory", |g| {
            g.put_descriptor(0, 0, (RAM - 8, 16, 0, 0));
        }),
        ("around the address space", |g| {
            g.put_descriptor(0, 0, (u64::MAX - 7, 16, 0, 0));
        }),
        ("read behind written", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 16, NEXT | WRITE, 1));
            g.put_descriptor(0, 1, (BUFFERS, 16, 0, 0));
        }),
        ("no status", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 16, 0, 0));
        }),
        ("a short header", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 15, NEXT, 1));
            g.put_descriptor(0, 1, (BUFFERS, 1, WRITE, 0));
        }),
        ("indirect in indirect", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 32, INDIRECT, 0));
            g.put_raw_descriptor(BUFFERS, (BUFFERS, 32, INDIRECT, 0));
        }),
        ("an indirect table that loops", |g| {
            g.put_descriptor(0, 0, (BUFFERS, 16 * 65535, INDIRECT, 0));
            g.put_raw_descriptor(BUFFERS, (BUFFERS, 16, NEXT, 0));
        }),
    ];
    for (what, spoil) in spoils {
        let disk = MemoryDisk::new();
        let mut guest = Guest::live(disk.blk(), 0);
        spoil(&mut guest);
        guest.make_available(0, 0);
        guest.kick(0);
        guest.wait_needs_reset();
        assert_eq!(guest.used_index(0), 0, "{what}");
        assert_eq!(disk.seen(), [""; 0], "{what}");
        assert_eq!(guest.read(register::INTERRUPT_STATUS) & 2, 2, "{what}");
        // The next driver gets a device that works.
        guest.set_up(0);
        put_header(&guest, HEADER, OUT, 0);
        guest.request(
            0,
            &[
                (HEADER, 16, false),
                (BUFFERS + 0x1000, 512, false),
                (STATUS, 1, true),
            ],
        );
    }
}

#[test]
fn more_available_than_a_queue_holds_makes_the_device_need_a_reset() {
    let guest = Guest::live(MemoryDisk::new().blk(), 0);
    guest.set_available_index(0, 65);
    guest.kick(0);
    guest.wait_needs_reset();
}

#[test]
fn a_head_beyond_the_table_makes_the_device_need_a_reset() {
    let mut guest = Guest::live(MemoryDisk::new().blk(), 0);
    guest.make_available(0, 64);
    guest.kick(0);
    guest.wait_needs_reset();
}

/// A descriptor that is often nearly right.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => (0..RAM).boxed(),
        1 => (RAM - 64..RAM + 64).boxed(),
        1 => any::<u64>().boxed(),
    ];
    let len = prop_oneof![
        Just(0u32),
        Just(1),
        Just(16),
        Just(512),
        Just(4096),
        Just(u32::MAX),
        any::<u32>()
    ];
    let flags = prop_oneof![0u16..8, any::<u16>()];
    let next = prop_oneof![0u16..8, any::<u16>()];
    (address, len, flags, next)
}

#[derive(Clone, Debug)]
enum Step {
    Register(u64, u32),
    Bytes(u64, Vec<u8>),
    Descriptor(u16, (u64, u32, u16, u16)),
    Header(u16, u32, u64),
    Available(u16),
    Index(u16),
    Kick(u32),
    SetUp,
    Rest,
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![(0u64..0x40).prop_map(|n| n * 4), 0u64..0x200];
    let value = prop_oneof![0u32..16, any::<u32>()];
    prop_oneof![
        1 => (register.clone(), value).prop_map(|(r, v)| Step::Register(r, v)),
        1 => (register, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(r, b)| Step::Bytes(r, b)),
        4 => (0u16..8, descriptor()).prop_map(|(i, d)| Step::Descriptor(i, d)),
        4 => (0u16..8, 0u32..16, 0u64..4096).prop_map(|(i, k, s)| Step::Header(i, k, s)),
        4 => (0u16..9).prop_map(Step::Available),
        1 => any::<u16>().prop_map(Step::Index),
        4 => (0u32..4).prop_map(Step::Kick),
        1 => Just(Step::SetUp),
        1 => Just(Step::Rest),
    ]
}

fn drive<D: Model>(guest: &mut Guest<D>, queue: usize, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Register(register, value) => guest.write(*register, *value),
            Step::Bytes(register, bytes) => {
                guest.device.write(*register, bytes);
                guest.device.read(*register, &mut bytes.clone());
            }
            Step::Descriptor(index, raw) => guest.put_descriptor(queue, *index, *raw),
            Step::Header(index, kind, sector) => {
                // A request that is whole but for what the other steps do to it.
                let at = BUFFERS + 0x1000 * u64::from(*index);
                let mut header = kind.to_le_bytes().to_vec();
                header.extend([0; 4]);
                header.extend(sector.to_le_bytes());
                guest.put(at, &header);
                guest.put_descriptor(queue, *index, (at, 16, NEXT, index + 1));
                guest.put_descriptor(queue, index + 1, (at + 16, 513, WRITE, 0));
            }
            Step::Available(head) => guest.make_available(queue, *head),
            Step::Index(index) => guest.set_available_index(queue, *index),
            Step::Kick(queue) => guest.kick(*queue),
            Step::SetUp => guest.set_up(0),
            Step::Rest => {
                guest.device.pause(LIMIT).unwrap();
                guest.device.resume();
            }
        }
    }
    guest.device.pause(LIMIT).unwrap();
    guest.device.resume();
    // Whatever it was, a new driver finds a device that works.
    guest.set_up(0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_driver_breaks_a_disk(steps in prop::collection::vec(step(), 1..64)) {
        let mut guest = Guest::live(MemoryDisk::new().blk(), 0);
        drive(&mut guest, 0, &steps);
        let status = driver::blk::request(&mut guest, OUT, 0, 512).0;
        prop_assert_eq!(status, 0);
    }

    #[test]
    fn no_driver_breaks_an_entropy_device(steps in prop::collection::vec(step(), 1..64)) {
        let mut guest = Guest::live(Rng, 0);
        drive(&mut guest, 0, &steps);
        prop_assert_eq!(guest.request(0, &[(BUFFERS, 8, true)]), (0, 8));
    }
}
