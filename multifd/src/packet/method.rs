//! How a packet is compressed.

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
    pub(super) const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => 1 << 1,
            Self::Zstd => 2 << 1,
            Self::Qpl => 4 << 1,
            Self::Uadk => 8 << 1,
            Self::Qatzip => 16 << 1,
        }
    }

    pub(super) const ALL: [Self; 6] = [
        Self::None,
        Self::Zlib,
        Self::Zstd,
        Self::Qpl,
        Self::Uadk,
        Self::Qatzip,
    ];
}
