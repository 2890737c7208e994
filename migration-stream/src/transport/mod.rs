//! How pages cross: records in the main stream, or multifd's channels beside it.

mod error;

pub use self::error::TransportError;
use std::sync::Arc;
use std::time::Instant;

use crate::io::CancelToken;
use crate::ram::{BlockId, RamBlockTable};
use crate::raw::ram::encode_setup_list;
use crate::raw::rate::RateLimiter;
use crate::raw::transport::PagesBeside;
use crate::{GuestRam, StreamWriter, WhenToCompare, XbzrleCounters};

/// How pages leave. One transport serves precopy and every COLO checkpoint after it.
pub trait PageTransport: Send {
    /// The memory whose pages this sends. There is no other: whoever sends by this transport takes
    /// blocks, dirty pages and copies from here.
    fn ram(&self) -> &Arc<dyn GuestRam>;

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

    /// The body of a RAM section is about to end.
    ///
    /// # Errors
    /// As for [`PageTransport::send`].
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
    /// As for [`PageTransport::send`].
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
    /// As for [`PageTransport::send`].
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

impl<T: PageTransport + ?Sized> PageTransport for Box<T> {
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

/// What a [`PageTransport`] has sent since it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportCounters {
    /// Pages sent with their data.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages that were compared with what was sent of them before.
    pub compared_pages: u64,
    /// Pages that were left out because they were sent like that before.
    pub unchanged_pages: u64,
    /// Bytes on channels other than the main stream.
    pub channel_bytes: u64,
    /// Pages sent as differences.
    pub xbzrle: XbzrleCounters,
    /// Synchronisations of a channel before which the kernel copied pages that were to be sent
    /// without (`dirty-sync-missed-zero-copy`).
    pub missed_zero_copy: u64,
}
