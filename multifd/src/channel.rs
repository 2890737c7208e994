//! A channel as the sets take it: one direction of a connection, and how to end it from outside.

use std::fmt;

use migration_stream::io::{ByteSink, ByteSource, FdChannel};

/// Ends a connection from another thread: a call that is blocked in it, or comes later, returns
/// with an error or the end of the stream, soon and for good.
type Closer = Box<dyn Fn() + Send + Sync>;

/// The sending side of a channel whose handshake is done.
pub struct SendChannel {
    pub(crate) sink: Box<dyn ByteSink>,
    pub(crate) close: Closer,
}

impl SendChannel {
    /// A channel into `sink`. `close` must end it: a write that is blocked, or comes later, returns
    /// soon with an error. A set that is abandoned calls it, and then waits for the writers.
    pub fn new(sink: impl ByteSink + 'static, close: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            sink: Box::new(sink),
            close: Box::new(close),
        }
    }
}

impl From<FdChannel> for SendChannel {
    fn from(channel: FdChannel) -> Self {
        let closer = channel.share();
        Self::new(channel, move || closer.shutdown())
    }
}

impl fmt::Debug for SendChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendChannel").finish_non_exhaustive()
    }
}

/// The receiving side of a channel whose handshake is done.
pub struct RecvChannel {
    pub(crate) source: Box<dyn ByteSource>,
    pub(crate) close: Closer,
}

impl RecvChannel {
    /// A channel from `source`. `close` must end it: a read that is blocked, or comes later,
    /// returns soon with an error or the end of the stream.
    pub fn new(
        source: impl ByteSource + 'static,
        close: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            source: Box::new(source),
            close: Box::new(close),
        }
    }
}

impl From<FdChannel> for RecvChannel {
    fn from(channel: FdChannel) -> Self {
        let closer = channel.share();
        Self::new(channel, move || closer.shutdown())
    }
}

impl fmt::Debug for RecvChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvChannel").finish_non_exhaustive()
    }
}
