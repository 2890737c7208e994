//! How pages cross: records in the main stream, or multifd's channels beside it.

use std::time::Instant;
use std::{error, fmt, io};

use crate::io::{ByteSink, Chunk};
use crate::ram::BlockId;

/// The writer of a main stream: a sink and the offset reached in it.
pub struct StreamWriter {
    sink: Box<dyn ByteSink>,
    offset: u64,
}

impl StreamWriter {
    /// A stream that begins here.
    #[must_use]
    pub fn new(sink: impl ByteSink + 'static) -> Self {
        Self {
            sink: Box::new(sink),
            offset: 0,
        }
    }

    /// Writes all chunks in order.
    ///
    /// # Errors
    /// The sink's.
    pub fn write(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        self.sink.write_all(chunks)?;
        self.offset += chunks.iter().map(|c| c.len() as u64).sum::<u64>();
        Ok(())
    }

    /// Writes our own bytes.
    ///
    /// # Errors
    /// The sink's.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write(&[Chunk::Bytes(bytes)])
    }

    /// Bytes written since the stream began.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// See [`ByteSink::set_write_deadline`].
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.sink.set_write_deadline(deadline);
    }
}

impl fmt::Debug for StreamWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamWriter")
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

/// How pages leave. One transport serves precopy and every COLO checkpoint after it.
pub trait PageTransport: Send {
    /// Sends `pages` pages of `block` from byte `offset` on, in-stream ones through `main`. The
    /// transport may still hold them when this returns; [`PageTransport::sync`] is what lets go.
    ///
    /// # Errors
    /// A channel broke, or memory could not be read.
    fn send(
        &mut self,
        main: &mut StreamWriter,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError>;

    /// Pages sent before this are in the receiver's memory before any sent after it, and before
    /// the receiver reads what `main` carries next. Called inside a RAM section's body.
    ///
    /// # Errors
    /// As for [`PageTransport::send`].
    fn sync(&mut self, main: &mut StreamWriter) -> Result<(), TransportError>;

    /// No channel of the transport may block longer than until `deadline`; `None`: its own limit.
    fn set_deadline(&mut self, deadline: Option<Instant>);

    /// What was sent so far.
    fn counters(&self) -> TransportCounters;
}

/// What a [`PageTransport`] has sent since it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportCounters {
    /// Pages sent with their data.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Bytes on channels other than the main stream.
    pub channel_bytes: u64,
}

/// What waits for the pages of other channels on the receiving side.
pub trait PageBarrier: Send {
    /// The main stream carried a MULTIFD_FLUSH record: returns when every channel has reached its
    /// SYNC packet and all pages before it have landed, and lets the channels go on.
    ///
    /// # Errors
    /// A channel broke or is late; for a stream without multifd, that the record came at all.
    fn flush(&mut self) -> Result<(), TransportError>;

    /// As [`PageTransport::set_deadline`].
    fn set_deadline(&mut self, deadline: Option<Instant>);
}

/// Why pages could not cross.
#[derive(Debug, thiserror::Error)]
#[error("{}{source}", .channel.map(|c| format!("multifd channel {c}: ")).unwrap_or_default())]
pub struct TransportError {
    /// The multifd channel, `None` for the main stream.
    pub channel: Option<u8>,
    /// The cause; a transport's documentation says which type to downcast to.
    pub source: Box<dyn error::Error + Send + Sync>,
}

impl TransportError {
    /// An error of the main stream.
    pub fn main(source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        Self {
            channel: None,
            source: source.into(),
        }
    }

    /// An error of a multifd channel.
    pub fn channel(channel: u8, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        Self {
            channel: Some(channel),
            source: source.into(),
        }
    }
}
