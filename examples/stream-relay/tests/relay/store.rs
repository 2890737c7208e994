//! A guest that is kept: what a store gives back, and what it refuses.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use stream_relay::guest::Guest;
use stream_relay::progress::Progress;
use stream_relay::relay::{Origin, Relay, RelayError};
use stream_relay::store::{self, StoreError};

use crate::guest::{PAGE, PAGES, assert_same, guest};
use crate::rig::{expect_figures, listen, nobody, outgoing_to, relay, send_from, zstd};

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
            max_device_state: 64 << 20,
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
    let (relayed, to_relay) = listen(None);
    thread::scope(|scope| {
        let source = send_from(scope, &guest, outgoing_to(&to_relay, None));
        let to = Some(outgoing_to(&nobody(), None));
        let mut relaying = relay(relayed, Some(&kept), to);
        relaying.remove_store = true;
        let error = relaying.run(&Arc::default()).unwrap_err();
        assert!(matches!(error, RelayError::Kept(_)), "{error}");
        source.join().unwrap().unwrap();
    });
    assert_same(
        &guest,
        &store::load(&kept, 1 << 30, 64 << 20, &Arc::default()).unwrap(),
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

/// A store, of which a test changes something.
fn stored(change: impl FnOnce(&Path)) -> Result<Guest, StoreError> {
    let dir = tempfile::tempdir().unwrap();
    let kept = dir.path().join("kept");
    store::save(&guest("pc-q35-11.1"), &kept, &Progress::default()).unwrap();
    change(&kept);
    store::load(&kept, 1 << 30, 64 << 20, &Arc::default())
}

fn in_manifest(kept: &Path, from: &str, to: &str) {
    let path = kept.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    fs::write(&path, text.replace(from, to)).unwrap();
}

#[test]
fn a_store_gives_back_what_was_saved_and_its_zero_pages_are_holes() {
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
    let e = with("\"page_bits\": null", "\"page_bits\": 13");
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
