//! The tail of a stream with unknown devices, on device sections and description of a q35 and a
//! microvm as QEMU 11.1.3 sends them (from the first FULL section on; no guest memory is in them).
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use migration_stream::io::PositionedFile;
use migration_stream::raw::codec::Reader;
use migration_stream::raw::device_blob::{DeviceSection, encode_device_blob};
use migration_stream::raw::opaque_tail::{Fed, OpaqueTail, tail_at_end};
use migration_stream::raw::section::{
    Announcement, encode_eof, encode_footer, encode_vm_description,
};
use migration_stream::{IdStr, InstanceId, SectionHeader, SectionId, Tail, TailError, TailLimits};

const Q35: &[u8] = include_bytes!("data/q35-11.1.3.tail");
const MICROVM: &[u8] = include_bytes!("data/microvm-11.1.3.tail");

/// A collector that has the first header, and the bytes after that header.
fn begin(bytes: &[u8], limits: TailLimits) -> (OpaqueTail, &[u8]) {
    let mut r = Reader::new(&bytes[1..], 1);
    let header = SectionHeader::decode(Announcement::Full, &mut r).unwrap();
    (OpaqueTail::beginning_with(&header, limits), r.rest())
}

/// Feeds `bytes` in pieces; the tail, and how many of the bytes it took.
fn feed(bytes: &[u8], piece: usize) -> Result<Option<(Tail, usize)>, TailError> {
    let (mut tail, rest) = begin(bytes, TailLimits::default());
    let mut fed = bytes.len() - rest.len();
    for piece in rest.chunks(piece) {
        match tail.feed(piece)? {
            Fed::NeedMore => fed += piece.len(),
            Fed::Complete { consumed, tail } => return Ok(Some((tail, fed + consumed))),
        }
    }
    Ok(None)
}

#[test]
fn every_section_is_found_and_the_tail_is_the_same_bytes() {
    for (bytes, sections) in [(Q35, 29), (MICROVM, 14)] {
        let (tail, taken) = feed(bytes, 1000).unwrap().unwrap();
        assert_eq!(taken, bytes.len());
        assert_eq!(tail.as_bytes(), bytes);
        assert_eq!(tail.sections().len(), sections);
        assert_eq!(tail.description().page_size, 4096);
        let mut again = Vec::new();
        for (section, described) in tail.sections().zip(&tail.description().devices) {
            assert_eq!(section.header.idstr, described.idstr);
            assert_eq!(section.body.len() as u64, described.body_len);
            section.encode(&mut again);
        }
        encode_eof(&mut again);
        assert!(bytes.starts_with(&again));
    }
}

#[test]
fn the_devices_are_those_of_the_machine() {
    let (tail, _) = feed(Q35, 4096).unwrap().unwrap();
    let names: Vec<_> = tail
        .sections()
        .map(|s| s.header.idstr.to_string())
        .collect();
    assert_eq!(names.first().unwrap(), "apic");
    assert_eq!(names.last().unwrap(), "globalstate");
    let timer = tail.sections().find(|s| s.header.idstr.as_str() == "timer");
    let timer = timer.unwrap();
    assert_eq!((timer.header.version, timer.body.len()), (2, 24));
    assert_eq!(timer.header.instance, InstanceId(0));
}

#[test]
fn a_tail_that_was_kept_is_read_again_and_nothing_else_is() {
    for bytes in [Q35, MICROVM] {
        let tail = Tail::decode(bytes, TailLimits::default()).unwrap();
        assert_eq!(tail.as_bytes(), bytes);
        let text = tail.description_text();
        assert!(text.starts_with('{') && bytes.ends_with(text.as_bytes()));
        let mut again = Vec::new();
        let first = tail.sections().next().unwrap().header.id;
        tail.encode_sections(first, &mut again);
        assert_eq!(again[..100], bytes[..100]);
        assert_eq!(again.len() + 5 + text.len(), bytes.len());
        let mut ids = Vec::new();
        tail.encode_sections(SectionId(2), &mut ids);
        assert_eq!((again.len(), &ids[..5]), (ids.len(), &[4, 0, 0, 0, 2][..]));
    }
    let refused = |bytes: &[u8]| Tail::decode(bytes, TailLimits::default()).unwrap_err();
    assert!(matches!(refused(b""), TailError::Frame(_)));
    assert!(matches!(refused(b"\x01"), TailError::Frame(_)));
    let short = refused(&Q35[..Q35.len() - 1]);
    assert!(matches!(short, TailError::Incomplete { .. }), "{short}");
    let long = refused(&[MICROVM, b"\0"].concat());
    let at = MICROVM.len();
    assert!(
        matches!(long, TailError::NotDescribed { offset, len: 1 } if offset == at),
        "{long}"
    );
}

#[test]
fn what_comes_after_the_tail_is_left_to_others() {
    // COLO's first message follows on the same connection.
    let bytes = [MICROVM, &[0, 0, 0, 1]].concat();
    for piece in [1, 7, 4096, bytes.len()] {
        let (tail, taken) = feed(&bytes, piece).unwrap().unwrap();
        assert_eq!(taken, MICROVM.len());
        assert_eq!(tail.as_bytes(), MICROVM);
    }
}

#[test]
fn a_tail_without_its_last_byte_is_not_complete() {
    assert!(feed(&MICROVM[..MICROVM.len() - 1], 4096).unwrap().is_none());
}

/// The microvm's tail with `end` at the beginning of its first body that has the room.
fn with_false_end(end: &[u8]) -> Vec<u8> {
    let (tail, _) = feed(MICROVM, MICROVM.len()).unwrap().unwrap();
    let body = tail
        .sections()
        .map(|s| s.body)
        .find(|body| body.len() >= end.len())
        .unwrap();
    let at = body.as_ptr() as usize - tail.as_bytes().as_ptr() as usize;
    let mut bytes = MICROVM.to_vec();
    bytes[at..at + end.len()].copy_from_slice(end);
    bytes
}

#[test]
fn what_only_looks_like_the_end_is_passed_over() {
    // One whose text is complete, and one that would never be.
    for len in [3u8, 255] {
        let bytes = with_false_end(&[0x7e, 0, 0, 0, 1, 0, 6, 0, 0, 0, len, b'{']);
        for piece in [1, 4096, bytes.len()] {
            let (tail, taken) = feed(&bytes, piece).unwrap().unwrap();
            assert_eq!(taken, bytes.len());
            assert_eq!(tail.as_bytes(), bytes);
        }
    }
}

#[test]
fn a_body_that_is_not_as_long_as_described_is_found_by_its_footer() {
    let text = String::from_utf8(MICROVM[MICROVM.len() - 15317..].to_vec()).unwrap();
    assert!(text.starts_with(r#"{"configuration""#));
    // The description now says 9 bytes too many for the timer's first field.
    let field = r#"{"name": "cpu_ticks_offset", "type": "int64", "size": 8}"#;
    let changed = text.replacen(field, &field.replace("\"size\": 8", "\"size\":17"), 1);
    assert_ne!(text, changed);
    let bytes = [&MICROVM[..MICROVM.len() - text.len()], changed.as_bytes()].concat();
    let (tail, _) = feed(&bytes, 4096).unwrap().unwrap();
    let timer = tail.sections().find(|s| s.header.idstr.as_str() == "timer");
    assert_eq!(timer.unwrap().body.len(), 24);
}

#[test]
fn a_description_of_other_devices_does_not_end_the_tail_and_that_is_explained() {
    let mut bytes = MICROVM.to_vec();
    let at = bytes.windows(8).rposition(|w| w == b"\"fw_cfg\"").unwrap();
    // The last mention is the vmsd's name; the device's is before it.
    let at = bytes[..at]
        .windows(8)
        .rposition(|w| w == b"\"fw_cfg\"")
        .unwrap();
    bytes[at + 1] = b'g';
    let (mut tail, rest) = begin(&bytes, TailLimits::default());
    assert!(matches!(tail.feed(rest), Ok(Fed::NeedMore)));
    let why = tail.rejected().unwrap().to_string();
    assert!(why.contains("'gw_cfg'") || why.contains("'timer'"), "{why}");
}

#[test]
fn c19_a_tail_is_refused_beyond_its_limits() {
    let limits = TailLimits {
        len: 4096,
        ..TailLimits::default()
    };
    let (mut tail, rest) = begin(Q35, limits);
    let e = rest
        .chunks(1024)
        .find_map(|piece| tail.feed(piece).err())
        .unwrap();
    assert!(matches!(e, TailError::TooLong { max: 4096, .. }));

    let (mut tail, _) = begin(Q35, TailLimits::default());
    let end = [0x7e, 0, 0, 0, 1, 0, 6, 0, 0, 0, 255, b'{'];
    let e = tail.feed(&end.repeat(100)).unwrap_err();
    assert!(matches!(e, TailError::FalseEnds { max: 64 }));
}

#[test]
fn a_section_that_came_before_ram_is_described_and_not_in_the_tail() {
    // The first section of the capture, as if it had come early.
    let first = Tail::decode(MICROVM, TailLimits::default()).unwrap();
    let first = first.sections().next().unwrap();
    let mut head = Vec::new();
    first.encode(&mut head);
    let rest = &MICROVM[head.len()..];
    let feed = |early| {
        let (tail, body) = begin(rest, TailLimits::default());
        let mut tail = tail.after_early(early);
        let fed = tail.feed(body).unwrap();
        (fed, tail)
    };
    match feed(1) {
        (Fed::Complete { tail, .. }, _) => {
            assert_eq!(tail.sections().len(), 13);
            assert_eq!(tail.description().devices.len(), 14);
        }
        (Fed::NeedMore, tail) => panic!("{:?}", tail.rejected()),
    }
    for early in [0, 2, 100] {
        let (fed, tail) = feed(early);
        assert!(matches!(fed, Fed::NeedMore), "{early}");
        assert!(tail.rejected().is_some(), "{early}");
    }
}

/// The microvm's sections and EOF, with `change` made to the list of their headers and bodies.
fn later(change: impl FnOnce(&mut Vec<(SectionHeader, Vec<u8>)>)) -> (Tail, Vec<u8>) {
    let tail = Tail::decode(MICROVM, TailLimits::default()).unwrap();
    let sections = tail.sections().map(|s| (s.header, s.body.to_vec()));
    let mut sections: Vec<_> = sections.collect();
    change(&mut sections);
    let mut blob = Vec::new();
    let sections = sections.iter().map(|(header, body)| DeviceSection {
        header: header.clone(),
        body,
    });
    encode_device_blob(sections, &mut blob);
    (tail, blob)
}

#[test]
fn what_the_source_sends_later_without_a_description_is_split_like_what_it_sent_before() {
    let (tail, blob) = later(|sections| sections[3].1.fill(0x7e));
    let next = tail.followed_by(&blob).unwrap();
    assert_eq!(next.description_text(), tail.description_text());
    assert!(next.as_bytes().starts_with(&blob));
    assert!(
        next.sections()
            .nth(3)
            .unwrap()
            .body
            .iter()
            .all(|b| *b == 0x7e)
    );
    assert_eq!(
        Tail::decode(next.as_bytes(), TailLimits::default()).unwrap(),
        next
    );
}

#[test]
fn sections_that_come_go_and_change_their_length_are_found_and_described() {
    let (tail, blob) = later(|sections| {
        sections[2].1.extend_from_slice(b"a subsection");
        sections.remove(5);
        let mut new = sections[0].clone();
        new.0.id = SectionId(999);
        new.0.idstr = IdStr::new("a new one").unwrap();
        sections.insert(8, new);
    });
    let next = tail.followed_by(&blob).unwrap();
    assert_eq!(next.sections().len(), tail.sections().len());
    let mut again = Vec::new();
    encode_device_blob(next.sections(), &mut again);
    assert_eq!(again, blob);
    assert!(
        next.sections()
            .nth(2)
            .unwrap()
            .body
            .ends_with(b"a subsection")
    );
    assert_eq!(
        next.sections().nth(8).unwrap().header.idstr.as_str(),
        "a new one"
    );
    assert_eq!(
        Tail::decode(next.as_bytes(), TailLimits::default()).unwrap(),
        next
    );
    // And what comes after that is split like this one.
    assert_eq!(next.followed_by(&blob).unwrap(), next);
}

#[test]
fn a_later_tail_whose_sections_cannot_be_told_apart_is_refused() {
    let (tail, blob) = later(|_| {});
    let len = blob.len();
    for wrong in [&b""[..], &blob[..len - 1], &[&blob[..], &[7]].concat()] {
        let error = tail.followed_by(wrong).unwrap_err();
        assert!(matches!(error, TailError::Incomplete { .. }), "{error}");
    }
    // Cut off within a section, but with a last byte that could be EOF.
    let error = tail.followed_by(&[&blob[..len - 3], &[0]].concat());
    assert!(matches!(error.unwrap_err(), TailError::Body { .. }));
    // A body that has grown by what looks like its end and the next section.
    let (_, blob) = later(|sections| {
        let mut false_end = Vec::new();
        encode_footer(sections[2].0.id, &mut false_end);
        sections[3].0.encode(&mut false_end);
        false_end.extend_from_slice(b"more");
        sections[2].1.extend_from_slice(b"longer");
        sections[2].1.extend_from_slice(&false_end);
    });
    let error = tail.followed_by(&blob).unwrap_err();
    assert!(matches!(error, TailError::Body { .. }), "{error}");
}

/// A file with `before` bytes of something, the tail, and what is `behind` it.
fn file(before: usize, tail: &[u8], behind: &[u8]) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    let bytes = [&vec![0x55; before], tail, behind].concat();
    file.write_at(0, &bytes).unwrap();
    file
}

/// The device sections of `bytes` and a description of them that is `padding` bytes longer.
fn with_description_of(bytes: &[u8], padding: usize) -> Vec<u8> {
    let (tail, _) = feed(bytes, 1 << 20).unwrap().unwrap();
    let mut out = Vec::new();
    tail.encode_sections(SectionId(0), &mut out);
    let text = tail.description_text().strip_suffix('}').unwrap();
    let text = format!("{text}{}}}", " ".repeat(padding));
    encode_vm_description(u32::try_from(text.len()).unwrap(), &mut out);
    out.extend(text.as_bytes());
    out
}

#[test]
fn a_file_says_at_its_end_how_long_the_tail_in_it_is() {
    let limits = TailLimits::default();
    let long = with_description_of(MICROVM, 3 << 20);
    for tail in [Q35, MICROVM, &long] {
        for before in [0, 1 << 20] {
            let found = tail_at_end(&file(before, tail, b""), 0, limits).unwrap();
            assert_eq!(found, Some(tail.len() as u64));
        }
    }
    // Not of a description that is longer than it may be.
    let limits = TailLimits {
        description: 1 << 20,
        ..limits
    };
    assert_eq!(tail_at_end(&file(9, &long, b""), 0, limits).unwrap(), None);
}

#[test]
fn a_length_that_is_not_sure_is_none() {
    let limits = TailLimits::default();
    let unsure = |tail: &[u8], behind: &[u8], early| {
        tail_at_end(&file(4096, tail, behind), early, limits).unwrap()
    };
    assert_eq!(unsure(b"", b"", 0), None);
    assert_eq!(unsure(b"}", b"", 0), None);
    // Something follows, or something is missing.
    assert_eq!(unsure(MICROVM, &[0; 512], 0), None);
    assert_eq!(unsure(MICROVM, b"an older stream's rest }", 0), None);
    assert_eq!(unsure(&MICROVM[..MICROVM.len() - 1], b"", 0), None);
    let description = MICROVM.len() - 2000;
    assert_eq!(unsure(&MICROVM[description..], b"", 0), None);
    // Other sections than those described, or of another length.
    assert_eq!(unsure(MICROVM, b"", 1000), None);
    let mut shorter = MICROVM.to_vec();
    shorter.remove(100);
    assert_eq!(unsure(&shorter, b"", 0), None);
    let mut other = MICROVM.to_vec();
    other[6] ^= 1;
    assert_eq!(unsure(&other, b"", 0), None);
}
