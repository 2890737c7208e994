//! What the multifd channels of QEMU 11.1.3 carry, byte for byte.
//!
//! | captured | test |
//! |---|---|
//! | hello of channel 1 | [`a_hello`] |
//! | SYNC packet | [`a_sync_packet`] |
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use multifd::ChannelId;
use multifd::packet::{HEADER_LEN, HELLO_LEN, Hello, Method, PacketHeader, PacketView};

#[test]
fn a_hello() {
    let mut bytes = [0; HELLO_LEN];
    bytes[..25].copy_from_slice(&[
        0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, // magic, version
        0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, // UUID
        0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, //
        1,    // channel
    ]);
    assert_eq!(bytes.len(), 25 + 39);
    let hello = Hello::decode(&bytes).unwrap();
    assert_eq!(hello.channel, ChannelId::new(1));
    assert_eq!(hello.uuid, bytes[8..24]);
    assert_eq!(hello.encode(), bytes);
}

#[test]
fn a_sync_packet() {
    let mut bytes = [0; HEADER_LEN];
    bytes[..12].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 1]);
    bytes[24..32].copy_from_slice(&7_u64.to_be_bytes());
    let view = PacketView::unfill(&bytes, Method::None).unwrap();
    assert!(view.is_sync() && !view.has_pages());
    let mut out = [0xff; HEADER_LEN];
    PacketHeader::sync(7).fill(&mut out).unwrap();
    assert_eq!(out, bytes);
}
