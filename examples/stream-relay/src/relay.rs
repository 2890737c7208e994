//! The order of things, so that at every moment somebody has the guest.
//!
//! A source stands still once it has sent everything, and lets go of its guest when it hears that
//! it was taken over. It hears that
//!
//! - when the guest is on disk, if there is a store;
//! - otherwise when the destination has confirmed it: until then nobody but the source has it for
//!   good. Pages are passed on as they come, so that little is left when the source's guest stops.
//!
//! Whatever fails before gives the guest back to its source, where it runs on.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use migration_stream::precopy::TargetError;

use crate::arrival::Arrival;
use crate::incoming::{Incoming, IncomingError, Received};
use crate::outgoing::{self, OutgoingConfig, OutgoingError};
use crate::progress::{Figures, Progress};
use crate::store::{self, StoreError};

/// Where the guest comes from.
#[derive(Debug)]
pub enum Origin {
    /// A source.
    Source(Box<Incoming>),
    /// What was kept.
    Store {
        /// How much memory the guest may have, bytes.
        max_memory: u64,
        /// How much device state it may have, bytes.
        max_device_state: usize,
    },
}

/// What is to be done.
#[derive(Debug)]
pub struct Relay {
    /// Where the guest comes from.
    pub from: Origin,
    /// The directory in which it is kept in between, or which it comes from.
    pub store: Option<PathBuf>,
    /// Where it goes; `None`: it is kept.
    pub to: Option<OutgoingConfig>,
    /// Whether the store goes once the destination has the guest.
    pub remove_store: bool,
}

/// What it cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// From the source.
    pub received: Option<Figures>,
    /// To the destination.
    pub sent: Option<Figures>,
}

impl Relay {
    /// Does it.
    ///
    /// # Errors
    /// [`RelayError`], which says who has the guest.
    pub fn run(self, progress: &Arc<Progress>) -> Result<Report, RelayError> {
        if let Some(to) = &self.to {
            to.check().map_err(RelayError::Outgoing)?;
        }
        let mut report = Report::default();
        let (guest, received) = match (self.from, &self.store) {
            (Origin::Store { .. }, None) => return Err(RelayError::Nothing),
            (
                Origin::Store {
                    max_memory,
                    max_device_state,
                },
                Some(dir),
            ) => {
                let guest = store::load(dir, max_memory, max_device_state, progress)
                    .map_err(RelayError::Load)?;
                (guest, None)
            }
            (Origin::Source(incoming), dir) => {
                if let Some(dir) = dir {
                    store::check_free(dir).map_err(RelayError::Save)?;
                }
                let (dir, to) = (dir.as_ref(), self.to.as_ref());
                let dir = match (dir, to) {
                    (Some(dir), _) => dir,
                    (None, Some(to)) => return hand_over(*incoming, to, progress),
                    (None, None) => return Err(RelayError::Nothing),
                };
                let received = incoming.receive(progress)?;
                report.received = Some(received.figures);
                let guest = received.guest.clone();
                if let Err(error) = store::save(&guest, dir, progress) {
                    received.refuse();
                    return Err(RelayError::Save(error));
                }
                (guest, Some(received))
            }
        };
        if let Some(received) = received {
            received.confirm().map_err(RelayError::SourceAndStore)?;
        }
        if let Some(to) = &self.to {
            let sent = outgoing::send(&guest, to, progress).map_err(RelayError::Kept)?;
            report.sent = Some(sent);
            if let (true, Some(dir)) = (self.remove_store, &self.store) {
                store::remove(dir).map_err(RelayError::Remove)?;
            }
        }
        Ok(report)
    }
}

/// From the source to the destination while it comes.
fn hand_over(
    incoming: Incoming,
    to: &OutgoingConfig,
    progress: &Arc<Progress>,
) -> Result<Report, RelayError> {
    let announced = incoming.announced(progress)?;
    let cancel = announced.cancel_token().clone();
    let arrival = Arc::new(Arrival::new(
        Arc::clone(&announced.memory),
        announced.configuration.clone(),
        announced.early().clone(),
    ));
    // Here once all has come, until the destination has it.
    let here = Mutex::new(None::<Received>);
    let lock = || here.lock().unwrap_or_else(PoisonError::into_inner);
    // A source that has gone runs its guest on: nobody else must get it.
    let may_leave = || match &mut *lock() {
        Some(received) => !received.is_awaited() || received.source_waits(),
        None => false,
    };
    let (received, sent, was_coming) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let ending = Ending(&arrival);
            let received = announced.receive(progress).map(|received| {
                let devices = received.guest.devices.clone();
                *lock() = Some(received);
                arrival.end(Some(devices));
            });
            drop(ending);
            received
        });
        let sent = outgoing::forward(&arrival, to, progress, &may_leave);
        // What ends first is the reason why the other does.
        let was_coming = !arrival.has_failed();
        if sent.is_err() && arrival.is_coming() {
            cancel.cancel();
        }
        let received = receiving.join();
        (
            received.unwrap_or_else(|panic| resume_unwind(panic)),
            sent,
            was_coming,
        )
    });
    let received = received.and_then(|()| lock().take().ok_or(IncomingError::Gone));
    match (received, sent) {
        (Ok(received), Ok(sent)) => {
            let report = Report {
                received: Some(received.figures),
                sent: Some(sent),
            };
            received
                .confirm()
                .map_err(RelayError::SourceAndDestination)?;
            Ok(report)
        }
        (Err(error), Ok(_)) => Err(error.into()),
        (Err(error), Err(_)) if !was_coming => Err(error.into()),
        (Ok(received), Err(error)) if received.is_only_here() => {
            drop(received);
            Err(RelayError::Lost(error))
        }
        // Neither answer would be true: the destination may run the guest, or may not.
        (Ok(received), Err(error @ OutgoingError::Unconfirmed(_))) => Err(RelayError::Uncertain {
            cause: error,
            waiting: WaitingSource(Box::new(Mutex::new(received))),
        }),
        (received, Err(error)) => {
            if let Ok(received) = received {
                received.refuse();
            }
            Err(RelayError::Outgoing(error))
        }
    }
}

/// A source whose guest stays paused because nobody has answered it. Dropping this closes the connection:
/// QEMU's source then lets its guest run on, ours leaves the decision to its operator.
#[derive(Debug)]
pub struct WaitingSource(Box<Mutex<Received>>);

impl WaitingSource {
    /// Returns whether the source is still there.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        received.source_waits()
    }
}

/// Whoever waits for an arrival waits no longer than its receiver lives.
struct Ending<'a>(&'a Arrival);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if self.0.is_coming() {
            self.0.end(None);
        }
    }
}

/// Why the relay ended before its time, and who has the guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// There is nothing to do with the guest, or none.
    #[error("there must be a source or a store, and a destination or a store")]
    Nothing,
    /// It could not be taken.
    #[error("the guest was not taken and runs on at its source")]
    Incoming(#[from] IncomingError),
    /// It could not be saved.
    #[error("the guest was not saved and is still at its source")]
    Save(#[source] StoreError),
    /// It could not be read back.
    #[error("the guest could not be read from its store")]
    Load(#[source] StoreError),
    /// It could not be given away; the source waited.
    #[error("the guest was not given away and is still at its source")]
    Outgoing(#[source] OutgoingError),
    /// The destination may have it or not. The source was not answered: it keeps its guest paused as
    /// long as `waiting` lives.
    #[error(
        "the destination may run the guest or not, and the source was told neither: if the \
         destination is dead, end the relay, and the guest runs on at its source; if the \
         destination runs the guest, end the source"
    )]
    Uncertain {
        /// Why it is not known.
        #[source]
        cause: OutgoingError,
        /// The source, which waits for an answer.
        waiting: WaitingSource,
    },
    /// It could not be given away, and is in the store.
    #[error("the guest was not given away and is still in its store")]
    Kept(#[source] OutgoingError),
    /// It could not be given away, and the source had not waited.
    #[error("the guest was not given away, and its source did not wait to hear of it")]
    Lost(#[source] OutgoingError),
    /// The guest is in the store, and the source may not know.
    #[error("the guest is in its store, but its source was not told and may run it on")]
    SourceAndStore(#[source] TargetError),
    /// The guest is at the destination, and the source may not know.
    #[error("the guest is at its destination, but its source was not told and may run it on")]
    SourceAndDestination(#[source] TargetError),
    /// The guest is at the destination, and still in the store.
    #[error("the guest is at its destination, but the store could not be removed")]
    Remove(#[source] StoreError),
}
