//! How pages cross, for those who implement it: channels beside the main stream, and what a receiver waits with.

use std::fmt;
use std::time::Instant;

use crate::io::CancelToken;
use crate::ram::BlockId;
use crate::raw::mapped_ram::{MappedArea, MappedPages};
use crate::raw::ram::RamError;
use crate::{PageStore, TransportError};

/// Channels beside the main stream, for pages that belong to no section of it.
pub trait PagesBeside {
    /// From now on pages of one place, those of [`PageTransport::send`](crate::PageTransport::send) included, land in the order
    /// in which they were sent, without a [`PageTransport::sync`](crate::PageTransport::sync) in between.
    fn keep_order(&mut self);

    /// Sends pages as [`PageTransport::send`](crate::PageTransport::send) does, and nothing on the main stream.
    ///
    /// # Errors
    /// As there.
    fn send_beside(
        &mut self,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError>;

    /// Returns when all that was sent has been read out of memory and has left.
    ///
    /// # Errors
    /// As there.
    fn drain(&mut self) -> Result<(), TransportError>;
}

/// What waits for the pages of other channels on the receiving side.
pub trait PageBarrier: Send {
    /// The main stream carried a MULTIFD_FLUSH record: returns when every channel has reached its
    /// SYNC packet and all pages before it have landed, and lets the channels go on.
    ///
    /// # Errors
    /// A channel broke or is late; for a stream without multifd, that the record came at all.
    fn flush(&mut self) -> Result<(), TransportError>;

    /// Whether pages come on channels, so that memory is complete only behind a
    /// [`PageBarrier::flush`].
    fn has_channels(&self) -> bool;

    /// Checks that every channel was flushed behind its last page, and keeps the channels from
    /// taking in another page as long as the result lives. [`HeldChannels::none`] where there are
    /// no channels.
    ///
    /// # Errors
    /// A page came on a channel after its last SYNC packet, or a packet that was begun does not
    /// end before the deadline.
    fn hold(&mut self) -> Result<HeldChannels, TransportError>;

    /// Loads the pages of a block of a stream with `mapped-ram`, and returns when all are in the
    /// store.
    ///
    /// # Errors
    /// The file's, the store's; without a file that there is none.
    fn load_mapped(
        &mut self,
        block: BlockId,
        area: &MappedArea,
        store: &dyn PageStore,
    ) -> Result<MappedPages, TransportError> {
        let _ = (block, area, store);
        Err(TransportError::main(RamError::NoFile))
    }

    /// As [`PageTransport::set_deadline`](crate::PageTransport::set_deadline).
    fn set_deadline(&mut self, deadline: Option<Instant>);

    /// Lets `token` end every wait for a channel, and the loading of a file. Without channels or a file nothing is
    /// to be done.
    fn set_cancel(&mut self, token: &CancelToken) {
        let _ = token;
    }

    /// Returns the first error of the channels, as [`PageTransport::failure`](crate::PageTransport::failure) does: to be asked when the
    /// main stream could not be read.
    fn failure(&self) -> Option<TransportError> {
        None
    }
}

/// Channels that take in no page as long as this lives. They go on when it is dropped.
#[must_use = "the channels go on when this is dropped"]
pub struct HeldChannels(Option<Box<dyn Send>>);

impl HeldChannels {
    /// There are no channels to hold.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Channels that go on when `guard` is dropped.
    pub fn until_dropped(guard: impl Send + 'static) -> Self {
        Self(Some(Box::new(guard)))
    }

    /// Whether there are channels.
    #[must_use]
    pub const fn is_any(&self) -> bool {
        self.0.is_some()
    }
}

impl fmt::Debug for HeldChannels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HeldChannels").field(&self.is_any()).finish()
    }
}
