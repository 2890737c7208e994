//! The sending side of the RAM section, from the announcement to every END after it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::error::SourceError;
use super::heat::Heat;
use super::pending::PendingPages;
#[cfg(feature = "staged")]
use crate::StagedRam;
use crate::raw::ram::{RAM_VERSION, encode_end_of_section};
use crate::raw::section;
use crate::raw::section::{Announcement, Continuation};
use crate::{
    DirtyLog, GuestRam, IdStr, InstanceId, PAGE_SIZE, PageTransport, SectionHeader, SectionId,
    StreamWriter, TransportCounters, TransportError, WhenToCompare,
};

/// Pages are taken from the bitmap in runs of at most this many: a multifd packet's worth. Budgets
/// and cancellation are looked at between runs.
const RUN_PAGES: u64 = 128;

/// RAM before it is announced. Announcing consumes it: what comes out can send pages, for precopy
/// and for any number of checkpoints, but has no way to run the set-up again.
///
/// Guest memory is the [transport's](crate::raw::transport::SendPages::ram): no other can be announced than is sent.
pub struct RamSetup<T, D> {
    /// Who knows what the guest writes.
    pub log: D,
    /// How pages leave.
    pub transport: T,
}

impl<T: PageTransport, D: DirtyLog> RamSetup<T, D> {
    /// Starts the dirty log and writes the START section: the block list, and a first
    /// synchronisation of the transport.
    ///
    /// # Errors
    /// The log's, the transport's, the stream's.
    pub fn announce(
        mut self,
        section: SectionId,
        out: &mut StreamWriter,
    ) -> Result<RamSender<T, D>, SourceError> {
        self.log.start()?;
        let ram = Arc::clone(self.transport.ram());
        let blocks = ram.blocks();
        let pending = if self.log.begins_with_every_page() {
            PendingPages::all(blocks)
        } else {
            PendingPages::none(blocks)
        };
        let mut bytes = bytes::BytesMut::new();
        SectionHeader {
            kind: Announcement::Start,
            id: section,
            idstr: IdStr::known(crate::raw::ram::RAM_IDSTR),
            instance: InstanceId(0),
            version: RAM_VERSION,
        }
        .encode(&mut bytes);
        out.write_bytes(&bytes)?;
        self.transport.announce(out, blocks)?;
        self.transport.sync(out)?;
        let mut sender = RamSender {
            log: self.log,
            transport: self.transport,
            section,
            pending,
            #[cfg(feature = "staged")]
            uncopied: None,
            unsynced: false,
            ahead: None,
            live: None,
        };
        sender.close_body(out)?;
        Ok(sender)
    }
}

/// How much one PART may take, or one round of [`RamSender::send_ahead`].
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Bytes on all channels, at least one run is sent.
    pub bytes: u64,
    /// No run begins after this.
    pub until: Instant,
}

/// Announced RAM: sends pages, in PART sections while the guest runs and in END sections while it
/// stands still. Dropping it stops the dirty log and ends the transport.
pub struct RamSender<T, D: DirtyLog> {
    log: D,
    transport: T,
    section: SectionId,
    pending: PendingPages,
    /// Those of them that were written since they were last copied, if they are being copied.
    #[cfg(feature = "staged")]
    uncopied: Option<PendingPages>,
    /// Pages were sent since the transport was last synchronised.
    unsynced: bool,
    /// What is known of how often pages are written, if they are sent ahead.
    ahead: Option<Heat>,
    /// Where another thread sees how far this is, if one looks.
    live: Option<Arc<Live>>,
}

/// How far a [`RamSender`] is, for another thread to see while it sends.
#[derive(Debug, Default)]
pub(super) struct Live(Mutex<Figures>);

/// What is seen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    pub(super) pending_pages: u64,
    pub(super) bytes: u64,
    pub(super) counters: TransportCounters,
}

impl Live {
    pub(super) fn get(&self) -> Figures {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, figures: Figures) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = figures;
    }
}

impl<T: PageTransport, D: DirtyLog> RamSender<T, D> {
    /// Pages still to be sent, as far as the log was read.
    #[must_use]
    pub const fn pending_pages(&self) -> u64 {
        self.pending.count()
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<dyn GuestRam> {
        self.transport.ram()
    }

    /// Bytes on every channel so far, and pages.
    #[must_use]
    pub fn counters(&self) -> TransportCounters {
        self.transport.counters()
    }

    /// See [`SendPages::failure`](crate::raw::transport::SendPages::failure).
    pub(super) fn transport_failure(&self) -> Option<TransportError> {
        self.transport.failure()
    }

    /// See [`SendPages::sends_differences`](crate::raw::transport::SendPages::sends_differences).
    #[must_use]
    pub fn sends_differences(&self) -> bool {
        self.transport.sends_differences()
    }

    /// See [`SendPages::leave_out_unchanged`](crate::raw::transport::SendPages::leave_out_unchanged).
    ///
    /// # Errors
    /// As there.
    pub fn leave_out_unchanged(&mut self, when: WhenToCompare) -> Result<bool, SourceError> {
        Ok(self.transport.leave_out_unchanged(when)?)
    }

    /// See [`SendPages::set_deadline`](crate::raw::transport::SendPages::set_deadline).
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.transport.set_deadline(deadline);
    }

    /// Reads the dirty log, and returns how many pages became pending by it.
    ///
    /// # Errors
    /// The log's.
    pub fn sync_dirty(&mut self) -> Result<u64, SourceError> {
        let mut added = 0;
        let pending = &mut self.pending;
        #[cfg(feature = "staged")]
        let uncopied = &mut self.uncopied;
        self.log.sync(&mut |block, first_page, word| {
            added += pending.or_word(block, first_page, word);
            #[cfg(feature = "staged")]
            if let Some(uncopied) = uncopied {
                uncopied.or_word(block, first_page, word);
            }
        })?;
        Ok(added)
    }

    /// From now on [`RamSender::send_ahead`] can be called between sections. False if it cannot: the
    /// transport has no channels beside the main stream.
    pub fn begin_ahead(&mut self) -> bool {
        let Some(beside) = self.transport.beside() else {
            return false;
        };
        beside.keep_order();
        self.ahead = Some(Heat::new(self.transport.ram().blocks()));
        true
    }

    /// Reads the dirty log, and sends pages ahead of the next section, beside the main stream, while
    /// the budget lasts; but for those that most of the last readings have reported, which would
    /// only have to be sent again. The guest may run: what it writes after the log was read is
    /// reported by the next reading, whatever was sent. Returns how many pages were sent when
    /// nothing of them waits any more.
    ///
    /// The receiver takes them in as it does pages of a section. It may be told to throw away what
    /// was sent since it last had all, as COLO's secondary does at a failover, and no section may
    /// come after that.
    ///
    /// # Errors
    /// The log's, the transport's.
    pub fn send_ahead(&mut self, budget: Budget) -> Result<u64, SourceError> {
        let (Some(heat), Some(beside)) = (&mut self.ahead, self.transport.beside()) else {
            return Ok(0);
        };
        let pending = &mut self.pending;
        heat.begin_round();
        self.log.sync(&mut |block, first_page, word| {
            pending.or_word(block, first_page, word);
            heat.note(block, first_page, word);
        })?;
        let mut sent = 0;
        let most = (budget.bytes / PAGE_SIZE).max(1);
        while sent < most && Instant::now() < budget.until {
            let room = (most - sent).min(RUN_PAGES);
            let Some(run) = pending.take_run_but(room, |block, index| heat.hot(block, index))
            else {
                break;
            };
            self.unsynced = true;
            beside.send_beside(run.block, run.first * PAGE_SIZE, run.pages)?;
            sent += run.pages;
        }
        if sent > 0 {
            beside.drain()?;
        }
        Ok(sent)
    }

    /// Sends pending pages in a PART section while the budget lasts.
    ///
    /// # Errors
    /// The transport's, the stream's.
    pub fn part(&mut self, out: &mut StreamWriter, budget: Budget) -> Result<(), SourceError> {
        let mut bytes = bytes::BytesMut::new();
        section::encode_continuation(Continuation::Part, self.section, &mut bytes);
        out.write_bytes(&bytes)?;
        let before = self.bytes(out);
        while self.send_run(out)? {
            if self.bytes(out) - before >= budget.bytes || Instant::now() >= budget.until {
                break;
            }
        }
        if self.pending.count() == 0 {
            self.sync(out)?;
            self.transport.begin_round();
        }
        self.close_body(out)
    }

    /// Reads the dirty log and sends all that is pending in an END section. The guest must stand
    /// still: what it wrote after the log was read would be lost. Returns how many pages were sent.
    ///
    /// # Errors
    /// The log's, the transport's, the stream's.
    pub fn end(&mut self, out: &mut StreamWriter) -> Result<u64, SourceError> {
        self.begin_end(out)?;
        self.sync_dirty()?;
        self.send_end(out)
    }

    /// Reads the dirty log, and copies what is pending into `staged`, the memory that this sender
    /// was made with, but for what was copied already and not written since. Returns how many
    /// pages were copied. The guest may run, and this be done again.
    ///
    /// # Errors
    /// The log's; memory that cannot be reached.
    #[cfg(feature = "staged")]
    pub fn copy(&mut self, staged: &StagedRam) -> Result<u64, SourceError> {
        self.copy_pending(staged, false)
    }

    /// As [`RamSender::copy`], with a guest that stands still: all that is pending is copied then,
    /// and the guest may run before it is sent, by [`RamSender::end_kept`].
    ///
    /// # Errors
    /// As for [`RamSender::copy`].
    #[cfg(feature = "staged")]
    pub fn keep(&mut self, staged: &StagedRam) -> Result<u64, SourceError> {
        let pages = self.copy_pending(staged, true)?;
        self.uncopied = None;
        staged.keep();
        Ok(pages)
    }

    /// Sends all that was pending when it was [kept](RamSender::keep) in an END section, and returns
    /// how many pages that were. The guest may run.
    ///
    /// # Errors
    /// The transport's, the stream's.
    #[cfg(feature = "staged")]
    pub fn end_kept(
        &mut self,
        out: &mut StreamWriter,
        staged: &StagedRam,
    ) -> Result<u64, SourceError> {
        self.begin_end(out)?;
        let pages = self.send_end(out)?;
        staged.release();
        Ok(pages)
    }

    #[cfg(feature = "staged")]
    fn copy_pending(&mut self, staged: &StagedRam, still: bool) -> Result<u64, SourceError> {
        self.uncopied.get_or_insert_with(|| self.pending.clone());
        self.sync_dirty()?;
        let Some(uncopied) = &mut self.uncopied else {
            return Ok(0);
        };
        let pages = uncopied.count();
        let runs: Vec<_> = std::iter::from_fn(|| uncopied.take_run(RUN_PAGES)).collect();
        staged.copy(&runs, still)?;
        Ok(pages)
    }

    fn begin_end(&mut self, out: &mut StreamWriter) -> Result<(), SourceError> {
        let mut bytes = bytes::BytesMut::new();
        section::encode_continuation(Continuation::End, self.section, &mut bytes);
        out.write_bytes(&bytes)?;
        // Pages on their way must land before newer copies of them follow on another channel; those
        // that were sent ahead are in order as it is.
        if self.unsynced && self.ahead.is_none() {
            self.sync(out)?;
        }
        Ok(())
    }

    fn send_end(&mut self, out: &mut StreamWriter) -> Result<u64, SourceError> {
        self.transport.begin_round();
        let pages = self.pending.count();
        while self.send_run(out)? {}
        self.sync(out)?;
        self.transport.complete()?;
        self.close_body(out)?;
        Ok(pages)
    }

    /// Bytes on the main stream and the channels.
    pub(super) fn bytes(&self, out: &StreamWriter) -> u64 {
        out.offset() + self.transport.counters().channel_bytes
    }

    fn figures(&self, out: &StreamWriter) -> Figures {
        let counters = self.transport.counters();
        Figures {
            pending_pages: self.pending.count(),
            bytes: out.offset() + counters.channel_bytes,
            counters,
        }
    }

    /// Lets another thread see how far this is.
    pub(super) fn watch(&mut self, out: &StreamWriter) -> Arc<Live> {
        let live = Arc::new(Live::default());
        live.set(self.figures(out));
        self.live = Some(Arc::clone(&live));
        live
    }

    /// Nobody looks any more.
    pub(super) fn unwatch(&mut self) {
        self.live = None;
    }

    fn send_run(&mut self, out: &mut StreamWriter) -> Result<bool, SourceError> {
        let Some(run) = self.pending.take_run(RUN_PAGES) else {
            return Ok(false);
        };
        self.unsynced = true;
        self.transport
            .send(out, run.block, run.first * PAGE_SIZE, run.pages)?;
        if let Some(live) = &self.live {
            live.set(self.figures(out));
        }
        Ok(true)
    }

    fn sync(&mut self, out: &mut StreamWriter) -> Result<(), SourceError> {
        self.transport.sync(out)?;
        self.unsynced = false;
        Ok(())
    }

    fn close_body(&mut self, out: &mut StreamWriter) -> Result<(), SourceError> {
        self.transport.end_section(out)?;
        let mut bytes = bytes::BytesMut::new();
        encode_end_of_section(&mut bytes);
        section::encode_footer(self.section, &mut bytes);
        Ok(out.write_bytes(&bytes)?)
    }
}

impl<T, D: DirtyLog> Drop for RamSender<T, D> {
    fn drop(&mut self) {
        // Nobody is left to be told: the log only costs time where it goes on.
        let _ = self.log.stop();
    }
}

impl<T: PageTransport, D> fmt::Debug for RamSetup<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamSetup")
            .field("blocks", self.transport.ram().blocks())
            .finish_non_exhaustive()
    }
}

impl<T, D: DirtyLog> fmt::Debug for RamSender<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamSender")
            .field("pending", &self.pending.count())
            .finish_non_exhaustive()
    }
}
