//! A channel as the sets take it: one direction of a connection, and how to end it from outside.

use std::fmt;

use std::sync::Arc;

use migration_stream::io::{ByteSink, ByteSource, FdChannel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Ends a connection from another thread: a call that is blocked in it, or comes later, returns
/// with an error or the end of the stream, soon and for good.
type Closer = Box<dyn Fn() + Send + Sync>;

/// Says whether the peer has closed a connection, as far as that is known here yet.
pub(crate) type IsClosed = Arc<dyn Fn() -> bool + Send + Sync>;

/// The sending side of a channel whose handshake is done.
pub struct SendChannel {
    pub(crate) sink: Box<dyn ByteSink>,
    pub(crate) close: Closer,
    /// Where it can be known without a write.
    pub(crate) is_closed: Option<IsClosed>,
}

impl SendChannel {
    /// A channel into `sink`. `close` must end it: a write that is blocked, or comes later, returns
    /// soon with an error. A set that is abandoned calls it, and then waits for the writers.
    pub fn new(sink: impl ByteSink + 'static, close: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            sink: Box::new(sink),
            close: Box::new(close),
            is_closed: None,
        }
    }
}

impl From<FdChannel> for SendChannel {
    fn from(channel: FdChannel) -> Self {
        let closer = channel.share();
        let looker = channel.share();
        Self {
            is_closed: Some(Arc::new(move || peer_has_closed(&looker))),
            ..Self::new(channel, move || closer.shutdown())
        }
    }
}

/// A receiver never writes on a channel, so one that ends its writing has gone.
fn peer_has_closed(channel: &FdChannel) -> bool {
    let mut fds = [PollFd::new(channel, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().intersects(gone))
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
