//! What both sides must have set to the same before they connect: nothing of it is negotiated.

use std::time::Duration;

use migration_stream::io::SendMode;
use migration_stream::ram::ZeroPageDetection;

use crate::channel_id::ChannelCount;
use crate::packet::Method;

#[cfg(feature = "zstd-adaptive")]
mod zstd_range;
#[cfg(feature = "zstd-adaptive")]
pub use zstd_range::{ZstdRange, ZstdRangeError};

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
    /// The same at a level that goes up where the network holds pages up, and down where the
    /// processor does ([`LevelControl`](crate::compression::LevelControl)). A change of level begins a
    /// new frame; any receiver of zstd takes that.
    #[cfg(feature = "zstd-adaptive")]
    ZstdAdaptive(ZstdRange),
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
            #[cfg(feature = "zstd-adaptive")]
            Self::ZstdAdaptive(_) => Method::Zstd,
        }
    }

    /// The levels to choose from, if the level is one that adapts.
    #[cfg(feature = "zstd-adaptive")]
    pub(crate) const fn range(self) -> Option<ZstdRange> {
        match self {
            Self::ZstdAdaptive(range) => Some(range),
            _ => None,
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
    /// [`DecoderConfig::flush_each_section`](migration_stream::DecoderConfig).
    EachSection,
}

/// The settings of a set of channels, the same on both sides.
///
/// The default is two channels without compression, zero pages found by the channels, synchronised each
/// round, without zero-copy, for a VM without a UUID (all zero).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
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
    /// Sender only: how pages are sent that are not compressed.
    ///
    /// [`SendMode::ZeroCopy`] is QEMU's `zero-copy-send`. It needs TCP, no compression, and memory that the process may
    /// lock; without one of them the set does not start. With [`SendMode::Splice`] channels that are no unix sockets
    /// send copies; it says where it is safe. No page is read any more when a synchronisation is over.
    pub send_mode: SendMode,
    /// The VM's UUID, all zero if it has none.
    pub uuid: [u8; 16],
    /// Receiver only: memory that all channels together may take for what the peer sends, bytes.
    /// Default 512 MiB.
    ///
    /// Each channel has an equal part, for the window of its compressed stream above all. The peer
    /// chooses that: zstd's levels up to 19 need at most 8 MiB, level 20 needs 32. With the default the
    /// latter fit up to 15 channels, the former up to 53, and level 1 fits 255. State of devices that
    /// was read and not yet handed on is counted too, over all channels.
    pub receive_memory: usize,
    /// How long a wait without a deadline of its own goes on while no channel completes a packet:
    /// as long as a connection may be silent. The set waits half as long again, so that it is the
    /// channel whose peer does nothing that reports it. Default 30 s.
    pub stall_limit: Duration,
}

impl MultifdConfig {
    /// Returns the settings of `channels` channels, the others as by default.
    #[must_use]
    pub fn new(channels: ChannelCount) -> Self {
        Self {
            channels,
            ..Self::default()
        }
    }

    /// Sets how [pages are compressed](MultifdConfig::compression).
    #[must_use]
    pub const fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Sets who looks for [zero pages](MultifdConfig::zero_pages).
    #[must_use]
    pub const fn zero_pages(mut self, zero_pages: ZeroPageDetection) -> Self {
        self.zero_pages = zero_pages;
        self
    }

    /// Sets when the channels are [synchronised](MultifdConfig::flush). A wrong setting loads pages out of order.
    #[must_use]
    pub const fn flush(mut self, flush: Flush) -> Self {
        self.flush = flush;
        self
    }

    /// Sets how pages [are sent](MultifdConfig::send_mode) that are not compressed.
    #[must_use]
    pub const fn send_mode(mut self, mode: SendMode) -> Self {
        self.send_mode = mode;
        self
    }

    /// Sets the [UUID](MultifdConfig::uuid) that the other side compares: a channel of another VM is refused.
    #[must_use]
    pub const fn uuid(mut self, uuid: [u8; 16]) -> Self {
        self.uuid = uuid;
        self
    }

    /// Sets the [memory](MultifdConfig::receive_memory) that a peer can make all channels take, bytes. With too
    /// little for the peer's compression the migration fails.
    #[must_use]
    pub const fn receive_memory(mut self, bytes: usize) -> Self {
        self.receive_memory = bytes;
        self
    }

    /// Sets how long a channel [may be silent](MultifdConfig::stall_limit). It must exceed every silence of a
    /// healthy peer.
    #[must_use]
    pub const fn stall_limit(mut self, limit: Duration) -> Self {
        self.stall_limit = limit;
        self
    }
}

impl Default for MultifdConfig {
    fn default() -> Self {
        Self {
            channels: ChannelCount::default(),
            compression: Compression::None,
            zero_pages: ZeroPageDetection::Multifd,
            flush: Flush::EachRound,
            send_mode: SendMode::Copy,
            uuid: [0; 16],
            receive_memory: 512 << 20,
            stall_limit: Duration::from_secs(30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_copied_unless_another_mode_is_asked_for() {
        assert_eq!(MultifdConfig::default().send_mode, SendMode::Copy);
    }
}
