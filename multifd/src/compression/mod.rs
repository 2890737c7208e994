//! How the payload of a packet is made smaller, for channels that are not sent as they are.
//!
//! An uncompressed channel has no codec: its pages go between guest memory and the socket without
//! passing through a buffer. The codecs below keep one stream per channel for the channel's whole
//! life, SYNC packets and COLO checkpoints included; a packet ends with a flush of the stream.

use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::config::Compression;

#[cfg(feature = "zstd")]
mod zstd;

/// Bytes that are copied out of, or into, guest memory at a time: a codec needs a Rust slice, and
/// there must be none of memory that a vCPU may be writing.
#[cfg(feature = "zstd")]
const SCRATCH_LEN: usize = 32 << 10;

/// Makes the payloads of one channel.
pub trait Encoder: Send {
    /// The payload of a packet with these pages, in order. It is valid until the next call.
    ///
    /// # Errors
    /// [`CompressionError::Codec`]; the stream is of no use after that.
    fn encode(&mut self, pages: &[VolatileSlice<'_>]) -> Result<&[u8], CompressionError>;
}

/// Takes the payloads of one channel apart.
pub trait Decoder: Send {
    /// Fills `pages` in order from the payload of one packet. It writes nothing but them, and
    /// takes no memory that depends on what the payload says but the window of the stream.
    ///
    /// # Errors
    /// [`CompressionError::Codec`], and [`CompressionError::Short`] or [`CompressionError::Long`]
    /// when the payload is not exactly `pages`; the stream is of no use after that.
    fn decode(
        &mut self,
        payload: &[u8],
        pages: &[VolatileSlice<'_>],
    ) -> Result<(), CompressionError>;
}

impl Compression {
    /// A fresh encoder for one channel, `None` for pages that travel as they are.
    ///
    /// # Errors
    /// [`CompressionError::Codec`] when there is no memory for it.
    pub fn encoder(self) -> Result<Option<Box<dyn Encoder>>, CompressionError> {
        match self {
            Self::None => Ok(None),
            #[cfg(feature = "zstd")]
            Self::Zstd(level) => Ok(Some(Box::new(zstd::ZstdEncoder::new(level)?))),
        }
    }

    /// A fresh decoder for one channel, `None` for pages that travel as they are. The level does
    /// not matter to it.
    ///
    /// # Errors
    /// [`CompressionError::Codec`] when there is no memory for it.
    pub fn decoder(self) -> Result<Option<Box<dyn Decoder>>, CompressionError> {
        match self {
            Self::None => Ok(None),
            #[cfg(feature = "zstd")]
            Self::Zstd(_) => Ok(Some(Box::new(zstd::ZstdDecoder::new()?))),
        }
    }
}

/// Why a payload could not be made or taken apart.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompressionError {
    /// The codec's own error: bad data, or no memory.
    #[error("{what} failed")]
    Codec {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Arc<io::Error>,
    },
    /// The payload ended before the pages were full.
    #[error("the payload holds {got} bytes of pages, expected {expected}")]
    Short {
        /// Bytes that were in it.
        got: usize,
        /// Bytes of pages in the packet.
        expected: usize,
    },
    /// The payload goes on behind the last page.
    #[error("the payload holds more than the {expected} bytes of pages of its packet")]
    Long {
        /// Bytes of pages in the packet.
        expected: usize,
    },
}
