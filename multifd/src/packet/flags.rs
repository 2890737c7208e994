//! What kind a packet is of, and how it is compressed.

use super::PacketError;

/// How the payload of a channel is compressed, as the flags of a packet say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The pages as they are.
    None,
    /// One deflate stream per channel.
    Zlib,
    /// One zstd frame per channel.
    Zstd,
    /// Each page alone, by Intel QPL.
    Qpl,
    /// Each page alone, by UADK.
    Uadk,
    /// One QATzip buffer per packet.
    Qatzip,
}

impl Method {
    const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => 1 << 1,
            Self::Zstd => 2 << 1,
            Self::Qpl => 4 << 1,
            Self::Uadk => 8 << 1,
            Self::Qatzip => 16 << 1,
        }
    }

    const ALL: [Self; 6] = [
        Self::None,
        Self::Zlib,
        Self::Zstd,
        Self::Qpl,
        Self::Uadk,
        Self::Qatzip,
    ];
}

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
