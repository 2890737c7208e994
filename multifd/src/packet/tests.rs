//! Headers as QEMU writes them, spoiled ones, and any others.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const LENGTH: u64 = 1 << 30;

fn header(f: impl FnOnce(&mut [u8; HEADER_LEN])) -> [u8; HEADER_LEN] {
    let mut buf = [0xff; HEADER_LEN];
    PacketHeader {
        flags: PacketFlags {
            sync: false,
            method: Method::None,
        },
        number: 7,
        block: b"pc.ram",
        normal: &[0x1000, 0x3000],
        zero: &[0],
        payload_len: 8192,
    }
    .fill(&mut buf)
    .unwrap();
    f(&mut buf);
    buf
}

fn unfill_error(f: impl FnOnce(&mut [u8; HEADER_LEN])) -> PacketError {
    PacketView::unfill(&header(f), Method::None).unwrap_err()
}

#[test]
fn a_header_is_laid_out_as_qemu_lays_it_out() {
    let buf = header(|_| {});
    assert_eq!(HEADER_LEN, 1344);
    assert_eq!(
        buf[..24],
        *b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\0\0\0\0\x80\0\0\0\x02\0\0\x20\0"
    );
    assert_eq!(buf[24..40], *b"\0\0\0\0\0\0\0\x07\0\0\0\x01\0\0\0\0");
    assert!(buf[40..64].iter().all(|b| *b == 0));
    assert_eq!(buf[64..72], *b"pc.ram\0\0");
    assert_eq!(
        buf[320..344],
        *b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x30\0\0\0\0\0\0\0\0\0"
    );
    assert!(buf[344..].iter().all(|b| *b == 0));
}

#[test]
fn a_sync_packet_has_no_room_no_name_and_no_method() {
    let mut buf = [0xff; HEADER_LEN];
    PacketHeader::sync(3).fill(&mut buf).unwrap();
    assert_eq!(buf[8..16], *b"\0\0\0\x01\0\0\0\0");
    let view = PacketView::unfill(&buf, Method::Zstd).unwrap();
    assert!(view.is_sync() && !view.has_pages());
    assert_eq!((view.number(), view.block().unwrap()), (3, &b""[..]));
}

#[test]
fn a_sync_packet_of_an_old_source_may_carry_pages() {
    let buf = header(|b| b[11] |= 1);
    let view = PacketView::unfill(&buf, Method::None).unwrap();
    assert!(view.is_sync());
    assert_eq!((view.normal_pages(), view.zero_pages()), (2, 1));
}

#[test]
fn a_packet_of_qemu_7_2_without_pages_may_have_the_length_of_the_one_before_it() {
    for flags in [0, 1] {
        let buf = header(|b| {
            b[11] = flags;
            b[16..20].fill(0);
            b[32..36].fill(0);
        });
        let view = PacketView::unfill(&buf, Method::Zlib).unwrap();
        assert_eq!((view.has_pages(), view.payload_len()), (false, 0));
    }
}

#[test]
fn a_source_may_have_fewer_pages_in_a_packet_but_not_more() {
    let with_room = |pages: u8| header(|b| b[15] = pages);
    for pages in [3, 64, 128] {
        assert!(PacketView::unfill(&with_room(pages), Method::None).is_ok());
    }
    let e = PacketView::unfill(&with_room(129), Method::None).unwrap_err();
    assert_eq!(e.to_string(), "packet of 129 pages, expected at most 128");
}

#[test]
fn c7_offsets_inside_a_page_are_refused() {
    let buf = header(|b| b[335] = 0x10);
    let view = PacketView::unfill(&buf, Method::None).unwrap();
    assert_eq!(
        view.offsets(LENGTH, &mut [0; PAGES_PER_PACKET])
            .unwrap_err(),
        PacketError::Alignment {
            index: 1,
            offset: 0x3010
        }
    );
}

#[test]
fn c7_a_payload_length_that_contradicts_the_page_count_is_refused() {
    assert!(matches!(
        unfill_error(|b| b[22] = 0x10),
        PacketError::PayloadLength {
            got: 4096,
            normal: 2,
            ..
        }
    ));
}

#[test]
fn c19_a_payload_beyond_the_bound_is_refused_before_memory_is_taken_for_it() {
    let buf = header(|b| {
        b[11] = 4;
        b[20..24].copy_from_slice(&(MAX_COMPRESSED_LEN + 1).to_be_bytes());
    });
    assert!(matches!(
        PacketView::unfill(&buf, Method::Zstd),
        Err(PacketError::PayloadLength {
            got: 0x10_0001,
            max: MAX_COMPRESSED_LEN,
            ..
        })
    ));
}

#[test]
fn device_state_is_told_by_the_first_twelve_bytes_and_never_comes_with_anything_else() {
    let mut prefix = [0; PREFIX_LEN];
    prefix.copy_from_slice(b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40");
    assert_eq!(
        PacketView::check_prefix(&prefix),
        Ok(PacketKind::DeviceState)
    );
    for flags in [0x41, 0x42, 0xc0] {
        prefix[11] = flags;
        let flags = flags.into();
        assert_eq!(
            PacketView::check_prefix(&prefix),
            Err(PacketError::Flags { flags })
        );
    }
}

#[test]
fn each_spoiled_field_is_named() {
    assert_eq!(
        unfill_error(|b| b[0] = 0),
        PacketError::Magic { got: 0x0022_3344 }
    );
    assert_eq!(unfill_error(|b| b[7] = 2), PacketError::Version { got: 2 });
    assert_eq!(
        unfill_error(|b| b[11] = 0x80),
        PacketError::Flags { flags: 0x80 }
    );
    assert_eq!(
        unfill_error(|b| b[11] = 0x06),
        PacketError::Flags { flags: 6 }
    );
    assert_eq!(
        unfill_error(|b| b[15] = 129),
        PacketError::Pages { pages: 129 }
    );
    assert!(matches!(
        unfill_error(|b| b[15] = 1),
        PacketError::Counts { .. }
    ));
    assert!(matches!(
        unfill_error(|b| b[35] = 127),
        PacketError::Counts { .. }
    ));
    assert!(matches!(
        unfill_error(|b| b[11] = 2),
        PacketError::Method {
            got: Method::Zlib,
            expected: Method::None
        }
    ));
    // A zero-only packet is compressed by nothing, but has the method in its flags.
    let empty = header(|b| b[19] = 0);
    assert!(matches!(
        PacketView::unfill(&empty, Method::None),
        Err(PacketError::PayloadLength {
            normal: 0,
            max: 0,
            ..
        })
    ));
    let long_name = header(|b| b[64..320].fill(b'x'));
    let view = PacketView::unfill(&long_name, Method::None).unwrap();
    assert_eq!(view.block(), Err(PacketError::NameLength));
    let buf = header(|_| {});
    let view = PacketView::unfill(&buf, Method::None).unwrap();
    assert!(matches!(
        view.offsets(0x3000, &mut [0; PAGES_PER_PACKET]),
        Err(PacketError::Offset {
            index: 1,
            offset: 0x3000,
            used_length: 0x3000
        })
    ));
}

#[test]
fn more_pages_than_fit_are_not_written() {
    let offsets = [0; PAGES_PER_PACKET];
    let packet = PacketHeader {
        normal: &offsets,
        zero: &[0],
        ..PacketHeader::sync(0)
    };
    assert_eq!(
        packet.fill(&mut [0; HEADER_LEN]),
        Err(PacketError::Pages { pages: 129 })
    );
}

fn pages() -> impl Strategy<Value = (Vec<u64>, usize)> {
    (
        vec(0..LENGTH / PAGE_SIZE, 1..=PAGES_PER_PACKET),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(pages, cut)| {
            let cut = cut.index(pages.len() + 1);
            (pages.into_iter().map(|p| p * PAGE_SIZE).collect(), cut)
        })
}

proptest! {
    #[test]
    fn what_is_filled_unfills_to_itself(
        (offsets, cut) in pages(),
        name in vec(1u8.., 1..=255),
        number: u64,
        sync: bool,
    ) {
        let (normal, zero) = offsets.split_at(cut);
        let mut buf = [0xff; HEADER_LEN];
        PacketHeader {
            flags: PacketFlags { sync, method: Method::None },
            number,
            block: &name,
            normal,
            zero,
            payload_len: u32::try_from(normal.len()).unwrap() * PAGE_LEN,
        }
        .fill(&mut buf)
        .unwrap();
        let view = PacketView::unfill(&buf, Method::None).unwrap();
        prop_assert_eq!(view.is_sync(), sync);
        prop_assert_eq!(view.number(), number);
        prop_assert_eq!(view.block().unwrap(), &name[..]);
        let mut got = [0; PAGES_PER_PACKET];
        prop_assert_eq!(view.offsets(LENGTH, &mut got).unwrap(), (normal, zero));
    }

    #[test]
    fn any_mutation_gives_pages_of_the_block_or_an_error(
        mutations in vec((0..HEADER_LEN, any::<u8>()), 1..16),
        used_length in (1..LENGTH / PAGE_SIZE).prop_map(|p| p * PAGE_SIZE),
        zstd: bool,
    ) {
        let mut buf = header(|b| if zstd { b[11] = 4 });
        for (at, value) in mutations {
            buf[at] = value;
        }
        let method = if zstd { Method::Zstd } else { Method::None };
        let mut got = [0; PAGES_PER_PACKET];
        if let Ok(view) = PacketView::unfill(&buf, method) {
            prop_assert!(view.payload_len() <= MAX_COMPRESSED_LEN);
            let _ = view.block();
            if let Ok((normal, zero)) = view.offsets(used_length, &mut got) {
                prop_assert!(normal.len() + zero.len() <= PAGES_PER_PACKET);
                for offset in normal.iter().chain(zero) {
                    prop_assert!(offset + PAGE_SIZE <= used_length);
                }
            }
        }
    }
}
