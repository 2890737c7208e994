use proptest::prelude::*;

use bytes::BufMut;

use super::*;
use crate::SectionId;
use crate::error::{Cause, DecodeError};
use crate::raw::codec::Reader;
use crate::raw::section::{Continuation, encode_continuation, encode_footer};

fn name(s: &str) -> IdStr {
    IdStr::new(s).unwrap()
}

const FLAGS: BitmapFlags = BitmapFlags {
    enabled: true,
    persistent: false,
    autoload: false,
};

/// The first section of two bitmaps of a disk, and the one that completes the first.
fn bodies() -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = DirtyBitmapEncoder::new();
    let a = encoder
        .start(&name("disk0"), &name("a"), 65536, FLAGS, &mut out)
        .unwrap();
    let b = encoder
        .start(&name("disk0"), &name("b"), 512, FLAGS, &mut out)
        .unwrap();
    Chunk::end().encode(&mut out);
    encoder.bits(a, 0, 16384, &[0; 16], &mut out).unwrap();
    encoder.bits(a, 16384, 8192, &[1; 8], &mut out).unwrap();
    encoder.complete(a, &mut out).unwrap();
    encoder.complete(b, &mut out).unwrap();
    Chunk::end().encode(&mut out);
    out
}

#[test]
fn chunks_are_laid_out_as_qemu_lays_them_out() {
    let expected = [
        &b"\x1c\x05disk0\x01a\0\x01\0\0\x01"[..],
        b"\x14\x01b\0\0\x02\0\x01",
        b"\x01",
        // All clear: no bits.
        b"\x46\x01a\0\0\0\0\0\0\0\0\0\0\x40\0",
        b"\x40\0\0\0\0\0\0\x40\0\0\0\x20\0\0\0\0\0\0\0\0\x20",
        &[1; 8],
        &[0; 24],
        b"\x20",
        b"\x24\x01b",
        b"\x01",
    ]
    .concat();
    assert_eq!(bodies(), expected);
}

/// The chunks of these bytes, of which one more is there at a time.
fn decode(bytes: &[u8]) -> Result<(Vec<Chunk>, DirtyBitmapDecoder), DecodeError> {
    let mut decoder = DirtyBitmapDecoder::new();
    let mut chunks = Vec::new();
    let (mut start, mut end) = (0, 0);
    while start < bytes.len() {
        let mut r = Reader::new(&bytes[start..end], start as u64);
        match decoder.next(&mut r) {
            Ok(chunk) => {
                let mut again = Vec::new();
                chunk.encode(&mut again);
                assert_eq!(again, bytes[start..start + r.consumed()]);
                assert!(again.len() <= MAX_CHUNK_LEN);
                chunks.push(chunk);
                start += r.consumed();
            }
            Err(e) if e.missing().is_some() => {
                if end == bytes.len() {
                    break;
                }
                end += 1;
            }
            Err(e) => return Err(e),
        }
    }
    Ok((chunks, decoder))
}

fn refused(bytes: &[u8]) -> (u64, Cause) {
    let e = decode(bytes).unwrap_err();
    (e.offset, e.cause)
}

#[test]
fn what_was_written_reads_back_byte_by_byte() {
    let (chunks, decoder) = decode(&bodies()).unwrap();
    assert_eq!(chunks.len(), 8);
    assert_eq!(chunks.iter().filter(|c| c.is_last).count(), 2);
    let bitmap = |n, granularity| MigratedBitmap {
        node: name("disk0"),
        name: name(n),
        granularity,
        flags: FLAGS,
        is_complete: true,
    };
    assert_eq!(decoder.bitmaps(), [bitmap("a", 65536), bitmap("b", 512)]);
    assert_eq!(decoder.current().unwrap().name, name("b"));
}

#[test]
fn a_body_is_got_past_once_its_end_is_there() {
    let bytes = bodies();
    let first = 23;
    assert_eq!(bytes[first - 1], 1);
    for n in 0..=bytes.len() {
        let mut decoder = DirtyBitmapDecoder::new();
        let got = decoder.skip(&bytes[..n], 7).unwrap();
        assert_eq!(got, (n >= first).then_some(first), "{n}");
    }
    let mut decoder = DirtyBitmapDecoder::new();
    decoder.skip(&bytes, 7).unwrap();
    let rest = decoder.skip(&bytes[first..], 30).unwrap();
    assert_eq!(rest, Some(bytes.len() - first));
}

#[test]
fn flags_of_two_and_four_bytes_are_read_and_written_again() {
    let bytes = b"\x80\x1c\x05disk0\x01a\0\x01\0\0\x07\x80\x80\0\x21\x80\x01";
    let (chunks, decoder) = decode(bytes).unwrap();
    let widths: Vec<_> = chunks.iter().map(|c| c.width).collect();
    assert_eq!(widths, [FlagsWidth::Two, FlagsWidth::Four, FlagsWidth::Two]);
    assert!(chunks[1].is_last && decoder.bitmaps()[0].is_complete);
    assert!(decoder.bitmaps()[0].flags.autoload);
    for (bytes, flags) in [
        (&b"\x81\x01"[..], 0x101),
        (b"\x80\x81\0\x01", 0x1_0001),
        (b"\x81\x80\0\x01", 0x100_0001),
        (b"\x80\x80\x01\x01", 0x101),
        (b"\x80\x80\0\x81", 0x81),
    ] {
        assert_eq!(
            refused(bytes),
            (0, DirtyBitmapError::Flags { flags }.into())
        );
    }
}

#[test]
fn flags_that_no_chunk_has_are_refused() {
    // Two kinds, clear bits without bits, names or nothing without a kind.
    for flags in [
        0x30, 0x50, 0x60, 0x70, 0x12, 0x22, 0x02, 0, 0x04, 0x08, 0x0d,
    ] {
        assert_eq!(
            refused(&[flags]),
            (
                0,
                DirtyBitmapError::Flags {
                    flags: flags.into()
                }
                .into()
            )
        );
    }
}

#[test]
fn a_bitmap_that_cannot_be_is_refused() {
    for granularity in [0, 1, 256, 511, 513, 0xffff_ffff_u32] {
        let bytes = [&b"\x1c\x01d\x01a"[..], &granularity.to_be_bytes()].concat();
        assert_eq!(
            refused(&bytes),
            (5, DirtyBitmapError::Granularity { granularity }.into())
        );
    }
    assert_eq!(
        refused(b"\x1c\x01d\x01a\0\x01\0\0\x08"),
        (9, DirtyBitmapError::BitmapFlags { found: 8 }.into())
    );
    assert!(matches!(refused(b"\x1c\0"), (1, Cause::IdStr(_))));
}

const STARTED: &[u8] = b"\x1c\x01d\x01a\0\x01\0\0\x01";

fn after_start(bytes: &[u8]) -> Cause {
    refused(&[STARTED, bytes].concat()).1
}

fn bits(first_sector: u64, sectors: u32, len: u64) -> Vec<u8> {
    let mut bytes = vec![0x40];
    bytes.put_u64(first_sector);
    bytes.put_u32(sectors);
    bytes.put_u64(len);
    bytes.resize(
        bytes.len() + usize::try_from(len.min(1 << 14)).unwrap(),
        0xff,
    );
    bytes
}

#[test]
fn bits_of_a_length_that_their_sectors_do_not_have_are_refused() {
    // A word of bits is for 4 MiB, 8192 sectors.
    for (sectors, len) in [(1, 8), (8192, 8), (8192, 32), (8193, 16), (32768, 32)] {
        let bytes = [STARTED, &bits(8192, sectors, len)].concat();
        assert!(decode(&bytes).is_ok());
    }
    for (sectors, found, expected) in [
        (1, 0, 8),
        (8192, 7, 8),
        (8192, 33, 8),
        (8193, 8, 16),
        (32769, 32, 40),
    ] {
        assert_eq!(
            after_start(&bits(0, sectors, found)),
            DirtyBitmapError::BitsLength { found, expected }.into()
        );
    }
}

#[test]
fn hostile_lengths_and_places_are_refused_before_memory_is_taken() {
    for len in [MAX_BITS_LEN + 1, u64::MAX] {
        let (offset, cause) = refused(&[STARTED, &bits(0, 1, len)[..21]].concat());
        assert_eq!(offset, STARTED.len() as u64 + 13);
        assert_eq!(cause, DirtyBitmapError::TooLong { len }.into());
    }
    for (first_sector, sectors) in [(0, 0), (u64::MAX, 1), (i64::MAX.unsigned_abs() / 512, 1)] {
        assert_eq!(
            after_start(&bits(first_sector, sectors, 8)),
            DirtyBitmapError::Range {
                first_sector,
                sectors
            }
            .into()
        );
    }
    assert_eq!(
        after_start(&bits(8, 1, 8)),
        DirtyBitmapError::Alignment {
            first_sector: 8,
            granularity: 65536
        }
        .into()
    );
    // Clear bits have a place as well.
    assert!(matches!(
        after_start(b"\x42\0\0\0\0\0\0\0\x08\0\0\0\x01"),
        Cause::DirtyBitmap(DirtyBitmapError::Alignment { .. })
    ));
}

#[test]
fn a_chunk_is_of_a_bitmap_that_goes_on() {
    assert_eq!(refused(b"\x20"), (0, DirtyBitmapError::NoName.into()));
    assert_eq!(
        refused(b"\x14\x01a\0\x01\0\0\x01"),
        (0, DirtyBitmapError::NoName.into())
    );
    let (node, a, b) = (name("d"), name("a"), name("b"));
    assert_eq!(
        after_start(b"\x24\x01b"),
        DirtyBitmapError::NotStarted {
            node: node.clone(),
            name: b
        }
        .into()
    );
    // The same name at another node is another bitmap, which has to be named.
    assert!(matches!(
        after_start(b"\x2c\x01e\x01a"),
        Cause::DirtyBitmap(DirtyBitmapError::NotStarted { .. })
    ));
    assert_eq!(after_start(b"\x28\x01e"), DirtyBitmapError::NoName.into());
    assert_eq!(
        after_start(STARTED),
        DirtyBitmapError::StartedTwice {
            node: node.clone(),
            name: a.clone()
        }
        .into()
    );
    assert_eq!(
        after_start(b"\x20\x20"),
        DirtyBitmapError::AfterComplete { node, name: a }.into()
    );
}

#[test]
fn bitmaps_are_bounded() {
    let mut encoder = DirtyBitmapEncoder::new();
    let mut out = Vec::new();
    let mut add = |i: usize| {
        let bitmap = name(&format!("b{i}"));
        encoder.start(&name("d"), &bitmap, 512, FLAGS, &mut out)
    };
    for i in 0..MAX_BITMAPS {
        assert_eq!(add(i), Ok(i));
    }
    assert_eq!(add(MAX_BITMAPS), Err(DirtyBitmapError::TooMany));
}

#[test]
fn kept_sections_are_bounded_and_sent_on_as_they_came() {
    let bytes = bodies();
    let mut kept = BitmapSections::new();
    let mut r = Reader::new(&bytes, 0);
    for kind in [None, Some(Continuation::End)] {
        kept.begin(kind);
        while !kept.next(&mut r, bytes.len()).unwrap().is_last {}
    }
    assert_eq!((kept.len(), kept.bitmaps().len()), (bytes.len(), 2));
    let mut out = Vec::new();
    kept.encode_sections(SectionId(5), &mut out);
    let expected = [
        &b"\x01\0\0\0\x05\x0cdirty-bitmap\0\0\0\0\0\0\0\x01"[..],
        &bytes[..23],
        b"\x7e\0\0\0\x05\x03\0\0\0\x05",
        &bytes[23..],
        b"\x7e\0\0\0\x05",
    ]
    .concat();
    assert_eq!(out, expected);
    let mut kept = BitmapSections::new();
    kept.begin(None);
    let mut r = Reader::new(&bytes, 0);
    assert_eq!(
        kept.next(&mut r, 10).unwrap_err().cause,
        DirtyBitmapError::SectionsTooLong { max: 10 }.into()
    );
}

proptest! {
    #[test]
    fn any_bytes_are_chunks_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        // Chunks are compared with their bytes on the way.
        let _ = decode(&bytes);
    }

    #[test]
    fn bits_read_back(
        shift in 9_u32..20,
        word in 0_u64..1000,
        bits in proptest::collection::vec(any::<u8>(), 1..160),
    ) {
        let mut out = Vec::new();
        let mut encoder = DirtyBitmapEncoder::new();
        let granularity = 1 << shift;
        let bitmap = encoder
            .start(&name("disk0"), &name("a"), granularity, FLAGS, &mut out)
            .unwrap();
        let per_word = u64::from(granularity) * 64 / 512;
        let words = bits.len().div_ceil(8);
        let sectors = u32::try_from(words as u64 * per_word).unwrap();
        let mut whole = bits.clone();
        whole.resize(words * 8, 0);
        encoder.bits(bitmap, word * per_word, sectors, &whole, &mut out).unwrap();
        let (chunks, _) = decode(&out).unwrap();
        match &chunks[1].kind {
            ChunkKind::Bits { bits: Some(found), .. } => {
                prop_assert_eq!(&found[..whole.len()], &whole[..]);
                prop_assert_eq!(found.len() % 32, 0);
            }
            ChunkKind::Bits { bits: None, .. } => {
                prop_assert!(whole.iter().all(|b| *b == 0));
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }
}

#[test]
fn kept_sections_are_read_again_and_nothing_else_is() {
    let id = SectionId(0);
    let bodies = bodies();
    // The first body ends with the first end.
    let first = bodies.windows(2).position(|w| w == b"\x01\x46").unwrap() + 1;
    let mut out = Vec::new();
    header(id).encode(&mut out);
    out.put_slice(&bodies[..first]);
    encode_footer(id, &mut out);
    encode_continuation(Continuation::End, id, &mut out);
    out.put_slice(&bodies[first..]);
    encode_footer(id, &mut out);

    let sections = BitmapSections::decode(&out).unwrap();
    assert_eq!(sections.bitmaps().len(), 2);
    assert!(sections.bitmaps().iter().all(|b| b.is_complete));
    let mut again = Vec::new();
    sections.encode_sections(id, &mut again);
    assert_eq!(again, out);

    let ends = [0, header_len() + first + 5, out.len()];
    for len in 0..out.len() {
        let whole = ends.contains(&len);
        assert_eq!(BitmapSections::decode(&out[..len]).is_ok(), whole, "{len}");
    }
    out.push(0);
    assert!(BitmapSections::decode(&out).is_err());
    let mut twice = again.clone();
    twice.extend(&again);
    assert!(BitmapSections::decode(&twice).is_err());
}

fn header_len() -> usize {
    let mut out = Vec::new();
    header(SectionId(0)).encode(&mut out);
    out.len()
}
