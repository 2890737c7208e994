//! A multifd packet: no more pages than it has room for, all of them in the block, and filling a packet
//! with what was read of another gives a packet that says the same.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use multifd::device_state::{DEVICE_STATE_HEADER_LEN, DeviceStateHeader};
use multifd::packet::{
    HEADER_LEN, HELLO_LEN, Hello, Method, PAGES_PER_PACKET, PREFIX_LEN, PacketFlags, PacketHeader,
    PacketView,
};

const METHODS: [Method; 3] = [Method::None, Method::Zlib, Method::Zstd];

fn page_packet(method: Method, used_length: u64, bytes: &[u8; HEADER_LEN]) {
    let Ok(packet) = PacketView::unfill(bytes, method) else {
        return;
    };
    assert!(packet.normal_pages() + packet.zero_pages() <= PAGES_PER_PACKET);
    assert!(packet.payload_len() as usize <= 2 * PAGES_PER_PACKET * 4096);
    let mut offsets = [0; PAGES_PER_PACKET];
    let (Ok((normal, zero)), Ok(block)) =
        (packet.offsets(used_length, &mut offsets), packet.block())
    else {
        return;
    };
    for offset in normal.iter().chain(zero) {
        assert!(offset % 4096 == 0 && offset + 4096 <= used_length);
    }
    let mut again = [0; HEADER_LEN];
    let header = PacketHeader {
        flags: PacketFlags {
            sync: packet.is_sync(),
            method: if packet.has_pages() {
                method
            } else {
                Method::None
            },
        },
        number: packet.number(),
        block,
        normal,
        zero,
        payload_len: packet.payload_len(),
    };
    header.fill(&mut again).expect("what was in a packet");
    let same = PacketView::unfill(&again, method).expect("a packet of ours");
    assert_eq!(
        (
            same.is_sync(),
            same.number(),
            same.payload_len(),
            same.block()
        ),
        (
            packet.is_sync(),
            packet.number(),
            packet.payload_len(),
            Ok(block)
        ),
    );
    let mut offsets_again = [0; PAGES_PER_PACKET];
    assert_eq!(
        same.offsets(used_length, &mut offsets_again),
        Ok((normal, zero))
    );
}

fuzz_target!(|data: &[u8]| {
    let (choice, bytes) = fuzz::choice(data);
    if let Some(prefix) = bytes.first_chunk::<PREFIX_LEN>() {
        let _ = PacketView::check_prefix(prefix);
    }
    if let Some(hello) = bytes.first_chunk::<HELLO_LEN>()
        && let Ok(hello) = Hello::decode(hello)
    {
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
    if let Some(header) = bytes.first_chunk::<DEVICE_STATE_HEADER_LEN>()
        && let Ok(header) = DeviceStateHeader::decode(header)
    {
        assert_eq!(DeviceStateHeader::decode(&header.encode()), Ok(header));
    }
    if let Some(header) = bytes.first_chunk::<HEADER_LEN>() {
        let method = METHODS[usize::from(choice) % METHODS.len()];
        page_packet(method, u64::from(choice) << 16, header);
    }
});
