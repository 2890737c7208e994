//! What a driver gets from a disk.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests
#![allow(clippy::cast_possible_truncation)] // of numbers that a test has chosen

mod driver;

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use colo_virtio::blk::{
    Blk, BlockObserver, DiskFile, DiskOptions, Engine, RequestKind, Serial, ThreadPool,
};
use colo_virtio::{MmioDevice, register};
use driver::blk::{
    DATA, DISCARD, FLUSH, GET_ID, HEADER, IN, MemoryDisk, OUT, SECTORS, STATUS, WRITE_ZEROES,
    put_header, put_range, request,
};
use driver::{BUFFERS, Guest, INDIRECT, LIMIT, NEXT, USED_RING, WRITE, until};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;

fn live(disk: &MemoryDisk) -> Guest<Blk> {
    Guest::live(disk.blk(), 0)
}

#[test]
fn what_is_written_is_read_back_and_marked_dirty() {
    let disk = MemoryDisk::new();
    let mut guest = live(&disk);
    let pattern: Vec<u8> = (0..4096u32).map(|at| at as u8).collect();
    guest.put(DATA, &pattern);
    assert_eq!(request(&mut guest, OUT, 8, 4096), (OK, 1));
    assert_eq!(disk.hand.lock().unwrap().bytes[4096..8192], pattern);
    guest.put(DATA, &[0; 4096]);
    let region = guest.memory.iter().next().unwrap().get_mmap();
    region.bitmap().reset();
    assert_eq!(request(&mut guest, IN, 8, 4096), (OK, 4097));
    assert_eq!(guest.get(DATA, 4096), pattern);
    // Data, status and the ring of used buffers.
    for written in [DATA, STATUS, USED_RING] {
        assert!(region.bitmap().dirty_at(written as usize), "{written:#x}");
    }
    assert_eq!(disk.seen(), ["write 4096 4096 false", "read 4096 4096"]);
}

#[test]
fn a_request_in_an_indirect_table_is_done() {
    let disk = MemoryDisk::new();
    let mut guest = live(&disk);
    disk.hand.lock().unwrap().bytes[..1024].fill(6);
    put_header(&guest, HEADER, IN, 0);
    let table = BUFFERS + 0x8000;
    guest.put_raw_descriptor(table, (HEADER, 16, NEXT, 1));
    guest.put_raw_descriptor(table + 16, (DATA, 512, NEXT | WRITE, 2));
    guest.put_raw_descriptor(table + 32, (DATA + 0x800, 512, NEXT | WRITE, 3));
    guest.put_raw_descriptor(table + 48, (STATUS, 1, WRITE, 0));
    guest.put_descriptor(0, 0, (table, 64, INDIRECT, 0));
    guest.make_available(0, 0);
    guest.kick(0);
    assert_eq!(guest.wait_used(0), (0, 1025));
    assert_eq!(guest.get(DATA, 512), [6; 512]);
    assert_eq!(guest.get(DATA + 0x800, 512), [6; 512]);
    assert_eq!(guest.get(STATUS, 1), [OK]);
}

#[test]
fn a_driver_reads_the_geometry_and_the_serial_number() {
    let disk = MemoryDisk::new();
    let mut guest = live(&disk);
    let mut capacity = [0; 8];
    guest.device.read(register::CONFIG, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    assert_eq!(request(&mut guest, GET_ID, 0, 20), (OK, 21));
    assert_eq!(&guest.get(DATA, 20), b"colo-disk\0\0\0\0\0\0\0\0\0\0\0");
    // Room for a part of it gets a part.
    guest.put(DATA, &[0xff; 20]);
    request(&mut guest, GET_ID, 0, 4);
    assert_eq!(&guest.get(DATA, 5), b"colo\xff");
    assert_eq!(Serial::new("much too long for a serial number"), None);
    assert_eq!(Serial::new("tab\t"), None);
}

#[test]
fn a_write_is_stable_at_once_for_a_driver_without_a_cache() {
    for (without, cache, expected) in [
        (0, None, false),
        (0, Some(0), true),
        (F_CONFIG_WCE, None, false),
        (F_CONFIG_WCE | F_FLUSH, None, true),
    ] {
        let disk = MemoryDisk::new();
        let mut guest = Guest::live(disk.blk(), without);
        if let Some(cache) = cache {
            guest.device.write(register::CONFIG + 32, &[cache]);
        }
        request(&mut guest, OUT, 0, 512);
        put_range(&guest, 0, 8, 0);
        request(&mut guest, WRITE_ZEROES, 0, 16);
        let write = format!("write 0 512 {expected}");
        let zero = format!("zero 0 4096 false {expected}");
        assert_eq!(disk.seen(), [write, zero], "{without:#x} {cache:?}");
    }
}

#[test]
fn flush_discard_and_zeroes_reach_the_disk() {
    let disk = MemoryDisk::new();
    let mut guest = live(&disk);
    assert_eq!(request(&mut guest, FLUSH, 0, 0), (OK, 1));
    put_range(&guest, 16, 8, 0);
    assert_eq!(request(&mut guest, DISCARD, 0, 16), (OK, 1));
    put_range(&guest, 16, 8, 1);
    assert_eq!(request(&mut guest, WRITE_ZEROES, 0, 16), (OK, 1));
    assert_eq!(
        disk.seen(),
        ["flush", "discard 8192 4096", "zero 8192 4096 true false"]
    );
}

#[test]
fn requests_that_no_disk_can_do_fail_and_reach_none() {
    let disk = MemoryDisk::new();
    let mut guest = live(&disk);
    for (kind, sector, len, expected) in [
        (IN, SECTORS, 512, IOERR),
        (IN, SECTORS - 1, 1024, IOERR),
        (IN, u64::MAX, 512, IOERR),
        (IN, u64::MAX / 512, 512, IOERR),
        (OUT, 0, 511, IOERR),
        (OUT, 0, 0, IOERR),
        (IN, 0, 0, IOERR),
        (IN, 0, 17 << 20, IOERR),
        (99, 0, 512, UNSUPP),
        (u32::MAX, 0, 0, UNSUPP),
    ] {
        let (status, _) = request(&mut guest, kind, sector, len);
        assert_eq!(status, expected, "{kind} {sector} {len}");
    }
    for (kind, range, len, expected) in [
        (DISCARD, (0, 8, 1), 16, UNSUPP),
        (WRITE_ZEROES, (0, 8, 2), 16, UNSUPP),
        (DISCARD, (SECTORS, 1, 0), 16, IOERR),
        (DISCARD, (0, 0, 0), 16, IOERR),
        (WRITE_ZEROES, (0, u32::MAX, 0), 16, IOERR),
        (WRITE_ZEROES, (u64::MAX, 1, 0), 16, IOERR),
        (DISCARD, (0, 8, 0), 15, IOERR),
        (DISCARD, (0, 8, 0), 32, IOERR),
    ] {
        put_range(&guest, range.0, range.1, range.2);
        let (status, _) = request(&mut guest, kind, 0, len);
        assert_eq!(status, expected, "{kind} {range:?} {len}");
    }
    assert_eq!(disk.seen(), [""; 0]);
    let stats = guest.device.with_model(|blk| blk.stats());
    assert_eq!(stats.read.invalid_operations, 6);
    assert_eq!(stats.write.invalid_operations, 5);
    assert_eq!(stats.unmap.invalid_operations, 5);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = MemoryDisk::new();
    disk.hand.lock().unwrap().read_only = true;
    let mut guest = live(&disk);
    assert_ne!(guest.offered() & 1 << 5, 0);
    put_range(&guest, 0, 8, 0);
    for (kind, len) in [(OUT, 512), (DISCARD, 16), (WRITE_ZEROES, 16)] {
        assert_eq!(request(&mut guest, kind, 0, len).0, IOERR);
    }
    assert_eq!(request(&mut guest, IN, 0, 512).0, OK);
    assert_eq!(disk.seen(), ["read 0 512"]);
}

#[derive(Clone, Debug, Default)]
struct Observed(Arc<Mutex<Vec<Failure>>>);

type Failure = (RequestKind, Option<i32>);

impl BlockObserver for Observed {
    fn io_error(&mut self, kind: RequestKind, error: &io::Error) {
        self.0.lock().unwrap().push((kind, error.raw_os_error()));
    }
}

#[test]
fn an_error_of_the_disk_reaches_the_guest_the_counters_and_the_observer() {
    let disk = MemoryDisk::new();
    let observed = Observed::default();
    let mut blk = disk.blk();
    blk.set_observer(Box::new(observed.clone()));
    let mut guest = Guest::live(blk, 0);
    guest.put(DATA, &[9; 512]);
    disk.hand.lock().unwrap().fail = Some(libc::EIO);
    assert_eq!(request(&mut guest, IN, 0, 512).0, IOERR);
    assert_eq!(
        guest.get(DATA, 512),
        [9; 512],
        "no data comes with an error"
    );
    assert_eq!(request(&mut guest, OUT, 0, 512).0, IOERR);
    disk.hand.lock().unwrap().fail = Some(libc::EOPNOTSUPP);
    assert_eq!(request(&mut guest, FLUSH, 0, 0).0, UNSUPP);
    disk.hand.lock().unwrap().fail = None;
    assert_eq!(request(&mut guest, IN, 0, 512).0, OK);
    assert_eq!(
        *observed.0.lock().unwrap(),
        [
            (RequestKind::Read, Some(libc::EIO)),
            (RequestKind::Write, Some(libc::EIO)),
            (RequestKind::Flush, Some(libc::EOPNOTSUPP)),
        ]
    );
    let stats = guest.device.with_model(|blk| blk.stats());
    assert_eq!(
        (stats.read.failed_operations, stats.read.operations),
        (1, 1)
    );
    assert_eq!(stats.read.bytes, 512);
    assert_eq!(stats.write.failed_operations, 1);
    assert_eq!(stats.flush.failed_operations, 1);
}

/// Offers a request with places of its own.
fn offer(guest: &mut Guest<Blk>, slot: u64, kind: u32, sector: u64) {
    let base = BUFFERS + 0x10_0000 + slot * 0x1000;
    put_header(guest, base, kind, sector);
    guest.put(base + 16, &[0xee]);
    let chain = [
        (base, 16, false),
        (base + 0x200, 512, kind == IN),
        (base + 16, 1, true),
    ];
    guest.offer(0, &chain);
}

#[test]
fn a_pause_waits_for_requests_in_flight_and_not_for_ever() {
    let disk = MemoryDisk::new();
    disk.hold(true);
    let mut guest = live(&disk);
    for slot in 0..3 {
        offer(&mut guest, slot, OUT, slot);
    }
    guest.kick(0);
    until("three requests", || (disk.held() == 3).then_some(()));
    let error = guest.device.pause(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.in_flight, 3);
    assert!(!guest.device.is_paused());
    // One more is not taken any more.
    offer(&mut guest, 3, IN, 0);
    guest.kick(0);
    let for_thread = disk.clone();
    let releasing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        for_thread.hold(false);
        for_thread.release();
    });
    guest.device.pause(LIMIT).unwrap();
    releasing.join().unwrap();
    assert!(guest.device.is_paused());
    for _ in 0..3 {
        assert!(guest.used(0).is_some());
    }
    assert_eq!(guest.used(0), None);
    assert_eq!(disk.held(), 0);
    guest.device.resume();
    guest.wait_used(0);
}

#[test]
fn a_reset_ends_what_the_driver_asked_for_and_the_next_driver_waits_for_it() {
    let disk = MemoryDisk::new();
    disk.hold(true);
    let mut guest = live(&disk);
    put_header(&guest, HEADER, IN, 0);
    guest.put(DATA, &[5; 512]);
    guest.put(STATUS, &[0xee]);
    disk.hand.lock().unwrap().bytes[..512].fill(7);
    guest.offer(
        0,
        &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)],
    );
    guest.kick(0);
    until("the request", || (disk.held() == 1).then_some(()));
    guest.set_up(0);
    offer(&mut guest, 0, OUT, 9);
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(disk.held(), 1, "an old request comes first");
    disk.hold(false);
    disk.release();
    guest.wait_used(0);
    assert_eq!(guest.get(DATA, 512), [5; 512], "the old driver's memory");
    assert_eq!(guest.get(STATUS, 1), [0xee]);
    assert_eq!(guest.used(0), None);
}

#[test]
fn a_guest_that_changes_its_buffer_changes_nothing_that_is_under_way() {
    let disk = MemoryDisk::new();
    disk.hold(true);
    let mut guest = live(&disk);
    guest.put(DATA, &[1; 512]);
    put_header(&guest, HEADER, OUT, 0);
    guest.offer(
        0,
        &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)],
    );
    guest.kick(0);
    until("the request", || (disk.held() == 1).then_some(()));
    guest.put(DATA, &[2; 512]);
    disk.release();
    guest.wait_used(0);
    assert_eq!(disk.hand.lock().unwrap().bytes[..512], [1; 512]);
}

#[test]
fn requests_beyond_the_memory_for_them_wait_in_the_queue() {
    let disk = MemoryDisk::new();
    disk.hand.lock().unwrap().bytes = vec![0; 64 << 20];
    disk.hold(true);
    let mut guest = live(&disk);
    // Each of 16 MiB, to the same place.
    for slot in 0..6 {
        let header = BUFFERS + slot * 0x20;
        put_header(&guest, header, OUT, 0);
        let data = BUFFERS + 0x1000;
        guest.offer(
            0,
            &[
                (header, 16, false),
                (data, 16 << 20, false),
                (STATUS, 1, true),
            ],
        );
    }
    guest.kick(0);
    until("four requests", || (disk.held() == 4).then_some(()));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(disk.held(), 4);
    disk.release();
    until("the others", || (disk.held() == 2).then_some(()));
    disk.release();
    for _ in 0..6 {
        guest.wait_used(0);
    }
}

#[test]
fn threads_do_many_requests_of_a_file_at_once() {
    for direct in [false, true] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0; 1 << 20]).unwrap();
        let options = DiskOptions {
            direct,
            ..DiskOptions::default()
        };
        let disk = DiskFile::open(file.path(), options).unwrap();
        let pool = ThreadPool::new(Arc::new(disk), NonZeroUsize::new(4).unwrap()).unwrap();
        check_backend(Blk::new(Box::new(pool), Serial::default()), file.path());
    }
}

#[test]
fn io_uring_does_as_threads_do_or_says_why_it_cannot() {
    for direct in [false, true] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0; 1 << 20]).unwrap();
        let options = DiskOptions {
            direct,
            ..DiskOptions::default()
        };
        let disk = Arc::new(DiskFile::open(file.path(), options).unwrap());
        let threads = NonZeroUsize::new(2).unwrap();
        let started = Engine::IoUring.start(disk, threads).unwrap();
        match started.engine {
            Engine::IoUring => assert_eq!(started.fallback, None),
            Engine::Threads => assert_ne!(started.fallback, None),
        }
        if !cfg!(feature = "io-uring") {
            assert_eq!(started.engine, Engine::Threads);
        }
        check_backend(Blk::new(started.backend, Serial::default()), file.path());
    }
}

#[test]
fn a_disk_that_was_cut_fails_what_is_beyond_by_either_engine() {
    for engine in [Engine::Threads, Engine::IoUring] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let disk = Arc::new(DiskFile::open(file.path(), DiskOptions::default()).unwrap());
        let started = engine.start(disk, NonZeroUsize::MIN).unwrap();
        let mut guest = Guest::live(Blk::new(started.backend, Serial::default()), 0);
        file.as_file().set_len(4096).unwrap();
        assert_eq!(request(&mut guest, IN, 0, 512).0, OK);
        assert_eq!(request(&mut guest, IN, 64, 512).0, IOERR);
        let stats = guest.device.with_model(|blk| blk.stats());
        assert_eq!(stats.read.failed_operations, 1);
    }
}

/// Writes and reads sectors, many at once.
fn check_backend(blk: Blk, path: &std::path::Path) {
    let mut guest = Guest::live(blk, 0);
    let data = |slot: u64| BUFFERS + 0x10_0000 + slot * 0x1000 + 0x200;
    for slot in 0..20 {
        guest.put(data(slot), &[slot as u8 + 1; 512]);
        offer(&mut guest, slot, OUT, slot * 3);
    }
    guest.kick(0);
    for _ in 0..20 {
        guest.wait_used(0);
    }
    assert_eq!(request(&mut guest, FLUSH, 0, 0).0, OK);
    let written = std::fs::read(path).unwrap();
    for slot in 0..20 {
        guest.put(data(slot), &[0; 512]);
        offer(&mut guest, slot, IN, slot * 3);
        assert_eq!(written[slot as usize * 1536], slot as u8 + 1);
    }
    guest.kick(0);
    for _ in 0..20 {
        guest.wait_used(0);
    }
    for slot in 0..20 {
        assert_eq!(guest.get(data(slot), 512), [slot as u8 + 1; 512]);
    }
    put_range(&guest, 0, 64, 1);
    assert_eq!(request(&mut guest, WRITE_ZEROES, 0, 16).0, OK);
    assert_eq!(request(&mut guest, DISCARD, 0, 16).0, UNSUPP);
    guest.put(DATA, &[1; 4096]);
    assert_eq!(request(&mut guest, IN, 0, 4096).0, OK);
    assert_eq!(guest.get(DATA, 4096), [0; 4096]);
    guest.device.pause(LIMIT).unwrap();
}
