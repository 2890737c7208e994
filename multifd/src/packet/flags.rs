//! What kind a packet is of.

use super::{Method, PacketError};

/// The flags of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketFlags {
    /// The channel waits behind this packet until the main stream's MULTIFD_FLUSH.
    pub sync: bool,
    /// How the payload is compressed; [`Method::None`] in a packet without pages.
    pub method: Method,
}

const FLAG_SYNC: u32 = 0x01;
const FLAG_METHOD_MASK: u32 = 0x3e;
pub(crate) const FLAG_DEVICE_STATE: u32 = 0x40;

/// What kind of packet a prefix begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketKind {
    /// Pages, or a SYNC packet: a header of [`HEADER_LEN`](super::HEADER_LEN) bytes.
    Pages(PacketFlags),
    /// Device state, see [`crate::device_state`].
    DeviceState,
}

impl PacketFlags {
    pub(super) const fn to_bits(self) -> u32 {
        self.method.bits() | if self.sync { FLAG_SYNC } else { 0 }
    }

    pub(super) fn from_bits(bits: u32) -> Result<Self, PacketError> {
        let method = Method::ALL
            .into_iter()
            .find(|m| m.bits() == bits & FLAG_METHOD_MASK)
            .filter(|_| bits & !(FLAG_SYNC | FLAG_METHOD_MASK) == 0)
            .ok_or(PacketError::Flags { flags: bits })?;
        Ok(Self {
            sync: bits & FLAG_SYNC != 0,
            method,
        })
    }
}
