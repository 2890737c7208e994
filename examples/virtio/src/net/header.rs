//! The header before each frame in a queue: `struct virtio_net_hdr_v1`.

use virtio_bindings::virtio_net as spec;

/// Bytes of the header.
pub const HEADER_BYTES: usize = 12;

/// What a frame still needs done, or what has been done for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `VIRTIO_NET_HDR_F_…`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_…`.
    pub gso_type: u8,
    /// Bytes of the frame's headers.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// Where the checksum's range begins.
    pub csum_start: u16,
    /// Where in it the checksum stands.
    pub csum_offset: u16,
    /// Buffers that a received frame takes up.
    pub num_buffers: u16,
}

impl Header {
    pub(super) fn parse(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// Whether the checksum has to be completed.
    pub(super) const fn needs_checksum(&self) -> bool {
        self.flags as u32 & spec::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
    }

    /// Whether the frame is to be cut into segments.
    pub(super) const fn is_large(&self) -> bool {
        self.gso_type as u32 != spec::VIRTIO_NET_HDR_GSO_NONE
    }
}
