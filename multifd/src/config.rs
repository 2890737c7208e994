//! What both sides must have set to the same before they connect: nothing of it is negotiated.

use std::fmt;
use std::num::NonZeroU8;
use std::time::Duration;

use migration_stream::ram::ZeroPageDetection;

use crate::packet::Method;

/// How many channels there are beside the main one: 1 to 255 (QEMU's `multifd-channels`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChannelCount(NonZeroU8);

impl ChannelCount {
    /// `count` channels; `None` for none.
    #[must_use]
    pub const fn new(count: u8) -> Option<Self> {
        match NonZeroU8::new(count) {
            Some(count) => Some(Self(count)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0.get()
    }

    /// The ids of the channels, from 0 on.
    pub fn ids(self) -> impl ExactSizeIterator<Item = ChannelId> {
        (0..self.get()).map(ChannelId)
    }
}

impl Default for ChannelCount {
    /// Two, as QEMU has it.
    fn default() -> Self {
        Self(NonZeroU8::MIN.saturating_add(1))
    }
}

impl fmt::Display for ChannelCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number by which a channel introduces itself, from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(u8);

impl ChannelId {
    /// Channel number `id`.
    #[must_use]
    pub const fn new(id: u8) -> Self {
        Self(id)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "multifd channel {}", self.0)
    }
}

/// How the channels compress their pages (QEMU's `multifd-compression`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// Not at all: pages go from guest memory to guest memory without a copy in between.
    #[default]
    None,
    /// One deflate stream per channel.
    #[cfg(feature = "zlib")]
    Zlib(ZlibLevel),
    /// One zstd frame per channel.
    #[cfg(feature = "zstd")]
    Zstd(ZstdLevel),
}

impl Compression {
    /// What packets say of it.
    #[must_use]
    pub const fn method(self) -> Method {
        match self {
            Self::None => Method::None,
            #[cfg(feature = "zlib")]
            Self::Zlib(_) => Method::Zlib,
            #[cfg(feature = "zstd")]
            Self::Zstd(_) => Method::Zstd,
        }
    }
}

/// A level of a codec: from 0 to a greatest one, 1 unless said otherwise.
#[cfg(any(feature = "zlib", feature = "zstd"))]
macro_rules! level {
    ($(#[$meta:meta])* $name:ident, $max:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name(u8);

        impl $name {
            #[doc = concat!("The level `level`; `None` beyond ", $max, ".")]
            #[must_use]
            pub const fn new(level: u8) -> Option<Self> {
                if level <= $max { Some(Self(level)) } else { None }
            }

            /// The number.
            #[must_use]
            pub const fn get(self) -> u8 {
                self.0
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self(1)
            }
        }
    };
}

#[cfg(feature = "zlib")]
level! {
    /// How hard zlib tries: 0 to 9, 1 unless said otherwise (QEMU's `multifd-zlib-level`).
    ZlibLevel, 9
}

#[cfg(feature = "zstd")]
level! {
    /// How hard zstd tries: 0 to 20, 1 unless said otherwise (QEMU's `multifd-zstd-level`).
    ZstdLevel, 20
}

/// When the channels are synchronised with the main stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    /// Once in every round over guest memory, where the main stream has a MULTIFD_FLUSH record
    /// (machine types since QEMU 8.1).
    #[default]
    EachRound,
    /// At the end of every RAM section, without a record (machine types up to 8.0; QEMU's property
    /// `multifd-flush-after-each-section`). The receiving side is told by
    /// [`DecoderConfig::flush_each_section`](migration_stream::decoder::DecoderConfig).
    EachSection,
}

/// The settings of a set of channels, the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultifdConfig {
    /// How many channels.
    pub channels: ChannelCount,
    /// How pages are compressed.
    pub compression: Compression,
    /// Sender only: who looks for zero pages. A receiver before QEMU 9.0 knows none in packets:
    /// it wants [`ZeroPageDetection::Legacy`].
    pub zero_pages: ZeroPageDetection,
    /// Sender only: when the channels are synchronised.
    pub flush: Flush,
    /// Sender only: pages are not copied on their way into the kernel (`MSG_ZEROCOPY`, QEMU's
    /// `zero-copy-send`). Needs TCP, no compression, and memory that the process may lock.
    pub zero_copy: bool,
    /// Sender only: pages that are not compressed are lent to a peer on the same host (a unix
    /// socket), who copies them once, instead of being copied into the socket and out of it. The
    /// peer has taken them when a synchronisation is over. On by default.
    pub lend_pages: bool,
    /// The VM's UUID, all zero if it has none.
    pub uuid: [u8; 16],
    /// How long a wait without a deadline of its own goes on while no channel completes a packet.
    pub stall_limit: Duration,
}

impl Default for MultifdConfig {
    fn default() -> Self {
        Self {
            channels: ChannelCount::default(),
            compression: Compression::None,
            zero_pages: ZeroPageDetection::Multifd,
            flush: Flush::EachRound,
            zero_copy: false,
            lend_pages: true,
            uuid: [0; 16],
            stall_limit: Duration::from_secs(30),
        }
    }
}
