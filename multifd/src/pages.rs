//! The pages of an incoming migration, with channels or without.

use std::time::Instant;

use migration_stream::precopy::PageIntake;
use migration_stream::ram::NoMultifd;
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{PageStore, TransportError};

use crate::{RecvBarrier, RecvCounters, RecvSet};

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
    pub fn store(&self) -> &S {
        match &self.0 {
            Kind::Plain(store, _) => store,
            Kind::Multifd(set, _) => set.store(),
        }
    }

    /// Returns what came on channels so far; nothing without any.
    #[must_use]
    pub fn counters(&self) -> RecvCounters {
        match &self.0 {
            Kind::Plain(..) => RecvCounters::default(),
            Kind::Multifd(set, _) => set.counters(),
        }
    }

    /// Calls `then` while no channel is inside a packet, and returns its result. Pages of later packets
    /// come after it.
    ///
    /// # Errors
    /// A channel is inside a packet until `deadline`.
    pub fn between_packets<R>(
        &self,
        deadline: Option<Instant>,
        then: impl FnOnce(&S) -> R,
    ) -> Result<R, TransportError> {
        match &self.0 {
            Kind::Plain(store, _) => Ok(then(store)),
            Kind::Multifd(set, _) => set.between_packets(deadline, then),
        }
    }
}

impl<S: PageStore + 'static> PageIntake for IncomingPages<S> {
    type Store = S;

    fn parts(&mut self) -> (&dyn PageStore, &mut dyn PageBarrier) {
        match &mut self.0 {
            Kind::Plain(store, barrier) => (&**store, barrier),
            Kind::Multifd(set, barrier) => (set.store(), barrier),
        }
    }

    fn join(self) -> Result<S, TransportError> {
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
