//! How pages cross, for those who implement it: [`SendPages`] on the way out, [`PageBarrier`] on the way in.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::io::CancelToken;
use crate::ram::{BlockId, RamBlockTable};
use crate::raw::mapped_ram::{MappedArea, MappedPages};
use crate::raw::ram::{RamError, encode_setup_list};
use crate::raw::rate::RateLimiter;
use crate::{GuestRam, PageStore, StreamWriter, TransportCounters, TransportError, WhenToCompare};

/// How pages leave. One transport serves precopy and every COLO checkpoint after it.
pub trait SendPages: Send {
    /// The memory whose pages this sends. There is no other: whoever sends by this transport takes
    /// blocks, dirty pages and copies from here.
    fn ram(&self) -> &Arc<dyn GuestRam>;

    /// Sends `pages` pages of `block` from byte `offset` on, in-stream ones through `main`. The
    /// transport may still hold them when this returns; [`SendPages::sync`] is what lets go.
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
    /// As for [`SendPages::send`].
    fn sync(&mut self, main: &mut StreamWriter) -> Result<(), TransportError>;

    /// The body of a RAM section is about to end.
    ///
    /// # Errors
    /// As for [`SendPages::send`].
    fn end_section(&mut self, _main: &mut StreamWriter) -> Result<(), TransportError> {
        Ok(())
    }

    /// Another round over guest memory begins, or a checkpoint.
    fn begin_round(&mut self) {}

    /// From now on pages are left out whose content was sent last, so that the receiver has it: see
    /// [`unchanged`](crate::raw::unchanged). Only for a receiver that keeps what it was sent whatever becomes of
    /// its own memory, as COLO's secondary does. False if the transport leaves out none.
    ///
    /// # Errors
    /// There is no memory or no key for it. All pages are sent then.
    fn leave_out_unchanged(&mut self, when: WhenToCompare) -> Result<bool, TransportError> {
        let _ = when;
        Ok(false)
    }

    /// Whether pages may go as differences to what was sent before (the capability `xbzrle`), which
    /// no COLO checkpoint can follow.
    fn sends_differences(&self) -> bool {
        false
    }

    /// The capability that the configuration section has to name because pages cross like this.
    fn capability(&self) -> Option<&'static str> {
        None
    }

    /// Writes the list of the blocks whose pages will come, the body of the section that sets RAM
    /// up.
    ///
    /// # Errors
    /// As for [`SendPages::send`].
    fn announce(
        &mut self,
        main: &mut StreamWriter,
        blocks: &RamBlockTable,
    ) -> Result<(), TransportError> {
        let mut bytes = Vec::new();
        encode_setup_list(blocks, &mut bytes);
        main.write_bytes(&bytes).map_err(TransportError::main)
    }

    /// The guest has stopped and all pages were sent and synchronised: what is still to be done
    /// about them before the last RAM section ends.
    ///
    /// # Errors
    /// As for [`SendPages::send`].
    fn complete(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    /// No channel of the transport may block longer than until `deadline`; `None`: its own limit.
    fn set_deadline(&mut self, deadline: Option<Instant>);

    /// Has every byte paid for before a channel of the transport writes it. The main stream pays for itself, so a
    /// transport without other channels need not do anything.
    fn set_limiter(&mut self, limiter: &Arc<RateLimiter>) {
        let _ = limiter;
    }

    /// Lets `token` end every wait for a channel. A transport without other channels need not do anything.
    fn set_cancel(&mut self, token: &CancelToken) {
        let _ = token;
    }

    /// What was sent so far.
    fn counters(&self) -> TransportCounters;

    /// Returns the first error of the transport's channels, if there was one.
    ///
    /// For a main stream that failed: a channel may have failed before, and its error is the cause then.
    /// An implementation may wait a moment (a tenth of a second) for a channel that is about to report,
    /// and must not wait longer.
    fn failure(&self) -> Option<TransportError> {
        None
    }

    /// The transport's channels, if pages can leave on them while the main stream says nothing.
    fn beside(&mut self) -> Option<&mut dyn PagesBeside> {
        None
    }
}

impl<T: SendPages + ?Sized> SendPages for Box<T> {
    fn ram(&self) -> &Arc<dyn GuestRam> {
        (**self).ram()
    }
    fn send(
        &mut self,
        main: &mut StreamWriter,
        block: BlockId,
        offset: u64,
        pages: u64,
    ) -> Result<(), TransportError> {
        (**self).send(main, block, offset, pages)
    }
    fn sync(&mut self, main: &mut StreamWriter) -> Result<(), TransportError> {
        (**self).sync(main)
    }
    fn end_section(&mut self, main: &mut StreamWriter) -> Result<(), TransportError> {
        (**self).end_section(main)
    }
    fn begin_round(&mut self) {
        (**self).begin_round();
    }
    fn leave_out_unchanged(&mut self, when: WhenToCompare) -> Result<bool, TransportError> {
        (**self).leave_out_unchanged(when)
    }
    fn sends_differences(&self) -> bool {
        (**self).sends_differences()
    }
    fn capability(&self) -> Option<&'static str> {
        (**self).capability()
    }
    fn announce(
        &mut self,
        main: &mut StreamWriter,
        blocks: &RamBlockTable,
    ) -> Result<(), TransportError> {
        (**self).announce(main, blocks)
    }
    fn complete(&mut self) -> Result<(), TransportError> {
        (**self).complete()
    }
    fn set_deadline(&mut self, deadline: Option<Instant>) {
        (**self).set_deadline(deadline);
    }
    fn set_limiter(&mut self, limiter: &Arc<RateLimiter>) {
        (**self).set_limiter(limiter);
    }
    fn set_cancel(&mut self, token: &CancelToken) {
        (**self).set_cancel(token);
    }
    fn counters(&self) -> TransportCounters {
        (**self).counters()
    }
    fn failure(&self) -> Option<TransportError> {
        (**self).failure()
    }
    fn beside(&mut self) -> Option<&mut dyn PagesBeside> {
        (**self).beside()
    }
}

/// Channels beside the main stream, for pages that belong to no section of it.
pub trait PagesBeside {
    /// From now on pages of one place, those of [`SendPages::send`] included, land in the order
    /// in which they were sent, without a [`SendPages::sync`] in between.
    fn keep_order(&mut self);

    /// Sends pages as [`SendPages::send`] does, and nothing on the main stream.
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

    /// As [`SendPages::set_deadline`].
    fn set_deadline(&mut self, deadline: Option<Instant>);

    /// Lets `token` end every wait for a channel, and the loading of a file. Without channels or a file nothing is
    /// to be done.
    fn set_cancel(&mut self, token: &CancelToken) {
        let _ = token;
    }

    /// Returns the first error of the channels, as [`SendPages::failure`] does: to be asked when the
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
