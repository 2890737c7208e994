//! The secondary's memory together with the threads that fill it.

use std::time::Instant;

use migration_stream::ram::NoMultifd;
use migration_stream::{PageBarrier, PageStore, TransportError};
use multifd::{RecvBarrier, RecvCounters, RecvSet};

use crate::store::{ColoStore, StoreError};

/// A page store and who writes it: the loader of the main stream alone, or multifd's channels too.
/// The store can only be had back, and so be released, when no thread writes it any more.
#[derive(Debug)]
pub struct IncomingPages<S>(Kind<S>);

#[derive(Debug)]
enum Kind<S> {
    Plain(Box<S>, NoMultifd),
    Multifd(RecvSet<S>, RecvBarrier),
}

impl<S: PageStore + 'static> IncomingPages<S> {
    /// All pages come in the main stream.
    #[must_use]
    pub fn plain(store: S) -> Self {
        Self(Kind::Plain(Box::new(store), NoMultifd))
    }

    /// Pages come on the channels of `set`.
    #[must_use]
    pub fn multifd(set: RecvSet<S>) -> Self {
        let barrier = set.barrier();
        Self(Kind::Multifd(set, barrier))
    }

    /// The store.
    #[must_use]
    pub(crate) fn store(&self) -> &S {
        match &self.0 {
            Kind::Plain(store, _) => store,
            Kind::Multifd(set, _) => set.store(),
        }
    }

    /// Returns what came on channels so far; nothing without any.
    #[must_use]
    pub(crate) fn counters(&self) -> RecvCounters {
        match &self.0 {
            Kind::Plain(..) => RecvCounters::default(),
            Kind::Multifd(set, _) => set.counters(),
        }
    }

    /// The store, and where the loader of the main stream waits for the channels.
    pub fn parts(&mut self) -> (&S, &mut dyn PageBarrier) {
        match &mut self.0 {
            Kind::Plain(store, barrier) => (store, barrier),
            Kind::Multifd(set, barrier) => (set.store(), barrier),
        }
    }

    /// Ends the channels, waits for their threads, and gives the store back.
    ///
    /// # Errors
    /// A thread does not end; the store then stays with it.
    pub fn join(self) -> Result<S, TransportError> {
        match self.0 {
            Kind::Plain(store, _) => Ok(*store),
            Kind::Multifd(set, barrier) => {
                drop(barrier);
                // How the channels fared was told when it mattered.
                Ok(set.join()?.store)
            }
        }
    }
}

/// Has the pages that arrive from here on belong to checkpoints. Returns when every channel has ended the packet that
/// it is in, by `deadline` at the latest.
///
/// # Errors
/// A channel is inside a packet and stays there: this is not the end of a migration. Or the store's.
pub fn enter_colo(
    pages: &IncomingPages<ColoStore>,
    deadline: Option<Instant>,
) -> Result<(), EnterError> {
    match &pages.0 {
        Kind::Plain(store, _) => Ok(store.enter_colo()?),
        Kind::Multifd(set, _) => Ok(set.between_packets(deadline, ColoStore::enter_colo)??),
    }
}

/// Why pages cannot belong to checkpoints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnterError {
    /// A channel's.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The store's.
    #[error(transparent)]
    Store(#[from] StoreError),
}
