//! Where the pages of a guest go, whichever way they come.

use migration_stream::mapped_ram::FileReader;
use migration_stream::precopy::PageIntake;
use migration_stream::ram::NoMultifd;
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{PageStore, TransportError};
#[cfg(feature = "multifd")]
use multifd::IncomingPages;

/// A page store, and what fills it: the main stream, channels, or the threads that read a file.
#[derive(Debug)]
pub struct Pages<S>(Kind<S>);

#[derive(Debug)]
enum Kind<S> {
    Stream(S, NoMultifd),
    File(S, FileReader),
    #[cfg(feature = "multifd")]
    Channels(IncomingPages<S>),
}

impl<S: PageStore + 'static> Pages<S> {
    pub(super) const fn in_stream(store: S) -> Self {
        Self(Kind::Stream(store, NoMultifd))
    }

    pub(super) const fn in_file(store: S, reader: FileReader) -> Self {
        Self(Kind::File(store, reader))
    }

    #[cfg(feature = "multifd")]
    pub(super) const fn by_channels(pages: IncomingPages<S>) -> Self {
        Self(Kind::Channels(pages))
    }

    /// Returns the store.
    #[must_use]
    pub fn store(&self) -> &S {
        match &self.0 {
            Kind::Stream(store, _) | Kind::File(store, _) => store,
            #[cfg(feature = "multifd")]
            Kind::Channels(pages) => pages.store(),
        }
    }
}

impl<S: PageStore + 'static> PageIntake for Pages<S> {
    type Store = S;

    fn parts(&mut self) -> (&dyn PageStore, &mut dyn PageBarrier) {
        match &mut self.0 {
            Kind::Stream(store, barrier) => (store, barrier),
            Kind::File(store, reader) => (store, reader),
            #[cfg(feature = "multifd")]
            Kind::Channels(pages) => pages.parts(),
        }
    }

    fn join(self) -> Result<S, TransportError> {
        match self.0 {
            Kind::Stream(store, _) | Kind::File(store, _) => Ok(store),
            #[cfg(feature = "multifd")]
            Kind::Channels(pages) => pages.join(),
        }
    }
}

/// What a COLO secondary goes on with. Nothing more comes out of a file.
#[cfg(feature = "multifd")]
impl<S: PageStore + 'static> From<Pages<S>> for IncomingPages<S> {
    fn from(pages: Pages<S>) -> Self {
        match pages.0 {
            Kind::Stream(store, _) | Kind::File(store, _) => Self::plain(store),
            Kind::Channels(pages) => pages,
        }
    }
}
