//! The order of things, so that at every moment somebody has the guest.
//!
//! A source stands still once it has sent everything, and lets go of its guest when it hears that
//! it was taken over. It hears that
//!
//! - when the guest is on disk, if there is a store;
//! - otherwise when the destination has confirmed it: until then nobody but the source has it for
//!   good. The guest stands still for as long as that takes.
//!
//! Whatever fails before gives the guest back to its source, where it runs on.

use std::path::PathBuf;
use std::sync::Arc;

use migration_stream::precopy::TargetError;

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
            (Origin::Source(_), None) if self.to.is_none() => return Err(RelayError::Nothing),
            (Origin::Store { max_memory }, Some(dir)) => {
                let guest = store::load(dir, max_memory, progress).map_err(RelayError::Load)?;
                (guest, None)
            }
            (Origin::Source(incoming), dir) => {
                if let Some(dir) = dir {
                    store::check_free(dir).map_err(RelayError::Save)?;
                }
                let received = incoming.receive(progress)?;
                report.received = Some(received.figures);
                let guest = received.guest.clone();
                let Some(dir) = dir else {
                    return self.to.map_or(Err(RelayError::Nothing), |to| {
                        report.sent = Some(hand_over(received, &to, progress)?);
                        Ok(report)
                    });
                };
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

/// From the source to the destination, with nothing in between.
fn hand_over(
    received: Received,
    to: &OutgoingConfig,
    progress: &Progress,
) -> Result<Figures, RelayError> {
    match outgoing::send(&received.guest, to, progress) {
        Ok(sent) => {
            received
                .confirm()
                .map_err(RelayError::SourceAndDestination)?;
            Ok(sent)
        }
        Err(error) if received.is_awaited() => {
            received.refuse();
            Err(RelayError::Outgoing(error))
        }
        Err(error) => Err(RelayError::Lost(error)),
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
