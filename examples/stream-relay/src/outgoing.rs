//! A guest to a QEMU, or into a file that one can load.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_net::outgoing::{self, ConnectError};
use migration_stream::io::{FileChannel, PositionedFile, open_direct};
use migration_stream::mapped_ram::FileWriter;
use migration_stream::precopy::{
    Control, HandOver, Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceError,
    SourceObserver, Unresolved,
};
use migration_stream::ram::{BlockId, InStream, ZeroPageDetection};
use migration_stream::raw::configuration::MAPPED_RAM;
use migration_stream::raw::early::EarlySections;
use migration_stream::{
    BoxError, Configuration, DeviceSections, DeviceState, DirtyLog, GuestRam, MachineVersion,
    MemoryError, PageTransport, Parsed, SectionHeader, StreamWriter, TransportError, VmControl,
};
use multifd::{Flush, MultifdConfig, SendSet};

use crate::arrival::{Arrival, LandedLog, NotComing};
use crate::endpoint::Endpoint;
use crate::guest::{Devices, Guest, version};
use crate::memory::Memory;
use crate::partial::{self, parent};
use crate::progress::{Figures, Progress, Stage};
use crate::{Access, Channels};

/// Where a guest goes, and how.
#[derive(Clone, Debug)]
pub struct OutgoingConfig {
    /// The destination, or the file.
    pub to: Endpoint,
    /// Multifd's channels (the capability `multifd`).
    pub channels: Option<Channels>,
    /// In a file every page has its place (the capability `mapped-ram`), and is written like this.
    pub mapped_ram: Option<Access>,
    /// Who looks for zero pages. Destinations before QEMU 9.0 want [`ZeroPageDetection::Legacy`].
    pub zero_pages: ZeroPageDetection,
    /// Bytes a second on all channels together, 0 for as many as there can be.
    pub max_bandwidth: u64,
    /// The version of a machine type whose name has none.
    pub machine_version: Option<MachineVersion>,
    /// The UUID with which channels introduce themselves, zero if the guest has none.
    pub uuid: [u8; 16],
    /// How long a connection, a read or a write may wait for the destination, and how long it may
    /// take to confirm the guest once everything was sent.
    pub timeout: Duration,
}

impl OutgoingConfig {
    /// Whether this can be done at all, for those who would rather know before they take a guest.
    ///
    /// # Errors
    /// [`OutgoingError::ChannelsOfFile`], [`OutgoingError::Offset`], [`OutgoingError::Exists`],
    /// [`OutgoingError::NoFile`].
    pub fn check(&self) -> Result<(), OutgoingError> {
        match &self.to {
            Endpoint::Socket(_) if self.mapped_ram.is_some() => Err(OutgoingError::NoFile),
            Endpoint::Socket(_) => Ok(()),
            Endpoint::File { .. } if self.channels.is_some() => Err(OutgoingError::ChannelsOfFile),
            Endpoint::File { offset: 1.., .. } => Err(OutgoingError::Offset),
            Endpoint::File { path, .. } if path.exists() => {
                Err(OutgoingError::Exists { path: path.clone() })
            }
            Endpoint::File { .. } => Ok(()),
        }
    }
}

/// Gives the guest away. When it returns a destination has confirmed that it has everything, or a
/// file is on disk under its name.
///
/// # Errors
/// [`OutgoingError`]: the destination has no guest that it could run, or did not say that it has.
pub fn send(
    guest: &Guest,
    config: &OutgoingConfig,
    progress: &Progress,
) -> Result<Figures, OutgoingError> {
    progress.begin(Stage::Sending);
    let departure = Departure {
        memory: &guest.memory,
        configuration: guest.configuration.as_ref(),
        early: &guest.early,
        config,
        progress,
        devices: || Ok(guest.devices.clone()),
        may_leave: &|| true,
    };
    departure.run(Still)
}

/// As [`send`], with a guest that is still arriving: gives away what has landed, and again what has
/// landed again, until it is all there. `may_leave` is asked before the destination is given what it
/// cannot run the guest without.
///
/// # Errors
/// As for [`send`]; also when the guest does not arrive, or may not leave.
pub fn forward(
    guest: &Arc<Arrival>,
    config: &OutgoingConfig,
    progress: &Progress,
    may_leave: &dyn Fn() -> bool,
) -> Result<Figures, OutgoingError> {
    progress.begin(Stage::Forwarding);
    let departure = Departure {
        memory: &guest.memory,
        configuration: guest.configuration.as_ref(),
        early: &guest.early,
        config,
        progress,
        devices: || guest.wait(),
        may_leave,
    };
    departure.run(LandedLog(Arc::clone(guest)))
}

/// A guest on its way out.
struct Departure<'a, F> {
    memory: &'a Arc<Memory>,
    configuration: Option<&'a Configuration>,
    early: &'a EarlySections,
    config: &'a OutgoingConfig,
    progress: &'a Progress,
    /// Waits until nothing lands any more.
    devices: F,
    /// Whether the guest is still ours to give away.
    may_leave: &'a dyn Fn() -> bool,
}

impl<F: Fn() -> Result<Devices, NotComing>> Departure<'_, F> {
    fn run(&self, log: impl DirtyLog) -> Result<Figures, OutgoingError> {
        let config = self.config;
        config.check()?;
        self.progress.set_memory(self.memory.blocks().total_bytes());
        let begun = Instant::now();
        match &config.to {
            Endpoint::Socket(address) => {
                let multifd = config.channels.map(|channels| self.multifd(channels));
                let connected = outgoing::connect(
                    address,
                    multifd.as_ref(),
                    config.timeout,
                    config.timeout,
                    None,
                )?;
                let out = StreamWriter::new(connected.main.share());
                let return_path = Some(ReturnPathReader::new(connected.main));
                match multifd {
                    None => self.migrate(out, return_path, log, self.in_stream()),
                    Some(multifd) => {
                        let ram: Arc<dyn GuestRam> = Arc::clone(self.memory) as _;
                        let channels = connected.channels.into_iter().map(Into::into).collect();
                        let set = SendSet::start(ram, channels, &multifd)
                            .map_err(OutgoingError::Channels)?;
                        self.migrate(out, return_path, log, set)
                    }
                }?;
            }
            Endpoint::File { path, .. } => {
                let failed = |source| OutgoingError::File {
                    path: path.clone(),
                    source,
                };
                let dir = parent(path);
                partial::sweep(path);
                let temporary = partial::file(path).map_err(failed)?;
                let file: Arc<dyn PositionedFile> =
                    Arc::new(temporary.as_file().try_clone().map_err(failed)?);
                let written = match config.mapped_ram {
                    None => {
                        let out = StreamWriter::new(FileChannel::new(file, 0));
                        self.migrate(out, None, log, self.in_stream())
                    }
                    Some(access) => {
                        let ram: Arc<dyn GuestRam> = Arc::clone(self.memory) as _;
                        let mut pages = FileWriter::new(ram, Arc::clone(&file), config.zero_pages)
                            .with_threads(access.threads);
                        if access.direct {
                            let options = &mut File::options();
                            let direct = open_direct(temporary.path(), options.write(true));
                            pages = pages.with_pages_to(Arc::new(direct.map_err(failed)?));
                        }
                        let out = StreamWriter::to_file(file, 0);
                        self.migrate(out, None, log, pages)
                    }
                };
                written.map_err(|error| match error {
                    OutgoingError::Stream(source) => OutgoingError::FileStream {
                        path: path.clone(),
                        source,
                    },
                    other => other,
                })?;
                temporary.as_file().sync_all().map_err(failed)?;
                temporary
                    .persist_noclobber(path)
                    .map_err(|e| failed(e.error))?;
                sync_directory(dir).map_err(failed)?;
            }
        }
        Ok(self.progress.outgoing.figures(begun.elapsed()))
    }

    fn machine_version(&self) -> MachineVersion {
        version(self.configuration, self.config.machine_version)
    }

    fn multifd(&self, channels: Channels) -> MultifdConfig {
        MultifdConfig::new(channels.count)
            .compression(channels.compression)
            .zero_pages(self.config.zero_pages)
            .flush(if self.machine_version().flushes_each_section() {
                Flush::EachSection
            } else {
                Flush::EachRound
            })
            .uuid(self.config.uuid)
            .stall_limit(self.config.timeout)
    }

    fn in_stream(&self) -> InStream {
        InStream::new(Arc::clone(self.memory) as _, self.config.zero_pages)
    }

    fn migrate(
        &self,
        out: StreamWriter,
        return_path: Option<ReturnPathReader>,
        log: impl DirtyLog,
        transport: impl PageTransport,
    ) -> Result<(), OutgoingError> {
        // Where pages are in a file is between its writer and its reader: if there are such places
        // now, the transport says so.
        let mut configuration = self.configuration.cloned();
        if let Some(configuration) = &mut configuration {
            configuration
                .capabilities
                .retain(|c| c.as_str() != MAPPED_RAM);
        }
        let mut vm = Held {
            departure: self,
            devices: None,
        };
        let source = Source::start(
            SourceConfig::new(configuration)
                .switchover_start(self.machine_version().sends_switchover_start())
                .confirm_timeout(self.config.timeout),
            // The guest of an arrival decides by itself when it stands still.
            Arc::new(Limits::new(self.config.max_bandwidth, Duration::ZERO)),
            out,
            return_path,
            RamSetup { log, transport },
            &mut vm,
        )?;
        match source.run(&mut vm) {
            HandOver::Completed(switched) => {
                vm.progress(&switched.progress);
                Ok(())
            }
            HandOver::Failed(error) => Err(error.into()),
            HandOver::Unknown(unresolved) => self.last_wait(unresolved),
        }
    }

    /// The answer may be late: waits as long again.
    fn last_wait<T: PageTransport, D: DirtyLog>(
        &self,
        unresolved: Unresolved<T, D>,
    ) -> Result<(), OutgoingError> {
        match unresolved.wait(self.config.timeout) {
            HandOver::Completed(_) => Ok(()),
            HandOver::Failed(error) => Err(error.into()),
            HandOver::Unknown(unresolved) => {
                Err(OutgoingError::Unconfirmed(unresolved.into_error()))
            }
        }
    }
}

/// The directory in which `path` lies.
/// Names in a directory are on disk only when the directory is.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The guest stands still: nothing becomes dirty.
struct Still;

impl DirtyLog for Still {
    fn start(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn sync(&mut self, _: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// A guest as the VM of a source.
struct Held<'a, F> {
    departure: &'a Departure<'a, F>,
    /// Those that are or were sent.
    devices: Option<Devices>,
}

impl<F: Fn() -> Result<Devices, NotComing>> VmControl for Held<'_, F> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.devices = Some((self.departure.devices)()?);
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

impl<F> DeviceState for Held<'_, F> {
    type Section = Infallible;
    type Staged = Infallible;
    type Reset = Infallible;

    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        for section in self.departure.early.sections() {
            let header = section.header;
            let (idstr, instance) = (header.idstr.as_str(), header.instance.0);
            out.push(idstr, instance, header.version, section.body)?;
        }
        Ok(())
    }

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        let devices = self.devices.as_mut().ok_or(NotComing)?;
        if !(self.departure.may_leave)() {
            return Err("the source did not wait to hear of its guest, and may run it on".into());
        }
        devices.save(out)
    }

    fn parse(&mut self, _: &SectionHeader, _: &[u8]) -> Result<Parsed<Infallible>, BoxError> {
        Err(Box::new(SentOnly))
    }

    fn stage(&mut self, _: Vec<Infallible>) -> Result<Infallible, BoxError> {
        Err(Box::new(SentOnly))
    }

    fn reset(&mut self, staged: Infallible) -> Result<Infallible, BoxError> {
        match staged {}
    }

    fn install(&mut self, reset: Infallible) -> Result<(), BoxError> {
        match reset {}
    }
}

/// Nothing is loaded on the way out.
#[derive(Debug, thiserror::Error)]
#[error("a guest on its way out is not loaded")]
struct SentOnly;

impl<F> SourceObserver for Held<'_, F> {
    fn progress(&mut self, progress: &migration_stream::precopy::Progress) -> Control {
        self.departure.progress.outgoing.set(
            progress.transferred,
            progress.counters.normal_pages,
            progress.counters.zero_pages,
        );
        Control::Continue
    }
}

/// Why a guest could not be given away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutgoingError {
    /// No connection to the destination.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Multifd's channels.
    #[error("the outgoing channels")]
    Channels(#[source] TransportError),
    /// The stream broke, or the destination refused it.
    #[error("the outgoing stream")]
    Stream(#[from] SourceError),
    /// The destination was sent everything, and did not say whether it has it.
    #[error("the destination was sent everything and did not say whether it has the guest")]
    Unconfirmed(#[source] SourceError),
    /// Channels were asked for where there can be none.
    #[error("a file that is written as a stream has no multifd channels")]
    ChannelsOfFile,
    /// Places for pages were asked for where there can be none.
    #[error("pages have their places in a file (mapped-ram), and this is no file")]
    NoFile,
    /// An offset was asked for.
    #[error("a file is written from its beginning: no offset")]
    Offset,
    /// There is a file already.
    #[error("{} is there already", tool_support::Escaped(&.path.to_string_lossy()))]
    Exists {
        /// Its path.
        path: PathBuf,
    },
    /// The guest could not be written into the file.
    #[error("writing the guest into {}", tool_support::Escaped(&.path.to_string_lossy()))]
    FileStream {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: SourceError,
    },
    /// The file cannot be written.
    #[error("writing {}", tool_support::Escaped(&.path.to_string_lossy()))]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
