//! What a method of compression does, and how it fails.

use std::io;
use std::sync::Arc;

use vm_memory::VolatileSlice;

/// Bytes that are copied out of, or into, guest memory at a time: a codec needs a Rust slice, and
/// there must be none of memory that a vCPU may be writing.
#[cfg(any(feature = "zlib", feature = "zstd"))]
pub(super) const SCRATCH_LEN: usize = 32 << 10;

/// Makes the payloads of one channel.
pub trait Encoder: Send {
    /// The payload of a packet with these pages, in order. It is valid until the next call.
    ///
    /// # Errors
    /// [`CompressionError::Codec`]; the stream is of no use after that.
    fn encode(&mut self, pages: &[VolatileSlice<'_>]) -> Result<&[u8], CompressionError>;

    /// Compresses at this level from the packet after the next on, which ends what was begun at
    /// another. A method whose level does not change takes no notice.
    ///
    /// # Errors
    /// [`CompressionError::Codec`]; the stream is of no use after that.
    fn change_level(&mut self, _level: i8) -> Result<(), CompressionError> {
        Ok(())
    }
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

/// `page` cut into pieces that fit the scratch buffer.
#[cfg(any(feature = "zlib", feature = "zstd"))]
pub(super) fn pieces<'a>(
    page: &VolatileSlice<'a>,
) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
    let page = *page;
    (0..page.len())
        .step_by(SCRATCH_LEN)
        .filter_map(move |at| page.subslice(at, SCRATCH_LEN.min(page.len() - at)).ok())
}

#[cfg(any(feature = "zlib", feature = "zstd"))]
pub(super) fn codec<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> CompressionError {
    move |source| CompressionError::Codec {
        what,
        source: Arc::new(source.into()),
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
    /// The peer's stream refers further back than there is memory for.
    #[error(
        "the peer's zstd window is larger than the {max} bytes that a channel has for it; receive_memory \
        (MultifdConfig), of which each channel has an equal part, allows more"
    )]
    Window {
        /// The largest window that is taken, bytes.
        max: u64,
    },
    /// A channel's part of the memory is too little for any stream.
    #[error(
        "a channel has {got} bytes of memory and needs {least}; receive_memory (MultifdConfig) is too \
        little for so many"
    )]
    Memory {
        /// What it has.
        got: usize,
        /// What it needs.
        least: usize,
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
