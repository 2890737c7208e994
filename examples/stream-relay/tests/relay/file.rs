//! Files: a stream in one piece, and pages that have their places.

use std::fs::{self, File};
use std::num::NonZeroU8;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use migration_stream::io::open_direct;
use stream_relay::Access;
use stream_relay::incoming::{Incoming, IncomingConfig};
use stream_relay::outgoing::{self, OutgoingConfig, OutgoingError};
use stream_relay::progress::Progress;

use crate::guest::{assert_same, guest};
use crate::rig::{incoming, outgoing_to, zlib};

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
