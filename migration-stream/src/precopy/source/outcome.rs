//! How a migration ended.

use std::time::Duration;

use super::Progress;
use crate::io::deadline_after;
use crate::precopy::error::SourceError;
use crate::precopy::handover::{Offer, Verdict, verdict};
use crate::precopy::ram::RamSender;
use crate::precopy::return_path::ReturnPathReader;
use crate::{DirtyLog, PageTransport, StreamWriter};

/// How a migration ended.
///
/// The library resumes the guest for [`HandOver::Failed`] and never otherwise.
#[derive(Debug)]
#[must_use = "only the VMM can decide what becomes of a guest whose hand-over is unknown"]
pub enum HandOver<T, D: DirtyLog> {
    /// The destination has the guest.
    Completed(SwitchedOver<T, D>),
    /// The destination does not have the guest and cannot come to run it. The guest is still the
    /// source's: it runs on, if it ran before.
    Failed(SourceError),
    /// Everything that lets the destination run the guest was sent, and no answer came. The guest
    /// stays paused here, because it may run there.
    Unknown(Unresolved<T, D>),
}

impl<T: PageTransport, D: DirtyLog> HandOver<T, D> {
    /// Returns what was handed over, for callers to whom an unknown outcome is an error like others.
    ///
    /// # Errors
    /// The cause of a failure, or [`SourceError::OutcomeUnknown`]; the guest then stays paused.
    pub fn completed(self) -> Result<SwitchedOver<T, D>, SourceError> {
        match self {
            Self::Completed(switched) => Ok(switched),
            Self::Failed(error) => Err(error),
            Self::Unknown(unresolved) => Err(unresolved.into_error()),
        }
    }
}

/// A guest that was sent completely, without an answer whether the destination has it.
///
/// The answer may still come: see [`Unresolved::wait`]. Dropping this closes the connection, by which a
/// destination that confirms before it runs the guest, and has not yet, learns that it must not.
#[derive(Debug)]
pub struct Unresolved<T, D: DirtyLog> {
    pub(super) cause: SourceError,
    pub(super) offer: Offer,
    /// The return path has ended: nothing more can come.
    pub(super) silent: bool,
    pub(super) switched: SwitchedOver<T, D>,
}

impl<T: PageTransport, D: DirtyLog> Unresolved<T, D> {
    /// Returns why no answer is known.
    #[must_use]
    pub const fn cause(&self) -> &SourceError {
        &self.cause
    }

    /// Returns whether an answer can still come on this connection.
    #[must_use]
    pub const fn can_be_answered(&self) -> bool {
        !self.silent && self.switched.return_path.is_some()
    }

    /// Closes the connection, and returns an error that says what is not known.
    #[must_use]
    pub fn into_error(self) -> SourceError {
        SourceError::OutcomeUnknown {
            cause: Box::new(self.cause),
        }
    }

    /// Waits for the answer for at most `limit`. The guest is not resumed here for a refusal: the
    /// VMM does that for [`HandOver::Failed`].
    pub fn wait(mut self, limit: Duration) -> HandOver<T, D> {
        let Some(return_path) = self.switched.return_path.as_mut().filter(|_| !self.silent) else {
            return HandOver::Unknown(self);
        };
        let heard = return_path.wait_for_answer(deadline_after(limit));
        match verdict(self.offer, heard.answer, heard.confirms_first) {
            Verdict::Completed => HandOver::Completed(self.switched),
            Verdict::Failed => HandOver::Failed(heard.error.unwrap_or(self.cause)),
            Verdict::Unknown => {
                self.silent = heard.is_over;
                HandOver::Unknown(self)
            }
        }
    }
}

/// A guest that has been handed over: everything it had was sent and, with a return path,
/// confirmed. It stands still here. Dropping this ends the migration; COLO goes on from it.
#[derive(Debug)]
pub struct SwitchedOver<T, D: DirtyLog> {
    /// The main stream.
    pub out: StreamWriter,
    /// The return path, if there is one. It carries no more return-path messages.
    pub return_path: Option<ReturnPathReader>,
    /// Guest memory: it can send dirty pages, it cannot be announced again.
    pub ram: RamSender<T, D>,
    /// The last figures.
    pub progress: Progress,
    /// From the stop of the guest to the confirmation.
    pub downtime: Duration,
}
