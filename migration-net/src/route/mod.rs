//! How a migration goes: over one connection, over channels beside it, or through a file.

mod pages;

use std::fmt;
use std::num::NonZeroU8;
use std::sync::Arc;
use std::time::Duration;

use migration_stream::io::{CancelToken, PositionedFile};
use migration_stream::mapped_ram::{FileReader, FileWriter};
use migration_stream::precopy::{
    Arrived, Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceError, Target,
    TargetConfig, TargetError,
};
use migration_stream::ram::{InStream, ZeroPageDetection};
use migration_stream::raw::configuration::MAPPED_RAM;
use migration_stream::{
    Configuration, ConfigurationRule, DecoderConfig, DeviceState, DirtyLog, GuestRam, MachineName,
    PageStore, PageTransport, StreamReader, StreamWriter, TransportError,
};
#[cfg(feature = "multifd")]
use multifd::{Flush, IncomingPages, MultifdConfig, RecvSet, SendSet};

pub use self::pages::Pages;
use crate::address::{Address, Listener};
use crate::channels::Channels;
use crate::incoming::{self, Acceptor, Incoming, IncomingError};
use crate::outgoing::{self, ConnectError, Outgoing};

/// Where a guest goes.
#[non_exhaustive]
pub enum Destination {
    /// A target, over these connections.
    Peer(Box<Outgoing>),
    /// A file with `mapped-ram`, from its start on. Whoever gives the guest away for it makes it durable
    /// (`File::sync_all`) first.
    File(Arc<dyn PositionedFile>),
}

/// Where a guest comes from.
#[non_exhaustive]
pub enum Origin {
    /// A source, over these connections.
    Peer(Box<Incoming>),
    /// A file with `mapped-ram`, from its start on.
    File(Arc<dyn PositionedFile>),
}

/// How guests migrate between VMMs of one kind.
///
/// Source and target, primary and secondary, writer and reader of a file take the same value. What it
/// says of channels holds for connections and for the threads of a file.
///
/// ```
/// use std::time::Duration;
///
/// use migration_net::Route;
/// use migration_stream::MachineName;
/// use migration_stream::precopy::Limits;
///
/// let route = Route::new(MachineName::new("my-vmm-1")?)
///     .patience(Duration::from_secs(20))
///     .limits(Limits::new(1 << 30, Duration::from_millis(100)).into());
/// assert_eq!(route.limits.max_bandwidth(), 1 << 30);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Route {
    /// The configuration section, which must be the same on both sides. The capability of a file is added
    /// for one.
    pub configuration: Configuration,
    /// Bandwidth and downtime, which may be changed while a guest leaves. Default: QEMU's, 128 MiB a second
    /// and 300 ms. A file is written no faster either.
    pub limits: Arc<Limits>,
    /// How long each wait for the other side may take: for all connections, within a read or a write, for
    /// the answer after the last byte. Default 30 s. It must exceed every silence of a healthy peer.
    pub patience: Duration,
    /// What ends every wait of one migration, at either side.
    pub cancel: Option<CancelToken>,
    /// Source only: the target is asked for answers. Without them a guest that was sent counts as handed
    /// over, and there is no COLO. Default `true`.
    pub return_path: bool,
    /// Source only: SWITCHOVER_START announces the final phase. Default `true`; a QEMU before 10.0
    /// does not know it.
    pub switchover_start: bool,
    /// Source only: zero pages are found, and sent as such, on the main stream and in a file. Channels have
    /// a setting of their own.
    pub zero_pages: ZeroPageDetection,
    /// Pages that are sent again are sent as differences, from a cache of this many bytes at the source (a
    /// power of two). Not by channels, nor into a file, nor before COLO. Default: not.
    pub xbzrle: Option<u64>,
    /// Target only: the longest device section that is accepted, bytes. Default 1 MiB.
    pub max_devices: usize,
    /// Pages go by channels, or by as many threads to a file. Default: not.
    #[cfg(feature = "multifd")]
    pub multifd: Option<MultifdConfig>,
}

impl Route {
    /// Returns the way of a guest of type `machine` over a single connection. Only a machine of the same
    /// type takes it.
    #[must_use]
    pub fn new(machine: MachineName) -> Self {
        Self {
            configuration: Configuration::new(machine),
            limits: Arc::new(Limits::default()),
            patience: Duration::from_secs(30),
            cancel: None,
            return_path: true,
            switchover_start: true,
            zero_pages: ZeroPageDetection::default(),
            xbzrle: None,
            max_devices: 1 << 20,
            #[cfg(feature = "multifd")]
            multifd: None,
        }
    }

    /// Sets the [configuration section](Route::configuration).
    #[must_use]
    pub fn configuration(self, configuration: Configuration) -> Self {
        Self {
            configuration,
            ..self
        }
    }

    /// Sets the [limits](Route::limits), which the caller may share.
    #[must_use]
    pub fn limits(self, limits: Arc<Limits>) -> Self {
        Self { limits, ..self }
    }

    /// Sets the [patience](Route::patience).
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Lets `token` [end](Route::cancel) one migration.
    #[must_use]
    pub fn cancel(self, token: &CancelToken) -> Self {
        let cancel = Some(token.clone());
        Self { cancel, ..self }
    }

    /// Sets whether the target is [asked for answers](Route::return_path).
    #[must_use]
    pub fn return_path(self, return_path: bool) -> Self {
        Self {
            return_path,
            ..self
        }
    }

    /// Sets whether SWITCHOVER_START [is sent](Route::switchover_start).
    #[must_use]
    pub fn switchover_start(self, switchover_start: bool) -> Self {
        Self {
            switchover_start,
            ..self
        }
    }

    /// Sets who looks for [zero pages](Route::zero_pages).
    #[must_use]
    pub fn zero_pages(self, zero_pages: ZeroPageDetection) -> Self {
        Self { zero_pages, ..self }
    }

    /// Sets the size of the cache for [differences](Route::xbzrle), bytes.
    #[must_use]
    pub fn xbzrle(self, xbzrle: impl Into<Option<u64>>) -> Self {
        let xbzrle = xbzrle.into();
        Self { xbzrle, ..self }
    }

    /// Sets the [longest device section](Route::max_devices), bytes.
    #[must_use]
    pub fn max_devices(self, max_devices: usize) -> Self {
        Self {
            max_devices,
            ..self
        }
    }

    /// Sets the [channels](Route::multifd).
    #[cfg(feature = "multifd")]
    #[must_use]
    pub fn multifd(self, multifd: impl Into<Option<MultifdConfig>>) -> Self {
        let multifd = multifd.into();
        Self { multifd, ..self }
    }

    #[cfg(feature = "multifd")]
    fn channels(&self) -> Channels {
        self.multifd.as_ref().into()
    }

    #[cfg(not(feature = "multifd"))]
    const fn channels(&self) -> Channels {
        Channels::none()
    }

    /// Connects to a target.
    ///
    /// # Errors
    /// As for [`outgoing::connect`].
    pub fn connect(&self, address: &Address) -> Result<Outgoing, ConnectError> {
        let (patience, cancel) = (self.patience, self.cancel.as_ref());
        outgoing::connect(address, self.channels(), patience, patience, cancel)
    }

    /// Returns what collects a source's connections, for those who log unknown ones, or wait for another
    /// source when one fails. [`Route::accept`] is enough for the others.
    ///
    /// # Errors
    /// [`IncomingError::Listen`].
    pub fn acceptor(&self, listener: impl Into<Listener>) -> Result<Acceptor, IncomingError> {
        let limits = incoming::Limits::default()
            .complete(self.patience)
            .channel(self.patience);
        Acceptor::new(listener, self.channels(), limits)
    }

    /// Waits for a source, without a limit of time, and takes all of its connections.
    ///
    /// # Errors
    /// As for [`Acceptor::accept`].
    pub fn accept(&self, listener: impl Into<Listener>) -> Result<Incoming, IncomingError> {
        self.acceptor(listener)?.accept(self.cancel.as_ref())
    }

    /// Begins the migration of a running guest: see [`Source::run`] for the rest.
    ///
    /// # Errors
    /// Those of [`Source::start`]; the channels'; a cache of no size that [`Route::xbzrle`] can have.
    pub fn source<D: DirtyLog>(
        &self,
        to: impl Into<Destination>,
        ram: Arc<dyn GuestRam>,
        log: D,
        devices: &mut impl DeviceState,
    ) -> Result<Source<Box<dyn PageTransport>, D>, SourceError> {
        let (mut out, return_path, transport) = match to.into() {
            Destination::Peer(connections) => {
                let out = StreamWriter::new(connections.main.share());
                let answers = ReturnPathReader::new(connections.main.share());
                let transport = self.transport(ram, *connections)?;
                (out, self.return_path.then_some(answers), transport)
            }
            Destination::File(file) => {
                let out = StreamWriter::to_file(Arc::clone(&file), 0);
                let (zero_pages, threads) = self.file_access();
                let pages = FileWriter::new(ram, file, zero_pages).with_threads(threads);
                (out, None, Box::new(pages) as _)
            }
        };
        if let Some(token) = &self.cancel {
            out.set_cancel(token);
        }
        let config = SourceConfig::new(self.configuration.clone())
            .switchover_start(self.switchover_start)
            .confirm_timeout(self.patience);
        let setup = RamSetup { log, transport };
        let limits = Arc::clone(&self.limits);
        Source::start(config, limits, out, return_path, setup, devices)
    }

    /// How pages leave over `connections`.
    fn transport(
        &self,
        ram: Arc<dyn GuestRam>,
        connections: Outgoing,
    ) -> Result<Box<dyn PageTransport>, SourceError> {
        #[cfg(feature = "multifd")]
        if let Some(config) = &self.multifd {
            let channels = connections.channels.into_iter().map(Into::into).collect();
            return Ok(Box::new(SendSet::start(ram, channels, config)?));
        }
        #[cfg(not(feature = "multifd"))]
        drop(connections);
        let mut pages = InStream::new(ram, self.zero_pages);
        if let Some(cache) = self.xbzrle {
            pages = pages.with_xbzrle(cache).map_err(|error| SourceError::Vm {
                what: "making the cache of xbzrle",
                source: error.into(),
            })?;
        }
        Ok(Box::new(pages))
    }

    /// Loads a guest as far as the source can still take it back: its pages into `store`, its devices into
    /// `devices`, where none changes. [`Arrived`] has the steps that are left; this side runs the guest
    /// when it was confirmed, and never before.
    ///
    /// # Errors
    /// As for [`Target::load`]; the channels'.
    pub fn receive<S: PageStore + 'static, D: DeviceState>(
        &self,
        from: impl Into<Origin>,
        store: S,
        devices: &mut D,
    ) -> Result<Arrived<Pages<S>, D::Staged>, TargetError> {
        let (target, pages) = self.target(from, store)?;
        target.load(pages, devices)
    }

    /// Returns the target before anything is loaded, for those who set more of it than a route does.
    ///
    /// # Errors
    /// The channels'.
    pub fn target<S: PageStore + 'static>(
        &self,
        from: impl Into<Origin>,
        store: S,
    ) -> Result<(Target, Pages<S>), TargetError> {
        Ok(match from.into() {
            Origin::Peer(connections) => {
                let mut reader = StreamReader::new(connections.main.share(), &connections.prefix);
                let answers = Box::new(connections.main.share()) as _;
                let pages = self.intake(store, *connections)?;
                if let Some(token) = &self.cancel {
                    reader.set_cancel(token);
                }
                let config =
                    self.target_config(self.configuration.clone(), self.flushes_each_section());
                let target = Target::new(config, reader, Some(answers), pages.store());
                (target.confirming_before_it_runs(), pages)
            }
            Origin::File(file) => {
                let mut reader = StreamReader::from_file(Arc::clone(&file), 0);
                if let Some(token) = &self.cancel {
                    reader.set_cancel(token);
                }
                let (_, threads) = self.file_access();
                let pages = Pages::in_file(store, FileReader::new(file).with_threads(threads));
                // Threads are not told where a section ends.
                let configuration = self.configuration.clone().with(MAPPED_RAM);
                let config = self.target_config(configuration, false);
                (Target::new(config, reader, None, pages.store()), pages)
            }
        })
    }

    fn target_config(
        &self,
        configuration: Configuration,
        flush_each_section: bool,
    ) -> TargetConfig {
        let decoder = DecoderConfig::new(ConfigurationRule::Matching(configuration))
            .xbzrle(self.xbzrle.is_some())
            .flush_each_section(flush_each_section);
        TargetConfig::new(decoder).max_devices(self.max_devices)
    }

    #[cfg(feature = "multifd")]
    fn flushes_each_section(&self) -> bool {
        (self.multifd.as_ref()).is_some_and(|config| config.flush == Flush::EachSection)
    }

    #[cfg(not(feature = "multifd"))]
    const fn flushes_each_section(&self) -> bool {
        false
    }

    /// The store, and who fills it over `connections`.
    fn intake<S: PageStore + 'static>(
        &self,
        store: S,
        connections: Incoming,
    ) -> Result<Pages<S>, TransportError> {
        #[cfg(feature = "multifd")]
        if let Some(config) = &self.multifd {
            let channels = connections.channels.into_iter().map(Into::into).collect();
            // The loader of the main stream notices at once when a channel breaks. It can still answer.
            let main = connections.main;
            let set = RecvSet::start(store, channels, config, move |_| main.shutdown_reading())?;
            return Ok(Pages::by_channels(IncomingPages::multifd(set)));
        }
        drop(connections);
        Ok(Pages::in_stream(store))
    }

    /// Who looks for zero pages, and how many threads there are, where pages are in a file.
    #[cfg(feature = "multifd")]
    fn file_access(&self) -> (ZeroPageDetection, NonZeroU8) {
        let settings = self.multifd.as_ref().map(|config| {
            let threads = NonZeroU8::new(config.channels.get());
            (config.zero_pages, threads.unwrap_or(NonZeroU8::MIN))
        });
        settings.unwrap_or((self.zero_pages, NonZeroU8::MIN))
    }

    #[cfg(not(feature = "multifd"))]
    const fn file_access(&self) -> (ZeroPageDetection, NonZeroU8) {
        (self.zero_pages, NonZeroU8::MIN)
    }
}

impl From<Outgoing> for Destination {
    fn from(connections: Outgoing) -> Self {
        Self::Peer(Box::new(connections))
    }
}

impl<F: PositionedFile + 'static> From<Arc<F>> for Destination {
    fn from(file: Arc<F>) -> Self {
        Self::File(file)
    }
}

impl From<Incoming> for Origin {
    fn from(connections: Incoming) -> Self {
        Self::Peer(Box::new(connections))
    }
}

impl<F: PositionedFile + 'static> From<Arc<F>> for Origin {
    fn from(file: Arc<F>) -> Self {
        Self::File(file)
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer(_) => "Peer",
            Self::File(_) => "File",
        })
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peer(_) => "Peer",
            Self::File(_) => "File",
        })
    }
}
