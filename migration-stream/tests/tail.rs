//! The tail of a stream with unknown devices, on device sections and description of a q35 and a
//! microvm as QEMU 11.1.3 sends them (from the first FULL section on; no guest memory is in them).
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use migration_stream::codec::Reader;
use migration_stream::opaque_tail::{Fed, OpaqueTail, Tail, TailError, TailLimits};
use migration_stream::section::{Announcement, InstanceId, SectionHeader, SectionId, encode_eof};

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
