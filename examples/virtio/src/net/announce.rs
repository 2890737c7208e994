//! The frame by which a guest that has moved tells switches where it is now.

use super::Mac;

/// Bytes of the shortest frame.
const MIN_FRAME: usize = 60;

/// Returns a reverse-ARP request of `mac` for its own address, to everybody. No host answers it, and
/// every switch learns from it.
#[must_use]
pub fn rarp_frame(mac: Mac) -> [u8; MIN_FRAME] {
    const TYPE_RARP: [u8; 2] = [0x80, 0x35];
    // Ethernet, IPv4, lengths of both addresses, reverse request.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
    let mut frame = [0; MIN_FRAME];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..14].copy_from_slice(&TYPE_RARP);
    frame[14..22].copy_from_slice(&REQUEST);
    frame[22..28].copy_from_slice(&mac.0);
    frame[32..38].copy_from_slice(&mac.0);
    frame
}
