//! What a hostile tail costs: its bytes are passed over a few times, however many sections it has and
//! however wrong its descriptions are about their lengths.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::time::{Duration, Instant};

use migration_stream::raw::codec::Reader;
use migration_stream::raw::device_blob::{DeviceSection, encode_device_blob};
use migration_stream::raw::opaque_tail::{Fed, OpaqueTail};
use migration_stream::raw::section::{Announcement, encode_footer, encode_vm_description};
use migration_stream::{IdStr, InstanceId, SectionHeader, SectionId, Tail, TailError, TailLimits};

const SECTIONS: u32 = 2000;
/// A pass over all bytes takes a fraction of a second without optimisation; one for each section, an
/// hour.
const DEADLINE: Duration = Duration::from_secs(60);

fn header(n: u32) -> SectionHeader {
    SectionHeader {
        kind: Announcement::Full,
        id: SectionId(n + 4),
        idstr: IdStr::new("device").unwrap(),
        instance: InstanceId(n),
        version: 1,
    }
}

/// Sections of `len` bytes each, and EOF.
fn blob(len: impl Fn(u32) -> usize) -> Vec<u8> {
    let bodies: Vec<_> = (0..SECTIONS).map(|n| vec![0x7e; len(n)]).collect();
    let sections = (0..SECTIONS).zip(&bodies).map(|(n, body)| DeviceSection {
        header: header(n),
        body,
    });
    let mut out = Vec::new();
    encode_device_blob(sections, &mut out);
    out
}

/// Appends a description that says `len` bytes of each section.
fn describe(len: usize, out: &mut Vec<u8>) {
    let devices: Vec<_> = (0..SECTIONS)
        .map(|n| {
            format!(
                r#"{{"name":"device","instance_id":{n},"version":1,"fields":[{{"size":{len}}}]}}"#
            )
        })
        .collect();
    let text = format!(r#"{{"page_size":4096,"devices":[{}]}}"#, devices.join(","));
    encode_vm_description(text.len().try_into().unwrap(), out);
    out.extend_from_slice(text.as_bytes());
}

#[test]
fn sections_that_are_all_described_wrongly_cost_one_search() {
    let mut bytes = blob(|n| 1000 + n as usize % 7);
    describe(3, &mut bytes);
    let begun = Instant::now();
    let tail = Tail::decode(&bytes, TailLimits::default()).unwrap();
    let lens: Vec<_> = tail.sections().map(|s| s.body.len()).collect();
    assert!(
        lens.iter()
            .zip(0u32..)
            .all(|(len, n)| *len == 1000 + n as usize % 7)
    );
    assert_eq!(lens.len(), SECTIONS as usize);
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[test]
fn later_sections_that_all_changed_their_lengths_cost_one_search() {
    let mut bytes = blob(|_| 8);
    describe(8, &mut bytes);
    let tail = Tail::decode(&bytes, TailLimits::default()).unwrap();
    let begun = Instant::now();
    let later = tail.followed_by(&blob(|_| 1001)).unwrap();
    assert!(later.sections().all(|s| s.body.len() == 1001));
    assert!(begun.elapsed() < DEADLINE, "{:?}", begun.elapsed());
}

#[test]
fn ends_of_sections_without_number_are_refused() {
    let mut bytes = Vec::new();
    encode_footer(SectionId(4), &mut bytes);
    header(1).encode(&mut bytes);
    let body = bytes.repeat(20_000);
    let mut bytes = Vec::new();
    let section = DeviceSection {
        header: header(0),
        body: &body,
    };
    encode_device_blob([section], &mut bytes);
    let text = r#"{"page_size":4096,"devices":[{"name":"device","instance_id":0,"version":1}]}"#;
    encode_vm_description(text.len().try_into().unwrap(), &mut bytes);
    bytes.extend_from_slice(text.as_bytes());
    let error = Tail::decode(&bytes, TailLimits::default()).unwrap_err();
    assert!(matches!(error, TailError::TooManyEnds { .. }), "{error}");
}

#[test]
fn descriptions_without_number_that_want_a_search_are_refused() {
    let mut bytes = Vec::new();
    header(0).encode(&mut bytes);
    let body = bytes.len();
    for n in 0..10 {
        bytes.extend_from_slice(b"state");
        encode_footer(SectionId(n), &mut bytes);
        bytes.push(0);
        let text = r#"{"page_size":4096,"devices":[{"name":"device","instance_id":0}]}"#;
        encode_vm_description(text.len().try_into().unwrap(), &mut bytes);
        bytes.extend_from_slice(text.as_bytes());
    }
    let mut r = Reader::new(&bytes[1..], 1);
    let header = SectionHeader::decode(Announcement::Full, &mut r).unwrap();
    let mut tail = OpaqueTail::beginning_with(&header, TailLimits::default());
    let error = match tail.feed(&bytes[body..]) {
        Ok(Fed::NeedMore | Fed::Complete { .. }) => panic!("{:?}", tail.rejected()),
        Err(error) => error,
    };
    assert!(
        matches!(error, TailError::TooManySearches { max: 4 }),
        "{error}"
    );
}
