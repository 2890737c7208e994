//! A guest that has arrived, on its way to run here.
//!
//! ```text
//! Target::load      everything is read and checked, no device has changed       Arrived
//!   settle          channel threads have ended, devices are reset and installed Settled
//!     confirm       the source is told: the guest is this side's                the page store
//!                   (the VMM resumes it)
//!
//!   settle_for_checkpoints
//!                   devices are reset and installed, channels go on             SettledSecondary
//!     confirm       the source is told: COLO begins                             CheckpointReceiver
//! ```
//!
//! Each step can be taken once, and only behind the one before. Until [`Settled::confirm`] the source
//! may take the guest back. A value that is dropped before that leaves the guest with the source.

use super::checkpoints::CheckpointReceiver;
use super::loaded::{Loaded, UnconfirmedReceiver};
use super::pages::Received;
use crate::precopy::TargetError;
use crate::raw::transport::PageBarrier;
use crate::{Configuration, DeviceState, PageStore, TransportError};

/// Where the pages of an incoming migration go, and the threads that put them there.
///
/// A pair of a store and a barrier is one without threads.
pub trait PageIntake {
    /// Where pages land.
    type Store;

    /// Returns the store, and where the loader of the main stream waits for the channels.
    fn parts(&mut self) -> (&dyn PageStore, &mut dyn PageBarrier);

    /// Ends the channels, waits for their threads, and returns the store, which no thread writes any
    /// more.
    ///
    /// # Errors
    /// A thread does not end; the store then stays with it.
    fn join(self) -> Result<Self::Store, TransportError>;
}

impl<S: PageStore, B: PageBarrier> PageIntake for (S, B) {
    type Store = S;

    fn parts(&mut self) -> (&dyn PageStore, &mut dyn PageBarrier) {
        (&self.0, &mut self.1)
    }

    fn join(self) -> Result<S, TransportError> {
        Ok(self.0)
    }
}

/// A guest that was received completely: `staged` is the state of its devices, of which none has
/// changed. The source still has the guest.
#[derive(Debug)]
#[must_use = "the source keeps the guest if this is dropped"]
pub struct Arrived<P, S> {
    pub(super) loaded: Loaded,
    pub(super) pages: P,
    pub(super) staged: S,
}

impl<P: PageIntake, S> Arrived<P, S> {
    /// Returns what came in on the main stream.
    #[must_use]
    pub const fn received(&self) -> Received {
        self.loaded.received()
    }

    /// Returns the source's configuration, if the stream has one. Where it has a UUID and this side's has
    /// none, nothing was compared.
    #[must_use]
    pub const fn configuration(&self) -> Option<&Configuration> {
        self.loaded.configuration()
    }

    /// Gives the guest back to the source, where it runs on.
    pub fn refuse(self) {
        self.loaded.refuse();
    }

    /// Ends the channels, and installs the devices.
    ///
    /// # Errors
    /// A channel's or a device's. The source was told to keep the guest; after a device's error this
    /// VM is in no defined state, and must not run.
    pub fn settle<D>(self, devices: &mut D) -> Result<Settled<P::Store>, TargetError>
    where
        D: DeviceState<Staged = S> + ?Sized,
    {
        let Self {
            loaded,
            pages,
            staged,
        } = self;
        let store = match pages.join() {
            Ok(store) => store,
            Err(error) => {
                loaded.refuse();
                return Err(error.into());
            }
        };
        let loaded = install(loaded, devices, staged)?;
        Ok(Settled { loaded, store })
    }

    /// Installs the devices of a COLO secondary, whose channels go on.
    ///
    /// # Errors
    /// A device's, as for [`Arrived::settle`]; the source has opened no return path, without which
    /// there is no COLO.
    pub fn settle_for_checkpoints<D>(
        self,
        devices: &mut D,
    ) -> Result<SettledSecondary<P>, TargetError>
    where
        D: DeviceState<Staged = S> + ?Sized,
    {
        Ok(SettledSecondary {
            loaded: install(self.loaded, devices, self.staged)?.into_checkpoints_unconfirmed()?,
            pages: self.pages,
        })
    }
}

fn install<D: DeviceState + ?Sized>(
    loaded: Loaded,
    devices: &mut D,
    staged: D::Staged,
) -> Result<Loaded, TargetError> {
    let installed = match devices.reset(staged) {
        Ok(reset) => devices
            .install(reset)
            .map_err(|source| ("installing the devices", source)),
        Err(source) => Err(("resetting the devices", source)),
    };
    match installed {
        Ok(()) => Ok(loaded),
        Err((what, source)) => {
            loaded.refuse();
            Err(TargetError::Vm { what, source })
        }
    }
}

/// A guest whose memory and devices are in place. Nothing but [`Settled::confirm`] can fail any more.
#[derive(Debug)]
#[must_use = "the source keeps the guest if this is dropped"]
pub struct Settled<S> {
    loaded: Loaded,
    store: S,
}

impl<S> Settled<S> {
    /// As [`Arrived::received`].
    #[must_use]
    pub const fn received(&self) -> Received {
        self.loaded.received()
    }

    /// As [`Arrived::configuration`].
    #[must_use]
    pub const fn configuration(&self) -> Option<&Configuration> {
        self.loaded.configuration()
    }

    /// Tells the source that the guest is this side's, if it has opened a return path, and returns the page
    /// store. The VMM resumes the guest.
    ///
    /// # Errors
    /// [`TargetError::SourceGone`] if the source has given up waiting, and the return path's. The source
    /// was not told anything, so this side must not run the guest.
    pub fn confirm(mut self) -> Result<S, TargetError> {
        self.loaded.confirm()?;
        Ok(self.store)
    }

    /// Gives the guest back to the source, where it runs on.
    pub fn refuse(self) {
        self.loaded.refuse();
    }
}

/// A COLO secondary's guest whose memory and devices are in place.
#[derive(Debug)]
#[must_use = "the source keeps the guest if this is dropped"]
pub struct SettledSecondary<P> {
    loaded: UnconfirmedReceiver,
    pages: P,
}

impl<P> SettledSecondary<P> {
    /// Tells the primary that COLO begins, and returns what the secondary goes on with.
    ///
    /// # Errors
    /// As for [`Settled::confirm`].
    pub fn confirm(self) -> Result<(CheckpointReceiver, P), TargetError> {
        Ok((self.loaded.confirm()?, self.pages))
    }
}
