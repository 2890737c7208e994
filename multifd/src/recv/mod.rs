//! The receiving side: one thread per channel that reads pages straight into the store.
//!
//! **Who may touch the store, and when.** The set owns the store and only [`RecvSet::join`] gives
//! it back, after the last thread that writes into it is gone. The main stream's loader borrows it
//! meanwhile. When [`PageBarrier::flush`] returns, every channel had reached its SYNC packet: all
//! pages before it have landed and none behind it was looked at. What changes the store's mode, as
//! COLO does when it takes over from precopy, does so in [`RecvSet::between_packets`], during which
//! no channel is inside a packet, whatever the peer sends. While the result of
//! [`PageBarrier::hold`] lives, no channel begins a packet: a COLO checkpoint is committed like that.

mod ahead;
mod budget;
mod reader;
mod rendezvous;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use migration_stream::io::CancelToken;
use migration_stream::raw::transport::{HeldChannels, PageBarrier};
use migration_stream::{PageStore, TransportError};

use crate::channel::RecvChannel;
use crate::config::{Compression, MultifdConfig};
use crate::crew::{AbortHandle, Crew, Threads};
use crate::device_state::DeviceStateSink;
use crate::error::{ChannelError, Failure};
use crate::patience::lock;
use budget::Budget;
use reader::{Devices, Reader};
pub use rendezvous::RecvCounters;
use rendezvous::{Rendezvous, hold};

type OnError = Box<dyn FnOnce(&TransportError) + Send>;

/// The channels of an incoming migration, and the store they write into.
///
/// Every [`TransportError`] has a [`ChannelError`] as its source. The first error of a channel
/// shuts all channels, is handed to the `on_error` hook, and is what every later call returns. A
/// channel that the peer ends between two packets has ended well; it becomes an error with a flush
/// that waits for it.
///
/// The store is not to be had while the threads run:
///
/// ```compile_fail,E0382
/// # use migration_stream::PageStore;
/// # use multifd::{MultifdConfig, RecvChannel, RecvSet};
/// fn release_too_early<S: PageStore + 'static>(cache: S, channels: Vec<RecvChannel>) {
///     let set = RecvSet::start(cache, channels, &MultifdConfig::default(), |_| {});
///     drop(cache); // the threads write into it
/// }
/// ```
///
/// Nor is a borrow of it still good when they are gone and it belongs to somebody else:
///
/// ```compile_fail,E0505
/// # use migration_stream::PageStore;
/// # use multifd::RecvSet;
/// fn keep_a_borrow<S: PageStore + 'static>(set: RecvSet<S>) {
///     let cache = set.store();
///     let joined = set.join();
///     cache.blocks();
/// }
/// ```
///
/// ```
/// # use migration_stream::PageStore;
/// # use multifd::RecvSet;
/// fn release<S: PageStore + 'static>(set: RecvSet<S>) {
///     if let Ok(joined) = set.join() {
///         drop(joined.store); // no thread is left that could write into it
///     }
/// }
/// ```
pub struct RecvSet<S> {
    // The threads are first: dropped before the store, they are gone when it goes.
    threads: Threads<Rendezvous>,
    crew: Arc<Crew<Rendezvous>>,
    store: Arc<S>,
}

/// What is left of a [`RecvSet`] whose threads are gone.
#[derive(Debug)]
#[must_use]
pub struct Joined<S> {
    /// The store, which nobody else can reach any more.
    pub store: S,
    /// The first error of the set, if there was one. A failover needs the store in either case.
    pub outcome: Result<(), TransportError>,
}

impl<S: PageStore + 'static> RecvSet<S> {
    /// Starts the threads of `channels`, whose handshakes were received, in the order of their
    /// ids. Device state on them is an error. `on_error` is called once, from a channel's thread, when the first channel fails and
    /// all channels have been shut, before anybody who waits for them learns of it: it should wake whoever reads the main stream, for example by
    /// shutting that. A failed flush, and an abort, do not call it: their caller knows.
    ///
    /// # Errors
    /// [`ChannelError::ChannelCount`], [`ChannelError::Setup`] and [`ChannelError::Spawn`]. The
    /// store is dropped then.
    pub fn start(
        store: S,
        channels: Vec<RecvChannel>,
        config: &MultifdConfig,
        on_error: impl FnOnce(&TransportError) + Send + 'static,
    ) -> Result<Self, TransportError> {
        Self::begin(store, None, channels, config, Box::new(on_error))
    }

    /// As [`RecvSet::start`], for a VM with devices that send state on the channels. `devices` is
    /// asked on channels that are not compressed; on others device state stays an error.
    ///
    /// # Errors
    /// As for [`RecvSet::start`].
    pub fn start_with_device_state(
        store: S,
        devices: Arc<dyn DeviceStateSink>,
        channels: Vec<RecvChannel>,
        config: &MultifdConfig,
        on_error: impl FnOnce(&TransportError) + Send + 'static,
    ) -> Result<Self, TransportError> {
        let devices = (config.compression == Compression::None).then_some(devices);
        Self::begin(store, devices, channels, config, Box::new(on_error))
    }

    fn begin(
        store: S,
        devices: Option<Arc<dyn DeviceStateSink>>,
        channels: Vec<RecvChannel>,
        config: &MultifdConfig,
        on_error: OnError,
    ) -> Result<Self, TransportError> {
        let count = config.channels.get();
        if channels.len() != usize::from(count) {
            let got = channels.len();
            return Err(TransportError::main(ChannelError::ChannelCount {
                got,
                expected: count,
            }));
        }
        let store = Arc::new(store);
        let on_error: Arc<Mutex<Option<OnError>>> = Arc::new(Mutex::new(Some(on_error)));
        let (sources, closers): (Vec<_>, Vec<_>) =
            channels.into_iter().map(|c| (c.source, c.close)).unzip();
        let crew = Arc::new(Crew::new(
            Rendezvous::new(count),
            closers,
            config.stall_limit,
        ));
        let memory = Arc::new(Budget::new(config.receive_memory));
        let mut threads = Threads::new(Arc::clone(&crew));
        for (id, mut source) in (0..count).zip(sources) {
            // Packets leave a sender at once, QEMU as well.
            source.set_quick_ack(false);
            let decoder = config
                .compression
                .decoder(config.receive_memory / usize::from(count))
                .map_err(|source| TransportError::channel(id, ChannelError::Setup { source }))?;
            let method = config.compression.method();
            let (store, crew) = (Arc::clone(&store), Arc::clone(&crew));
            let on_error = Arc::clone(&on_error);
            let devices = devices.clone().map(|sink| Devices {
                sink,
                memory: Arc::clone(&memory),
            });
            threads.spawn(
                format!("mfd-recv-{id}"),
                id,
                move || Reader::new(&*store, devices, source, decoder, method, id).run(&crew),
                move |failure| {
                    if let Some(hook) = lock(&on_error).take() {
                        hook(&failure.clone().into());
                    }
                },
            )?;
        }
        Ok(Self {
            threads,
            crew,
            store,
        })
    }

    /// Shuts the channels, waits for their threads, and gives the store back. A migration that ends
    /// well has had its last flush before; what is under way on a channel is lost.
    ///
    /// # Errors
    /// [`ChannelError::Stuck`]: a thread did not end within the stall limit, because the store or
    /// the channel's own closer does not let it. The store stays with that thread.
    pub fn join(self) -> Result<Joined<S>, TransportError> {
        let Self {
            mut threads,
            crew,
            store,
        } = self;
        threads.stop()?;
        let outcome = crew
            .lock()
            .failure()
            .map_or(Ok(()), |failure| Err(failure.into()));
        match Arc::into_inner(store) {
            Some(store) => Ok(Joined { store, outcome }),
            None => Err(Failure {
                channel: None,
                error: ChannelError::Stuck { limit: crew.limit },
            }
            .into()),
        }
    }
}

impl<S> RecvSet<S> {
    /// The store, which the channels' threads use at the same time.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }

    /// What the main stream's loader waits at.
    #[must_use]
    pub fn barrier(&self) -> RecvBarrier {
        RecvBarrier {
            crew: Arc::clone(&self.crew),
            deadline: None,
            cancel: None,
        }
    }

    /// Runs `f` while no channel is inside a packet: every page of a packet is taken in either
    /// before or after it.
    ///
    /// # Errors
    /// [`ChannelError::Stalled`] when a packet that was begun does not end until `deadline`
    /// (without one, within the stall limit). `f` did not run, and the channels go on.
    pub fn between_packets<R>(
        &self,
        deadline: Option<Instant>,
        f: impl FnOnce(&S) -> R,
    ) -> Result<R, TransportError> {
        Ok(self.crew.between_packets(deadline, || f(&self.store))?)
    }

    /// Returns what the channels have received so far.
    #[must_use]
    pub fn counters(&self) -> RecvCounters {
        self.crew.lock().counters()
    }

    /// A handle that ends the channels from another thread.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(&self.crew)
    }
}

impl<S> fmt::Debug for RecvSet<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvSet")
            .field("crew", &self.crew)
            .finish_non_exhaustive()
    }
}

/// Where the main stream waits for the channels of a [`RecvSet`].
///
/// A flush that fails has shut all channels: what is in memory is not known any more.
#[derive(Debug)]
pub struct RecvBarrier {
    crew: Arc<Crew<Rendezvous>>,
    deadline: Option<Instant>,
    cancel: Option<CancelToken>,
}

impl PageBarrier for RecvBarrier {
    fn flush(&mut self) -> Result<(), TransportError> {
        Ok(self.crew.flush(self.deadline, self.cancel.as_ref())?)
    }

    fn has_channels(&self) -> bool {
        true
    }

    fn hold(&mut self) -> Result<HeldChannels, TransportError> {
        let held = hold(&self.crew, self.deadline, self.cancel.as_ref())?;
        Ok(HeldChannels::until_dropped(held))
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        self.cancel = Some(token.clone());
    }

    fn failure(&self) -> Option<TransportError> {
        self.crew.first_error().map(Into::into)
    }
}
