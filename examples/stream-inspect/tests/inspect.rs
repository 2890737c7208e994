//! Streams that no QEMU is needed for: with differences of pages, cut off, and hostile.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::fs;
use std::path::Path;
use std::sync::Arc;

use migration_stream::io::PositionedFile;
use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::header;
use migration_stream::raw::ram::{RAM_IDSTR, RAM_VERSION, encode_setup_list};
use migration_stream::raw::section::Announcement;
use migration_stream::{Configuration, DecoderConfig, MachineName, StreamReader};
use stream_inspect::extract::Extract;
use stream_inspect::inspection::{Inspection, Part};
use stream_inspect::report::Report;
use stream_inspect::scan::{FileOrigin, ScanError, scan};
use stream_inspect::state;

mod streams;

use streams::{DEVICE, RAM, section, whole as stream};

fn inspect(bytes: &[u8], extract: Option<&Path>) -> Result<Inspection, ScanError> {
    let file = tempfile::tempfile().unwrap();
    file.write_at(0, bytes).unwrap();
    let (mut origin, reader): (FileOrigin, StreamReader) = FileOrigin::open(Arc::new(file), 0);
    let mut extract = extract.map(|dir| Extract::into(dir).unwrap());
    scan(reader, &mut origin, 64 << 20, extract.as_mut(), &mut |_| ())
}

#[test]
fn every_record_counts_where_it_belongs() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = stream();
    let found = inspect(&bytes, Some(dir.path())).unwrap();
    let block = &found.blocks[0];
    assert_eq!(
        (block.normal, block.zero, block.xbzrle, block.unique),
        (3, 1, 1, 3)
    );
    assert_eq!(found.total().bytes, bytes.len() as u64);
    // A section's header of 4 + 6 bytes more than its idstr, 4 bytes of body, footer; then EOF.
    assert_eq!(found.part(Part::Devices).bytes, 1 + 4 + 7 + 8 + 4 + 5 + 1);
    assert_eq!(found.ram_sections, 2);
    assert_eq!(
        state::text(&state::state(&found).unwrap()).unwrap(),
        r#"{
    "ram (2)": {
        "section sizes": {
            "ram": "0x0000000000008000"
        }
    },
    "device (3)": {
        "level": "0x00000102"
    }
}"#
    );
    let report = Report::new(&found).text(true).unwrap();
    assert!(report.contains("pc-q35-11.1"), "{report}");
    assert!(
        report.ends_with("\ndevice\n  level = 0x00000102\n"),
        "{report}"
    );

    let mut expected = vec![0; 8 << 12];
    expected[1 << 12..2 << 12].fill(7);
    expected[(1 << 12) + 4] = 0xee;
    expected[2 << 12..3 << 12].fill(9);
    assert!(fs::read(dir.path().join("ram")).unwrap() == expected);
}

#[test]
fn a_stream_that_breaks_off_anywhere_is_an_error_that_says_where() {
    let bytes = stream();
    let description = bytes.windows(2).rposition(|w| w == b"\x06\0").unwrap();
    for len in (0..200).chain(4000..4100).chain(12_400..bytes.len()) {
        match inspect(&bytes[..len], None) {
            Err(ScanError::Stream { offset, .. }) => assert!(offset <= len as u64),
            // Up to EOF it is the stream of a source that sends no description.
            Ok(found) => {
                assert!(found.description.is_empty());
                assert_eq!(len, description, "of {} bytes", bytes.len());
            }
            Err(other) => panic!("{len}: {other:?}"),
        }
    }
}

#[test]
fn a_file_of_anything_else_is_refused() {
    for bytes in [
        &b"QEVM\0\0\0\x02"[..],
        b"\x7fELF\x02\x01\x01\0",
        b"QEVM\0\0\0\x03\x09",
    ] {
        assert!(matches!(inspect(bytes, None), Err(ScanError::Decode(_))));
    }
    // A device before RAM whose length nothing says.
    let mut early = Vec::new();
    header::encode(&mut early);
    Configuration::new(MachineName::new("pc").unwrap()).encode(&mut early);
    section(Announcement::Full, DEVICE, "early", 1, &mut early);
    early.resize(early.len() + 100, 0);
    let error = inspect(&early, None).unwrap_err();
    assert!(matches!(error, ScanError::Early { .. }), "{error:?}");
}

#[test]
fn a_name_that_leads_out_of_the_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = RamBlockTable::new(vec![RamBlock::new("../ram", 1 << 12).unwrap()]).unwrap();
    let mut bytes = Vec::new();
    header::encode(&mut bytes);
    Configuration::new(MachineName::new("pc").unwrap()).encode(&mut bytes);
    section(Announcement::Start, RAM, RAM_IDSTR, RAM_VERSION, &mut bytes);
    encode_setup_list(&blocks, &mut bytes);
    let inner = dir.path().join("inner");
    let error = inspect(&bytes, Some(&inner)).unwrap_err();
    assert!(matches!(error, ScanError::Extract(_)), "{error:?}");
    assert!(!dir.path().join("ram").exists());
}

#[test]
fn the_longest_description_is_that_of_the_decoder() {
    // A description that is said to be longer than the limit is not waited for.
    let mut bytes = stream();
    let json = bytes.windows(2).rposition(|w| w == b"\x06\0").unwrap();
    let len = DecoderConfig::DEFAULT_MAX_DESCRIPTION + 1;
    bytes[json + 1..json + 5].copy_from_slice(&len.to_be_bytes());
    assert!(inspect(&bytes, None).is_err());
}
