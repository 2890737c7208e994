//! A guest through the relay without any QEMU: the relay's own sender is the source, its own receiver
//! the destination.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::fs::{self, File};
use std::net::TcpListener;
use std::num::NonZeroU8;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use migration_stream::GuestRam;
use migration_stream::codec::IdStr;
use migration_stream::configuration::{Configuration, MAPPED_RAM, MachineName};
use migration_stream::dirty_bitmap::{
    self, BitmapFlags, BitmapSections, Chunk, DirtyBitmapEncoder,
};
use migration_stream::io::open_direct;
use migration_stream::machine::MachineVersion;
use migration_stream::opaque_tail::{Tail, TailLimits};
use migration_stream::precopy::SourceError;
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable, ZeroPageDetection};
use migration_stream::section::{Continuation, SectionId, encode_continuation, encode_footer};
use multifd::{ChannelCount, Compression, ZlibLevel, ZstdLevel};
use stream_relay::endpoint::Endpoint;
use stream_relay::guest::{Devices, Guest};
use stream_relay::incoming::{Incoming, IncomingConfig, IncomingError};
use stream_relay::memory::{HoldError, Memory};
use stream_relay::outgoing::{self, OutgoingConfig, OutgoingError};
use stream_relay::progress::{Figures, Progress};
use stream_relay::relay::{Origin, Relay, RelayError, Report};
use stream_relay::store::{self, StoreError};
use stream_relay::{Access, Channels};

const TAIL: &[u8] = include_bytes!("../../../migration-stream/tests/data/microvm-11.1.3.tail");
const PAGE: usize = 4096;
const PAGES: usize = 700;

/// Two dirty bitmaps of a disk, as a source sends them.
fn bitmaps() -> Vec<u8> {
    let (mut out, id) = (Vec::new(), SectionId(0));
    let mut encoder = DirtyBitmapEncoder::new();
    let name = |name: &str| IdStr::new(name).unwrap();
    let end = |out: &mut Vec<u8>| {
        Chunk::end().encode(out);
        encode_footer(id, out);
    };
    dirty_bitmap::header(id).encode(&mut out);
    for bitmap in ["nightly", "weekly"] {
        let flags = BitmapFlags::default();
        encoder
            .start(&name("disk0"), &name(bitmap), 512, flags, &mut out)
            .unwrap();
    }
    end(&mut out);
    encode_continuation(Continuation::End, id, &mut out);
    encoder.bits(0, 0, 64, &[0xff; 8], &mut out).unwrap();
    encoder.complete(0, &mut out).unwrap();
    encoder.complete(1, &mut out).unwrap();
    end(&mut out);
    out
}

/// Every third page is zero; the others differ.
fn guest(machine: &str) -> Guest {
    let blocks = RamBlockTable::new(vec![
        RamBlock::new("pc.ram", (PAGES * PAGE) as u64).unwrap(),
        RamBlock::new("vga.rom", 2 * PAGE as u64).unwrap(),
    ]);
    let memory = Memory::new(blocks.unwrap(), u64::MAX, Arc::default()).unwrap();
    for page in (0..PAGES).filter(|p| p % 3 != 0) {
        let all = memory.slice(BlockId::new(0), 0, PAGES * PAGE).unwrap();
        let bytes: Vec<u8> = (0..PAGE)
            .map(|i| (i * page / 16).to_le_bytes()[0] | 1)
            .collect();
        all.subslice(page * PAGE, PAGE).unwrap().copy_from(&bytes);
    }
    let rom = memory.slice(BlockId::new(1), PAGE as u64, 3).unwrap();
    rom.copy_from(b"rom");
    let mut configuration = Configuration::new(MachineName::new(machine).unwrap());
    configuration.uuid = Some([7; 16]);
    Guest {
        memory: Arc::new(memory),
        configuration: configuration.with(MAPPED_RAM),
        devices: Devices {
            tail: Tail::decode(TAIL, TailLimits::default()).unwrap(),
            bitmaps: BitmapSections::decode(&bitmaps()).unwrap(),
        },
    }
}

fn bytes(guest: &Guest) -> Vec<Vec<u8>> {
    let blocks = guest.memory.blocks().iter();
    blocks
        .map(|(id, block)| {
            let len = usize::try_from(block.used_length()).unwrap();
            let mut bytes = vec![0; len];
            guest.memory.slice(id, 0, len).unwrap().copy_to(&mut bytes);
            bytes
        })
        .collect()
}

fn assert_same(a: &Guest, b: &Guest) {
    assert_eq!(a.memory.blocks(), b.memory.blocks());
    assert!(bytes(a) == bytes(b), "memory differs");
    assert_eq!(a.configuration.machine, b.configuration.machine);
    assert_eq!(a.configuration.uuid, b.configuration.uuid);
    let (ours, theirs) = (&a.devices, &b.devices);
    assert_eq!(ours.tail.description_text(), theirs.tail.description_text());
    assert_eq!(ours.bitmaps.bitmaps().len(), 2);
    let sections = |g: &Guest| {
        let mut bytes = Vec::new();
        g.devices.bitmaps.encode_sections(SectionId(0), &mut bytes);
        bytes
    };
    assert_eq!(sections(a), sections(b));
    let bodies = |g: &Guest| -> Vec<Vec<u8>> {
        g.devices.tail.sections().map(|s| s.body.to_vec()).collect()
    };
    assert_eq!(bodies(a), bodies(b));
}

fn incoming(from: &str, channels: Option<Channels>) -> IncomingConfig {
    IncomingConfig {
        from: from.parse().unwrap(),
        channels,
        access: Access::default(),
        xbzrle: false,
        machine_version: None,
        uuid: [0; 16],
        max_memory: 1 << 30,
        without_return_path: false,
        timeout: Duration::from_secs(20),
    }
}

fn outgoing_to(to: &str, channels: Option<Channels>) -> OutgoingConfig {
    OutgoingConfig {
        to: to.parse().unwrap(),
        channels,
        mapped_ram: None,
        zero_pages: ZeroPageDetection::Legacy,
        max_bandwidth: 0,
        machine_version: None,
        uuid: [0; 16],
        timeout: Duration::from_secs(20),
    }
}

/// A listener on a port of its own, and its address.
fn listen(channels: Option<Channels>) -> (Incoming, String) {
    let incoming = Incoming::open(incoming("tcp:127.0.0.1:0", channels)).unwrap();
    let address = incoming.address().unwrap().to_string();
    (incoming, address)
}

fn relay(from: Incoming, store: Option<&Path>, to: Option<OutgoingConfig>) -> Relay {
    Relay {
        from: Origin::Source(Box::new(from)),
        store: store.map(Into::into),
        to,
        remove_store: false,
    }
}

fn zstd(count: u8) -> Option<Channels> {
    Some(Channels {
        count: ChannelCount::new(count).unwrap(),
        compression: Compression::Zstd(ZstdLevel::default()),
    })
}

fn zlib(count: u8) -> Option<Channels> {
    Some(Channels {
        count: ChannelCount::new(count).unwrap(),
        compression: Compression::Zlib(ZlibLevel::default()),
    })
}

type Sending<'a> = ScopedJoinHandle<'a, Result<Figures, OutgoingError>>;

fn send_from<'a>(
    scope: &'a thread::Scope<'a, '_>,
    guest: &'a Guest,
    to: OutgoingConfig,
) -> Sending<'a> {
    scope.spawn(move || outgoing::send(guest, &to, &Progress::default()))
}

fn expect_figures(report: Report) {
    // The two thirds of memory that are not zero, and the page of the rom.
    let content = PAGES as u64 - PAGES.div_ceil(3) as u64 + 1;
    for figures in [report.received, report.sent].into_iter().flatten() {
        // Each page once, passed on as it comes or not.
        assert_eq!(figures.pages, content);
        assert_eq!(figures.pages + figures.zero_pages, PAGES as u64 + 2);
        assert!(figures.bytes > 0 && figures.mib_per_second() > 0.0);
    }
}

#[test]
fn every_transport_is_changed_into_every_other_and_nothing_of_the_guest() {
    for machine in ["microvm", "pc-q35-9.2", "pc-i440fx-7.2"] {
        let guest = guest(machine);
        for (a, b) in [
            (None, None),
            (None, zstd(2)),
            (zstd(3), None),
            (zlib(2), zstd(1)),
        ] {
            let (relayed, to_relay) = listen(a);
            let (destination, to_destination) = listen(b);
            let taken = thread::scope(|scope| {
                let source = send_from(scope, &guest, outgoing_to(&to_relay, a));
                let relaying = scope.spawn(|| {
                    relay(relayed, None, Some(outgoing_to(&to_destination, b))).run(&Arc::default())
                });
                let received = destination.receive(&Arc::default()).unwrap();
                let taken = received.guest.clone();
                received.confirm().unwrap();
                expect_figures(relaying.join().unwrap().unwrap());
                source.join().unwrap().unwrap();
                taken
            });
            assert_same(&guest, &taken);
        }
    }
}

#[test]
fn a_destination_that_refuses_leaves_the_guest_at_its_source() {
    let guest = guest("microvm");
    let (relayed, to_relay) = listen(None);
    let (destination, to_destination) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let relaying = scope.spawn(|| {
            relay(relayed, None, Some(outgoing_to(&to_destination, None))).run(&Arc::default())
        });
        destination.receive(&Arc::default()).unwrap().refuse();
        let error = relaying.join().unwrap().unwrap_err();
        assert!(matches!(error, RelayError::Outgoing(_)), "{error}");
        let error = source.join().unwrap().unwrap_err();
        let OutgoingError::Stream(SourceError::Refused { status: 1 }) = error else {
            panic!("{error:?}");
        };
    });
}

#[test]
fn a_destination_that_says_nothing_may_have_the_guest_and_the_relay_says_so() {
    let guest = guest("microvm");
    let (relayed, to_relay) = listen(None);
    let (destination, to_destination) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let relaying = scope.spawn(|| {
            relay(relayed, None, Some(outgoing_to(&to_destination, None))).run(&Arc::default())
        });
        drop(destination.receive(&Arc::default()).unwrap());
        let error = relaying.join().unwrap().unwrap_err();
        assert!(matches!(error, RelayError::Uncertain(_)), "{error}");
        assert!(source.join().unwrap().is_err());
    });
}

#[test]
fn a_destination_that_is_not_there_stops_no_guest() {
    let guest = guest("microvm");
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let to = outgoing_to(&format!("tcp:{nobody}"), None);
    for channels in [None, zlib(2)] {
        let (relayed, to_relay) = listen(channels);
        let mut from = outgoing_to(&to_relay, channels);
        // So slow that it could not have ended by itself.
        from.max_bandwidth = 10_000;
        thread::scope(|scope| {
            let source = send_from(scope, &guest, from);
            let error = relay(relayed, None, Some(to.clone())).run(&Arc::default());
            assert!(matches!(error, Err(RelayError::Outgoing(_))), "{error:?}");
            let error = source.join().unwrap().unwrap_err();
            assert!(!matches!(error, OutgoingError::Unconfirmed(_)), "{error}");
        });
    }
}

#[test]
fn a_source_that_breaks_off_leaves_the_destination_without_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let guest = guest("microvm");
    let to = format!("file:{}", path.display());
    outgoing::send(&guest, &outgoing_to(&to, None), &Progress::default()).unwrap();
    let stream = fs::read(&path).unwrap();
    let socket = dir.path().join("socket");
    let mut config = incoming(&format!("unix:{}", socket.display()), None);
    config.without_return_path = true;
    let relayed = Incoming::open(config).unwrap();
    let (destination, to_destination) = listen(None);
    thread::scope(|scope| {
        let relaying = scope.spawn(|| {
            relay(relayed, None, Some(outgoing_to(&to_destination, None))).run(&Arc::default())
        });
        let mut source = UnixStream::connect(&socket).unwrap();
        std::io::Write::write_all(&mut source, &stream[..stream.len() / 2]).unwrap();
        drop(source);
        assert!(destination.receive(&Arc::default()).is_err());
        let error = relaying.join().unwrap().unwrap_err();
        assert!(matches!(error, RelayError::Incoming(_)), "{error}");
    });
}

#[test]
fn a_source_hears_nothing_before_the_destination_has_confirmed() {
    let guest = guest("microvm");
    let (relayed, to_relay) = listen(None);
    let (destination, to_destination) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        scope.spawn(|| {
            relay(relayed, None, Some(outgoing_to(&to_destination, None)))
                .run(&Arc::default())
                .unwrap()
        });
        let received = destination.receive(&Arc::default()).unwrap();
        assert!(received.is_awaited());
        assert!(!source.is_finished());
        received.confirm().unwrap();
        source.join().unwrap().unwrap();
    });
}

#[test]
fn a_guest_is_kept_in_a_store_and_sent_later() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    let guest = guest("pc-q35-11.1");
    let (relayed, to_relay) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        relay(relayed, Some(&kept), None)
            .run(&Arc::default())
            .unwrap();
        source.join().unwrap().unwrap();
    });
    let names = || fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names(), 1, "nothing else is left behind");

    let (destination, to_destination) = listen(zstd(2));
    let sending = Relay {
        from: Origin::Store {
            max_memory: 1 << 30,
        },
        store: Some(kept.clone()),
        to: Some(outgoing_to(&to_destination, zstd(2))),
        remove_store: true,
    };
    let taken = thread::scope(|scope| {
        let relaying = scope.spawn(|| sending.run(&Arc::default()));
        let received = destination.receive(&Arc::default()).unwrap();
        let taken = received.guest.clone();
        received.confirm().unwrap();
        expect_figures(relaying.join().unwrap().unwrap());
        taken
    });
    assert_same(&guest, &taken);
    assert_eq!(names(), 0, "the store is removed");
}

#[test]
fn a_store_that_was_not_given_away_is_still_there() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    let guest = guest("microvm");
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (relayed, to_relay) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let to = Some(outgoing_to(&format!("tcp:{nobody}"), None));
        let mut relaying = relay(relayed, Some(&kept), to);
        relaying.remove_store = true;
        let error = relaying.run(&Arc::default()).unwrap_err();
        assert!(matches!(error, RelayError::Kept(_)), "{error}");
        source.join().unwrap().unwrap();
    });
    assert_same(
        &guest,
        &store::load(&kept, 1 << 30, &Arc::default()).unwrap(),
    );
}

#[test]
fn a_store_that_cannot_be_written_leaves_the_guest_at_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let guest = guest("microvm");
    let (relayed, to_relay) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let missing = dir.path().join("missing").join("kept");
        let error = relay(relayed, Some(&missing), None).run(&Arc::default());
        assert!(matches!(error, Err(RelayError::Save(_))), "{error:?}");
        assert!(source.join().unwrap().is_err());
    });
}

#[test]
fn a_file_is_written_whole_and_is_a_source_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.stream");
    let to = format!("file:{}", path.display());
    let guest = guest("pc-q35-11.1");
    outgoing::send(&guest, &outgoing_to(&to, None), &Progress::default()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let again = outgoing::send(&guest, &outgoing_to(&to, None), &Progress::default());
    assert!(matches!(again, Err(OutgoingError::Exists { .. })));
    let taken = Incoming::open(incoming(&to, None)).unwrap();
    let taken = taken.receive(&Arc::default()).unwrap();
    assert!(!taken.is_awaited());
    assert_same(&guest, &taken.guest);
    for (to, channels) in [
        (format!("{to}x"), zlib(1)),
        (format!("{to}x,offset=8"), None),
    ] {
        let e = outgoing::send(&guest, &outgoing_to(&to, channels), &Progress::default());
        assert!(
            matches!(
                e,
                Err(OutgoingError::ChannelsOfFile | OutgoingError::Offset)
            ),
            "{e:?}"
        );
    }
}

#[test]
fn pages_have_their_places_in_a_file_by_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let guest = guest("pc-q35-11.1");
    // tempfile's directory may be on a file system without direct I/O.
    let probe = dir.path().join("probe");
    fs::write(&probe, b"").unwrap();
    let has_direct = open_direct(&probe, File::options().read(true)).is_ok();
    for (number, threads) in [1, 3, 8].into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        let to = format!("file:{}", path.display());
        let access = Access {
            threads: NonZeroU8::new(threads).unwrap(),
            direct: has_direct,
        };
        let config = OutgoingConfig {
            mapped_ram: Some(access),
            ..outgoing_to(&to, None)
        };
        outgoing::send(&guest, &config, &Progress::default()).unwrap();
        // Each page once, whatever was sent how often; what is zero is a hole.
        let file = fs::metadata(&path).unwrap();
        assert!(file.blocks() * 512 < guest.memory.blocks().total_bytes());
        let config = IncomingConfig {
            access,
            ..incoming(&to, None)
        };
        let received = Incoming::open(config).unwrap().receive(&Arc::default());
        assert_same(&received.unwrap().guest, &guest);
    }
    let config = OutgoingConfig {
        mapped_ram: Some(Access::default()),
        ..outgoing_to("tcp:127.0.0.1:1", None)
    };
    assert!(matches!(config.check(), Err(OutgoingError::NoFile)));
}

#[test]
fn a_source_without_return_path_is_refused_unless_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let guest = guest("microvm");
    // What goes into a file has no return path.
    let to = format!("file:{}", path.display());
    outgoing::send(&guest, &outgoing_to(&to, None), &Progress::default()).unwrap();
    let stream = fs::read(&path).unwrap();
    for is_asked_for in [false, true] {
        let socket = dir.path().join("socket");
        let mut config = incoming(&format!("unix:{}", socket.display()), None);
        config.without_return_path = is_asked_for;
        let relayed = Incoming::open(config).unwrap();
        let taken = thread::scope(|scope| {
            scope.spawn(|| {
                use std::io::Write;
                // The relay may hang up before it has everything.
                let _ = UnixStream::connect(&socket).unwrap().write_all(&stream);
            });
            relayed.receive(&Arc::default())
        });
        assert!(!socket.exists(), "the socket's name is gone");
        match taken {
            Ok(taken) => {
                assert!(is_asked_for && !taken.is_awaited());
                assert_same(&guest, &taken.guest);
            }
            Err(e) => assert!(
                !is_asked_for && matches!(e, IncomingError::NoReturnPath),
                "{e}"
            ),
        }
    }
}

#[test]
fn a_guest_larger_than_may_be_held_runs_on_at_its_source() {
    let guest = guest("microvm");
    let mut config = incoming("tcp:127.0.0.1:0", None);
    config.max_memory = 1 << 20;
    let relayed = Incoming::open(config).unwrap();
    let to_relay = relayed.address().unwrap().to_string();
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let error = relayed.receive(&Arc::default()).unwrap_err();
        assert!(
            matches!(error, IncomingError::Hold(HoldError::TooLarge { .. })),
            "{error}"
        );
        assert!(source.join().unwrap().is_err());
    });
}

#[test]
fn a_source_that_falls_silent_is_an_error_when_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut config = incoming(&format!("unix:{}", socket.display()), None);
    config.timeout = Duration::from_millis(50);
    let relayed = Incoming::open(config).unwrap();
    let mut silent = UnixStream::connect(&socket).unwrap();
    std::io::Write::write_all(&mut silent, b"QEVM\0\0\0\x03").unwrap();
    let error = relayed.receive(&Arc::default()).unwrap_err();
    assert!(matches!(error, IncomingError::Stream(_)), "{error}");
}

#[test]
fn an_old_machine_without_a_name_for_it_is_told_by_its_version() {
    let version = Some(MachineVersion::new(7, 2));
    let guest = guest("microvm");
    let mut config = incoming("tcp:127.0.0.1:0", zlib(2));
    config.machine_version = version;
    let relayed = Incoming::open(config).unwrap();
    let mut to = outgoing_to(&relayed.address().unwrap().to_string(), zlib(2));
    to.machine_version = version;
    thread::scope(|scope| {
        let source = send_from(scope, &guest, to);
        let received = relayed.receive(&Arc::default()).unwrap();
        assert_same(&guest, &received.guest);
        received.confirm().unwrap();
        source.join().unwrap().unwrap();
    });
}

/// A store, of which a test changes something.
fn stored(change: impl FnOnce(&Path)) -> Result<Guest, StoreError> {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    store::save(&guest("pc-q35-11.1"), &kept, &Progress::default()).unwrap();
    change(&kept);
    store::load(&kept, 1 << 30, &Arc::default())
}

fn in_manifest(kept: &Path, from: &str, to: &str) {
    let path = kept.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(&path, text.replace(from, to)).unwrap();
}

#[test]
fn a_store_gives_back_what_was_saved_and_its_zero_pages_are_holes() {
    use std::os::unix::fs::MetadataExt;
    let taken = stored(|kept| {
        let ram = fs::metadata(kept.join("ram-0")).unwrap();
        assert_eq!(ram.len(), (PAGES * PAGE) as u64);
        assert!(ram.blocks() * 512 < ram.len());
        assert_eq!(ram.mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(kept).unwrap().mode() & 0o777, 0o700);
    });
    assert_same(&guest("pc-q35-11.1"), &taken.unwrap());
}

#[test]
fn a_store_is_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    let progress = Progress::default();
    fs::create_dir(&kept).unwrap();
    store::save(&guest("microvm"), &kept, &progress).unwrap();
    let again = store::save(&guest("microvm"), &kept, &progress);
    assert!(matches!(again, Err(StoreError::Exists { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_store_that_was_changed_is_refused() {
    use StoreError as E;
    let flip = |name: &'static str, at: usize| {
        move |kept: &Path| {
            let mut bytes = fs::read(kept.join(name)).unwrap();
            bytes[at] ^= 1;
            fs::write(kept.join(name), bytes).unwrap();
        }
    };
    let refused = |change: &dyn Fn(&Path)| stored(change).unwrap_err();
    let e = refused(&flip("ram-0", 5 * PAGE + 9));
    assert!(matches!(e, E::Checksum { .. }), "{e}");
    let e = refused(&flip("ram-0", 9));
    assert!(matches!(e, E::Checksum { .. }), "a page that was zero: {e}");
    let e = refused(&flip("devices", 100));
    assert!(matches!(e, E::Checksum { .. }), "{e}");
    let e = refused(&|kept| fs::write(kept.join("ram-1"), b"short").unwrap());
    assert!(matches!(e, E::Length { found: 5, .. }), "{e}");
    let e = refused(&|kept| fs::remove_file(kept.join("ram-1")).unwrap());
    assert!(matches!(e, E::File { .. }), "{e}");
    let e = refused(&|kept| fs::remove_file(kept.join("manifest.json")).unwrap());
    assert!(matches!(e, E::File { .. }), "{e}");
    let e = refused(&|kept| fs::write(kept.join("manifest.json"), b"{}").unwrap());
    assert!(matches!(e, E::Manifest(_)), "{e}");
}

#[test]
fn a_manifest_from_a_stranger_is_not_believed() {
    use StoreError as E;
    let with = |from: &'static str, to: &'static str| {
        stored(|kept| in_manifest(kept, from, to)).unwrap_err()
    };
    let e = with("\"version\": 1", "\"version\": 2");
    assert!(matches!(e, E::Version { found: 2 }), "{e}");
    let e = with("\"version\": 1", "\"version\": 1, \"more\": 1");
    assert!(matches!(e, E::Manifest(_)), "{e}");
    let e = with("\"length\": 2867200", "\"length\": 9223372036854771712");
    assert!(matches!(e, E::Hold(_) | E::Blocks(_)), "{e}");
    let e = with("\"length\": 2867200", "\"length\": 2867201");
    assert!(matches!(e, E::Blocks(_)), "{e}");
    let e = with("\"length\": 2867200", "\"length\": 4096");
    assert!(matches!(e, E::Length { .. }), "{e}");
    let e = with("vga.rom", "pc.ram");
    assert!(matches!(e, E::Blocks(_)), "{e}");
    let e = with("pc-q35-11.1", "");
    assert!(matches!(e, E::Machine(_)), "{e}");
    let e = with("mapped-ram", "x-ignore-shared");
    assert!(
        matches!(
            e,
            E::Field {
                field: "capabilities",
                ..
            }
        ),
        "{e}"
    );
    let e = with("07070707", "0707070");
    assert!(matches!(e, E::Field { field: "uuid", .. }), "{e}");
    let e = stored(|kept| {
        let file = fs::File::create(kept.join("manifest.json")).unwrap();
        file.set_len(1 << 40).unwrap();
    });
    assert!(matches!(e, Err(E::TooLong { .. })), "{e:?}");
}

#[test]
fn a_store_does_not_lead_elsewhere_and_does_not_block() {
    let e = stored(|kept| {
        let ram = kept.join("ram-0");
        fs::rename(&ram, kept.join("elsewhere")).unwrap();
        symlink("elsewhere", &ram).unwrap();
    });
    assert!(matches!(e, Err(StoreError::File { .. })), "{e:?}");
    let e = stored(|kept| {
        let devices = kept.join("devices");
        fs::remove_file(&devices).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &devices,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
    });
    assert!(matches!(e, Err(StoreError::NotAFile { .. })), "{e:?}");
}

#[test]
fn nothing_is_done_without_a_place_for_the_guest() {
    let (relayed, _) = listen(None);
    let error = relay(relayed, None, None).run(&Arc::default()).unwrap_err();
    assert!(matches!(error, RelayError::Nothing));
    let file: Endpoint = "file:Cargo.toml".parse().unwrap();
    let to = OutgoingConfig {
        to: file,
        ..outgoing_to("tcp::1", None)
    };
    let (relayed, _) = listen(None);
    let error = relay(relayed, None, Some(to))
        .run(&Arc::default())
        .unwrap_err();
    assert!(
        matches!(error, RelayError::Outgoing(OutgoingError::Exists { .. })),
        "{error}"
    );
}
