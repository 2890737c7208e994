//! The Internet checksum, where a back end cannot be asked to complete it.

use super::header::Header;

/// Completes the checksum of a frame that its driver has left open. The place holds the sum of the
/// pseudo header already. Returns whether the place lies in the frame.
pub(super) fn complete(header: &Header, frame: &mut [u8]) -> bool {
    let start = usize::from(header.csum_start);
    let place = start + usize::from(header.csum_offset);
    if place + 2 > frame.len() {
        return false;
    }
    let sum = fold(&frame[start..]);
    // A sum of 0 says of UDP that there is none.
    let sum = if sum == 0 { 0xffff } else { sum };
    frame[place..place + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// The complement of the one's complement sum of 16-bit words.
fn fold(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        sum += u64::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        sum += u64::from(*last) << 8;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // It is 16 bits long now.
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_udp_checksum_is_completed() {
        // 10.0.0.1:1 to 10.0.0.2:2, "hi", behind an IPv4 header of 20 bytes.
        let mut udp = vec![0, 1, 0, 2, 0, 10, 0, 0, b'h', b'i'];
        let pseudo = [10, 0, 0, 1, 10, 0, 0, 2, 0, 17, 0, 10];
        let seed = !fold(&pseudo);
        udp[6..8].copy_from_slice(&seed.to_be_bytes());
        let mut frame = vec![0; 34];
        frame.extend(&udp);
        let header = Header {
            csum_start: 34,
            csum_offset: 6,
            ..Header::default()
        };
        assert!(complete(&header, &mut frame));
        let all: Vec<u8> = pseudo.iter().chain(&frame[34..]).copied().collect();
        assert_eq!(fold(&all), 0);
    }

    #[test]
    fn a_place_outside_of_the_frame_is_refused() {
        for (csum_start, csum_offset) in [(60, 0), (59, 0), (0, u16::MAX), (u16::MAX, u16::MAX)] {
            let header = Header {
                csum_start,
                csum_offset,
                ..Header::default()
            };
            assert!(!complete(&header, &mut [0; 60]));
        }
    }
}
