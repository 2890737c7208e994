//! Source and target over a real socket: what a migration promises to both ends.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::guest::{Guest, Log, Ram, configuration};
use migration_stream::codec::IdStr;
use migration_stream::command::Command;
use migration_stream::configuration::Configuration;
use migration_stream::decoder::{ConfigurationRule, DecoderConfig};
use migration_stream::dirty_bitmap::{
    self, BitmapFlags, Chunk as BitmapChunk, DirtyBitmapEncoder, DirtyBitmapError, MigratedBitmap,
};
use migration_stream::io::{ByteSink, ByteSource, Chunk, FdChannel};
use migration_stream::opaque_tail::TailLimits;
use migration_stream::precopy::{
    Body, BoxError, Control, Limits, Loaded, RamSetup, ReturnPathReader, Source, SourceConfig,
    SourceError, SourceEvent, SourceStatus, SwitchedOver, SwitchoverAcks, Target, TargetConfig,
    TargetError, TargetVm, Throttle, ThrottleConfig, ThrottleMeans,
};
use migration_stream::ram::{InStream, NoMultifd, ZeroPageDetection};
use migration_stream::section::{
    Continuation, InstanceId, SectionHeader, SectionId, encode_continuation, encode_eof,
    encode_footer,
};
use migration_stream::xbzrle::PageCache;
use migration_stream::{GuestRam, PAGE_SIZE, StreamReader, StreamWriter, header};

const LIMIT: Duration = Duration::from_millis(500);

/// Knows the one device of [`Guest`].
struct Devices {
    loaded: usize,
    refuse: bool,
}

impl TargetVm for Devices {
    fn load_device(&mut self, section: &SectionHeader, body: &[u8]) -> Result<Body, BoxError> {
        assert_eq!(
            (section.idstr.as_str(), section.instance),
            ("thing", InstanceId(3))
        );
        if self.refuse {
            return Err("no such state".into());
        }
        if body.len() < 100 {
            return Ok(Body::NeedMore);
        }
        self.loaded += 1;
        Ok(Body::Complete(100))
    }
}

fn channels() -> (FdChannel, FdChannel) {
    let (a, b) = UnixStream::pair().unwrap();
    (
        FdChannel::new(a, LIMIT).unwrap(),
        FdChannel::new(b, LIMIT).unwrap(),
    )
}

type Sent = Result<SwitchedOver<InStream, Log>, SourceError>;

fn send(guest: &mut Guest, channel: &FdChannel) -> Sent {
    let ram: Arc<dyn GuestRam> = Arc::clone(&guest.ram) as _;
    send_by(
        guest,
        channel,
        InStream::new(ram, ZeroPageDetection::Multifd),
    )
}

fn send_by(guest: &mut Guest, channel: &FdChannel, transport: InStream) -> Sent {
    begin(guest, channel, transport)?.run(guest)
}

fn begin(
    guest: &Guest,
    channel: &FdChannel,
    transport: InStream,
) -> Result<Source<InStream, Log>, SourceError> {
    let ram: Arc<dyn GuestRam> = Arc::clone(&guest.ram) as _;
    Source::start(
        SourceConfig {
            configuration: Some(Configuration {
                uuid: guest.uuid,
                ..configuration("test")
            }),
            switchover_start: true,
            confirm_timeout: LIMIT,
        },
        Arc::new(Limits::new(0, guest.downtime)),
        StreamWriter::new(channel.share()),
        Some(ReturnPathReader::new(channel.share())),
        RamSetup {
            ram,
            log: guest.log.clone(),
            transport,
        },
    )
}

fn target(channel: &FdChannel, ram: &Ram) -> Target {
    target_with(channel, ram, false)
}

fn target_with(channel: &FdChannel, ram: &Ram, xbzrle: bool) -> Target {
    let rule = ConfigurationRule::Matching(configuration("test"));
    let config = TargetConfig {
        decoder: DecoderConfig {
            xbzrle,
            ..DecoderConfig::new(rule)
        },
        max_devices: 1 << 20,
    };
    let reader = StreamReader::new(channel.share(), b"");
    Target::new(config, reader, Some(Box::new(channel.share())), ram)
}

fn receive(channel: &FdChannel, ram: &Ram, devices: &mut Devices) -> Result<Loaded, TargetError> {
    let mut loaded = target(channel, ram).load(ram, &mut NoMultifd, devices)?;
    loaded.confirm()?;
    Ok(loaded)
}

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 700), ("rom", 3)];

fn source() -> (Arc<Ram>, Guest) {
    let ram = Ram::new(BLOCKS);
    for page in (0..700).step_by(2) {
        ram.write(0, page, page + 1);
    }
    ram.write(1, 2, 99);
    let guest = Guest::new(&ram, &Log::default());
    (ram, guest)
}

#[test]
fn a_guest_that_writes_arrives_with_its_last_write_and_its_devices() {
    let (ram, mut guest) = source();
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    let mut devices = Devices {
        loaded: 0,
        refuse: false,
    };
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        let received = receive(&b, &landed, &mut devices);
        (sender.join().unwrap(), received)
    });
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert!(!guest.running);
    assert_eq!(devices.loaded, 1);
    assert!(guest.passes >= 1);
    ram.assert_equals(&landed);
    assert!(received.received().zero_pages >= 350);
    assert!(sent.progress.transferred > 350 * PAGE_SIZE);
    assert!(guest.log.0.lock().unwrap().0, "the log goes on for COLO");
    drop(sent);
    assert!(!guest.log.0.lock().unwrap().0);
}

/// Takes what `channel` brings without knowing its blocks or its devices.
fn learn(channel: &FdChannel) -> Result<(Arc<Ram>, Loaded), TargetError> {
    let config = TargetConfig {
        decoder: DecoderConfig::new(ConfigurationRule::Any),
        max_devices: 1 << 20,
    };
    let reader = StreamReader::new(channel.share(), b"");
    let (target, blocks) =
        Target::from_announcement(config, reader, Some(Box::new(channel.share())))?;
    assert!(target.has_return_path());
    assert_eq!(target.configuration(), Some(&configuration("test")));
    let blocks: Vec<_> = blocks.iter().map(|(_, b)| (b.name(), b.pages())).collect();
    let ram = Ram::new(&blocks);
    let (loaded, tail) = target.load_opaque(&*ram, &mut NoMultifd, TailLimits::default())?;
    assert_eq!(tail.sections().len(), 1);
    Ok((ram, loaded))
}

#[test]
fn a_target_that_knows_no_blocks_learns_them_and_takes_everything() {
    let (ram, mut guest) = source();
    let (a, b) = channels();
    let (sent, landed) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        let (landed, mut loaded) = learn(&b).unwrap();
        loaded.confirm().unwrap();
        (sender.join().unwrap(), landed)
    });
    sent.unwrap();
    assert!(!guest.running);
    ram.assert_equals(&landed);
}

#[test]
fn a_guest_that_is_refused_after_it_was_loaded_runs_on_at_its_source() {
    let (_, mut guest) = source();
    let (a, b) = channels();
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        learn(&b).unwrap().1.refuse();
        sender.join().unwrap()
    });
    assert!(matches!(sent, Err(SourceError::Refused { status: 1 })));
    assert!(guest.running);
}

#[test]
fn a_stream_without_ram_announces_nothing_and_its_source_is_told() {
    let (mut a, b) = channels();
    let mut stream = BytesMut::new();
    header::encode(&mut stream);
    configuration("test").encode(&mut stream);
    Command::OpenReturnPath.encode(&mut stream);
    encode_eof(&mut stream);
    a.write_all(&[Chunk::Bytes(&stream)]).unwrap();
    let error = learn(&b).unwrap_err();
    assert!(matches!(error, TargetError::Missing { .. }), "{error}");
    let mut answer = [0; 8];
    assert_eq!(a.read(&mut answer).unwrap(), 8);
    assert_eq!(answer, [0, 1, 0, 4, 0, 0, 0, 1]);
}

#[test]
fn checkpoints_follow_on_the_same_stream_and_cannot_set_ram_up() {
    let (ram, mut guest) = source();
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = send(&mut guest, &a).unwrap();
            for round in 0..3 {
                for page in 0..round * 100 {
                    guest.write(page);
                }
                let pages = sent.ram.end(&mut sent.out).unwrap();
                assert_eq!(pages, round * 100);
                sent.out.write_bytes(&[0]).unwrap();
            }
            sent
        });
        let mut devices = Devices {
            loaded: 0,
            refuse: false,
        };
        let loaded = receive(&b, &landed, &mut devices).unwrap();
        let mut checkpoints = loaded.into_checkpoints().unwrap();
        for round in 0..3 {
            let received = checkpoints.receive_ram(&*landed, &mut NoMultifd).unwrap();
            assert_eq!(received.normal_pages, round * 100);
        }
        let mut sent = sender.join().unwrap();
        // A START section of RAM, as at the beginning of a stream.
        sent.out
            .write_bytes(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04")
            .unwrap();
        let error = checkpoints
            .receive_ram(&*landed, &mut NoMultifd)
            .unwrap_err();
        assert!(matches!(error, TargetError::Decode(_)), "{error}");
    });
    ram.assert_equals(&landed);
}

#[test]
fn pages_written_again_arrive_as_differences_and_no_checkpoints_follow_them() {
    let (ram, mut guest) = source();
    guest.writes_left = 60;
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    let transport = InStream::new(Arc::clone(&ram) as _, ZeroPageDetection::Multifd)
        .with_xbzrle(PageCache::new(PageCache::DEFAULT_SIZE).unwrap());
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            // Not before the guest has stopped writing.
            guest.downtime = Duration::ZERO;
            send_by(&mut guest, &a, transport).unwrap()
        });
        let mut devices = Devices {
            loaded: 0,
            refuse: false,
        };
        let target = target_with(&b, &landed, true);
        let mut loaded = target.load(&*landed, &mut NoMultifd, &mut devices).unwrap();
        loaded.confirm().unwrap();
        let sent = sender.join().unwrap().progress.counters.xbzrle;
        assert!(sent.pages > 0 && sent.cache_miss > 0, "{sent:?}");
        assert_eq!(sent.cache_size, PageCache::DEFAULT_SIZE);
        assert!(sent.bytes < sent.pages * 100 && sent.encoding_rate() > 40.0);
        assert_eq!(loaded.received().xbzrle_pages, sent.pages);
        let error = loaded.into_checkpoints().unwrap_err();
        assert!(error.to_string().contains("xbzrle"), "{error}");
    });
    ram.assert_equals(&landed);
}

#[test]
fn a_cache_smaller_than_what_the_guest_writes_costs_differences_and_never_memory() {
    for pages in [1, 2, 16] {
        let (ram, mut guest) = source();
        guest.writes_left = 150;
        guest.downtime = Duration::ZERO;
        let landed = Ram::new(BLOCKS);
        let (a, b) = channels();
        let transport = InStream::new(Arc::clone(&ram) as _, ZeroPageDetection::default())
            .with_xbzrle(PageCache::new(pages * PAGE_SIZE).unwrap());
        let mut devices = Devices {
            loaded: 0,
            refuse: false,
        };
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send_by(&mut guest, &a, transport).unwrap());
            let target = target_with(&b, &landed, true);
            let mut loaded = target.load(&*landed, &mut NoMultifd, &mut devices).unwrap();
            loaded.confirm().unwrap();
            sender.join().unwrap().progress.counters.xbzrle
        });
        assert!(
            sent.cache_miss > 0 && sent.cache_miss_rate() > 0.0,
            "{sent:?}"
        );
        ram.assert_equals(&landed);
    }
}

#[test]
fn devices_that_nobody_knows_are_split_by_their_description() {
    let (ram, mut guest) = source();
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a).map(|_| ()));
        let (mut loaded, tail) = target(&b, &landed)
            .load_opaque(&*landed, &mut NoMultifd, TailLimits::default())
            .unwrap();
        loaded.confirm().unwrap();
        let sections: Vec<_> = tail.sections().collect();
        assert_eq!(sections.len(), 1);
        assert_eq!(sections[0].body, [5; 100]);
        sender.join().unwrap().unwrap();
    });
    ram.assert_equals(&landed);
}

const BITMAP_SECTION: SectionId = SectionId(9);

/// The sections of one bitmap, and what it has in each of its chunks.
fn bitmap_sections() -> Vec<u8> {
    let mut out = Vec::new();
    let mut bitmaps = DirtyBitmapEncoder::new();
    let name = |name| IdStr::new(name).unwrap();
    dirty_bitmap::header(BITMAP_SECTION).encode(&mut out);
    let flags = BitmapFlags::default();
    let bitmap = bitmaps
        .start(&name("disk0"), &name("nightly"), 512, flags, &mut out)
        .unwrap();
    BitmapChunk::end().encode(&mut out);
    encode_footer(BITMAP_SECTION, &mut out);
    for kind in [Continuation::Part, Continuation::End] {
        encode_continuation(kind, BITMAP_SECTION, &mut out);
        if kind == Continuation::End {
            // More than what is read at once.
            for i in 0..20 {
                let bits = vec![0x5a; 8 << 10];
                bitmaps
                    .bits(bitmap, i << 16, 1 << 16, &bits, &mut out)
                    .unwrap();
            }
            bitmaps.complete(bitmap, &mut out).unwrap();
        }
        BitmapChunk::end().encode(&mut out);
        encode_footer(BITMAP_SECTION, &mut out);
    }
    out
}

#[test]
fn dirty_bitmaps_are_kept_with_a_guest_taken_as_it_is_and_sent_on_byte_for_byte() {
    let (_, mut guest) = source();
    guest.sections = bitmap_sections();
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    std::thread::scope(|scope| {
        let sections = guest.sections.clone();
        let sender = scope.spawn(|| send(&mut guest, &a).map(drop));
        let (mut loaded, tail) = target(&b, &landed)
            .keeping_dirty_bitmaps()
            .load_opaque(&*landed, &mut NoMultifd, TailLimits::default())
            .unwrap();
        loaded.confirm().unwrap();
        assert_eq!(tail.sections().len(), 1);
        let bitmaps = loaded.dirty_bitmaps();
        assert_eq!(bitmaps.bitmaps().len(), 1);
        assert!(bitmaps.bitmaps()[0].is_complete);
        let mut again = Vec::new();
        bitmaps.encode_sections(BITMAP_SECTION, &mut again);
        assert_eq!(again, sections);
        sender.join().unwrap().unwrap();
    });
}

#[test]
fn dirty_bitmaps_that_are_not_kept_or_too_long_fail_the_migration() {
    for keeps in [false, true] {
        let (_, mut guest) = source();
        guest.sections = bitmap_sections();
        let landed = Ram::new(BLOCKS);
        let (a, b) = channels();
        let (sent, received) = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&mut guest, &a).map(drop));
            let mut target = target(&b, &landed);
            if keeps {
                target = target.keeping_dirty_bitmaps();
            }
            let limits = TailLimits {
                len: 100 << 10,
                ..TailLimits::default()
            };
            let received = target.load_opaque(&*landed, &mut NoMultifd, limits);
            b.shutdown();
            (sender.join().unwrap(), received.map(drop))
        });
        assert!(sent.is_err() && guest.running);
        let error = received.unwrap_err();
        if keeps {
            let TargetError::Decode(e) = &error else {
                panic!("{error}")
            };
            let max = 100 << 10;
            assert_eq!(e.cause, DirtyBitmapError::SectionsTooLong { max }.into());
        } else {
            assert!(matches!(error, TargetError::DirtyBitmaps { .. }), "{error}");
        }
    }
}

/// Knows one device, and takes dirty bitmaps.
struct WithBitmaps(Devices, Vec<BitmapChunk>);

impl TargetVm for WithBitmaps {
    fn load_device(&mut self, section: &SectionHeader, body: &[u8]) -> Result<Body, BoxError> {
        self.0.load_device(section, body)
    }
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        chunk: &BitmapChunk,
    ) -> Result<(), BoxError> {
        assert_eq!(
            (bitmap.node.as_str(), bitmap.name.as_str()),
            ("disk0", "nightly")
        );
        self.1.push(chunk.clone());
        Ok(())
    }
}

#[test]
fn a_vmm_is_shown_each_chunk_of_its_bitmaps_or_refuses_them() {
    let run = |vm: &mut dyn TargetVm| {
        let (_, mut guest) = source();
        guest.sections = bitmap_sections();
        let landed = Ram::new(BLOCKS);
        let (a, b) = channels();
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&mut guest, &a).map(drop));
            let loaded = target(&b, &landed)
                .load(&*landed, &mut NoMultifd, vm)
                .map(|mut loaded| loaded.confirm().unwrap());
            b.shutdown();
            let _ = sender.join().unwrap();
            loaded
        })
    };
    let known = || Devices {
        loaded: 0,
        refuse: false,
    };
    let mut taken = WithBitmaps(known(), Vec::new());
    run(&mut taken).unwrap();
    assert_eq!(taken.0.loaded, 1);
    assert_eq!(taken.1.len(), 22);
    let error = run(&mut known()).unwrap_err();
    assert!(
        matches!(&error, TargetError::Device { idstr, .. } if idstr == "dirty-bitmap"),
        "{error}"
    );
}

/// Runs a migration that must fail at the target, and checks that the guest goes on at the source.
fn refused(landed: &Arc<Ram>, refuse: bool) -> (SourceError, TargetError) {
    let (_, mut guest) = source();
    let (a, b) = channels();
    let mut devices = Devices { loaded: 0, refuse };
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        let received = receive(&b, landed, &mut devices);
        b.shutdown();
        (sender.join().unwrap(), received)
    });
    assert!(guest.running, "the guest goes on");
    assert!(!guest.log.0.lock().unwrap().0, "nothing is logged any more");
    (sent.err().unwrap(), received.err().unwrap())
}

#[test]
fn a_target_that_refuses_a_device_says_so_to_the_source() {
    let (source, target) = refused(&Ram::new(BLOCKS), true);
    assert!(
        matches!(source, SourceError::Refused { status: 1 }),
        "{source}"
    );
    assert!(
        target
            .to_string()
            .contains("device section 'thing' instance 3"),
        "{target}"
    );
}

#[test]
fn a_target_with_another_ram_size_or_block_name_refuses_it() {
    for blocks in [&[("pc.ram", 701), ("rom", 3)], &[("ram", 700), ("rom", 3)]] {
        let (_, target) = refused(&Ram::new(blocks), false);
        assert!(matches!(target, TargetError::Decode(_)), "{target}");
        assert!(target.to_string().contains("ram"), "{target}");
    }
}

#[test]
fn a_peer_that_says_nothing_ends_the_migration_at_the_deadline_and_the_guest_goes_on() {
    let (_, mut guest) = source();
    let (a, b) = channels();
    let begun = Instant::now();
    let drain = std::thread::spawn(move || {
        // Takes everything, answers nothing.
        let mut b = b;
        let mut buf = [0; 4096];
        while b.read(&mut buf).is_ok_and(|n| n > 0) {}
        b
    });
    let error = send(&mut guest, &a).err().unwrap();
    assert!(matches!(error, SourceError::ReturnPath(_)), "{error}");
    assert!(begun.elapsed() >= LIMIT);
    assert!(guest.running);
    drain.join().unwrap();
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running() {
    let (_, mut guest) = source();
    guest.control = Control::Cancel;
    let (a, _b) = channels();
    let error = send(&mut guest, &a).err().unwrap();
    assert!(matches!(error, SourceError::Cancelled), "{error}");
    assert!(guest.running);
}

#[test]
fn a_source_that_dies_in_the_middle_is_an_error_that_says_where() {
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    let mut out = StreamWriter::new(a.share());
    out.write_bytes(&[0x51, 0x45, 0x56, 0x4d, 0, 0]).unwrap();
    a.shutdown();
    let mut devices = Devices {
        loaded: 0,
        refuse: false,
    };
    let error = receive(&b, &landed, &mut devices).unwrap_err();
    assert!(
        matches!(error, TargetError::Stream { offset: 0, .. }),
        "{error}"
    );
}

type Begun = Source<InStream, Log>;

/// Runs a migration between a source and a target that were made otherwise than by default.
fn between(
    guest: &mut Guest,
    source: impl FnOnce(Begun) -> Result<Begun, SourceError> + Send,
    target: impl FnOnce(Target) -> Target,
) -> (Sent, Result<Loaded, TargetError>) {
    let landed = Ram::new(BLOCKS);
    let (a, b) = channels();
    let mut devices = Devices {
        loaded: 0,
        refuse: false,
    };
    let ram = Arc::clone(&guest.ram);
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let transport =
                InStream::new(Arc::clone(&guest.ram) as _, ZeroPageDetection::default());
            let sent = source(begin(guest, &a, transport)?)?.run(guest);
            if sent.is_err() {
                a.shutdown();
            }
            sent
        });
        let received = target(self::target(&b, &landed))
            .load(&*landed, &mut NoMultifd, &mut devices)
            .and_then(|mut loaded| loaded.confirm().map(|()| loaded));
        if received.is_err() {
            b.shutdown();
        }
        (sender.join().unwrap(), received)
    });
    if received.is_ok() {
        ram.assert_equals(&landed);
    }
    (sent, received)
}

#[test]
fn a_pause_before_the_switchover_lasts_until_the_vmm_ends_it() {
    use SourceEvent::Status;
    let (_, mut guest) = source();
    guest.paused = vec![Control::SwitchOver, Control::Continue, Control::Continue];
    let (sent, received) = between(&mut guest, |s| Ok(s.pausing_before_switchover()), |t| t);
    assert_eq!(sent.unwrap().progress.status, SourceStatus::Device);
    received.unwrap();
    assert!(guest.paused.is_empty() && !guest.running);
    let statuses: Vec<_> = guest
        .events
        .iter()
        .filter(|e| matches!(e, Status(_)))
        .copied()
        .collect();
    assert_eq!(
        statuses,
        [
            SourceStatus::Active,
            SourceStatus::PreSwitchover,
            SourceStatus::Device
        ]
        .map(Status)
    );
    let passes = guest.events.iter().filter_map(|e| match e {
        SourceEvent::Pass(pass) => Some(*pass),
        _ => None,
    });
    assert!(passes.eq(2..=guest.passes.max(2)));
}

#[test]
fn a_migration_cancelled_in_the_pause_leaves_the_guest_running() {
    let (_, mut guest) = source();
    guest.paused = vec![Control::Cancel, Control::Continue];
    let (sent, received) = between(&mut guest, |s| Ok(s.pausing_before_switchover()), |t| t);
    assert!(matches!(sent, Err(SourceError::Cancelled)));
    received.unwrap_err();
    assert!(guest.running);
    let device = SourceEvent::Status(SourceStatus::Device);
    assert!(!guest.events.contains(&device), "nothing was switched over");
}

#[test]
fn a_destination_lost_in_the_pause_ends_it() {
    let (_, mut guest) = source();
    guest.paused = vec![Control::Continue; 10_000];
    let (a, b) = channels();
    let drain = std::thread::spawn(move || {
        let mut b = b;
        let mut buf = [0; 4096];
        // Takes everything until nothing comes any more.
        while b.read(&mut buf).is_ok_and(|n| n > 0) {}
        b.shutdown();
    });
    let transport = InStream::new(Arc::clone(&guest.ram) as _, ZeroPageDetection::default());
    let error = begin(&guest, &a, transport)
        .unwrap()
        .pausing_before_switchover()
        .run(&mut guest)
        .unwrap_err();
    assert!(
        matches!(
            error,
            SourceError::Unconfirmed | SourceError::Stream(_) | SourceError::ReturnPath(_)
        ),
        "{error}"
    );
    assert!(guest.running);
    drain.join().unwrap();
}

#[test]
fn the_guest_stops_only_when_every_device_has_acknowledged() {
    let legacy = || SwitchoverAcks::one_for_all(2);
    let each = || SwitchoverAcks::each(2);
    for (acks, expected) in [
        (legacy(), 1),
        (each(), 2),
        (SwitchoverAcks::one_for_all(0), 1),
        (SwitchoverAcks::each(0), 0),
    ] {
        let (_, mut guest) = source();
        let acks = Arc::new(acks);
        let devices = Arc::clone(&acks);
        let ready = std::thread::spawn(move || {
            let mut count = 0;
            // Later than all memory is sent.
            std::thread::sleep(Duration::from_millis(150));
            while devices.device_is_ready() {
                count += 1;
            }
            count
        });
        let (sent, received) = between(
            &mut guest,
            |s| s.awaiting_switchover_acks(expected),
            |t| t.acknowledging(acks),
        );
        received.unwrap();
        let elapsed = sent.unwrap().progress.elapsed;
        let devices = ready.join().unwrap();
        assert!(devices == 0 || elapsed >= Duration::from_millis(150));
    }
}

#[test]
fn acknowledgements_too_few_or_too_many_fail_the_migration_and_the_guest_goes_on() {
    for (sent, expected) in [(0, 1), (1, 2), (2, 1)] {
        let (_, mut guest) = source();
        let acks = SwitchoverAcks::each(sent);
        while acks.device_is_ready() {}
        let (sent, received) = between(
            &mut guest,
            |s| s.awaiting_switchover_acks(expected),
            |t| t.acknowledging(Arc::new(acks)),
        );
        let error = sent.unwrap_err();
        assert!(
            matches!(
                error,
                SourceError::SwitchoverAckMissing { missing: 1, .. }
                    | SourceError::SurplusSwitchoverAck { expected: 1 }
            ),
            "{error}"
        );
        received.unwrap_err();
        assert!(guest.running);
    }
}

#[test]
fn a_uuid_that_the_source_wants_compared_is_known_where_this_side_has_none() {
    for uuid in [None, Some([7; 16])] {
        let (_, mut guest) = source();
        guest.uuid = uuid;
        let (sent, received) = between(&mut guest, Ok, |t| t);
        sent.unwrap();
        assert_eq!(received.unwrap().configuration().unwrap().uuid, uuid);
    }
}

#[derive(Clone, Default)]
struct Vcpus(Arc<Mutex<Vec<u8>>>);

impl Throttle for Vcpus {
    fn set(&mut self, percentage: u8) {
        self.0.lock().unwrap().push(percentage);
    }
    fn set_dirty_limit(&mut self, limit: Option<std::num::NonZeroU64>) {
        panic!("auto-converge limits no pages: {limit:?}");
    }
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_and_let_go_at_the_switchover() {
    let (_, mut guest) = source();
    guest.writes_left = 1 << 40;
    guest.downtime = Duration::ZERO;
    let vcpus = Vcpus::default();
    let throttle = Box::new(vcpus.clone());
    let config = ThrottleConfig {
        trigger_threshold: 1,
        means: ThrottleMeans::AutoConverge {
            initial: 99,
            increment: 1,
            max: 99,
            tailslow: false,
        },
    };
    let seen = vcpus.clone();
    // The guest is switched over once it is slowed down.
    let watch = std::thread::spawn(move || {
        while seen.0.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    guest.until = Some(watch);
    let (sent, received) = between(
        &mut guest,
        |s| Ok(s.throttling_by(config, throttle).unwrap()),
        |t| t,
    );
    received.unwrap();
    assert_eq!(sent.unwrap().progress.throttle, 0);
    assert_eq!(*vcpus.0.lock().unwrap(), [99, 0]);
}
