//! A guest from a QEMU, or from a file that one wrote.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, io};

use migration_net::incoming::{Acceptor, Limits};
use migration_net::{Address, AddressError, Listener};
use migration_stream::io::{CancelToken, FdChannel, PositionedFile, open_direct};
use migration_stream::mapped_ram::FileReader;
use migration_stream::precopy::{Loaded, Target, TargetConfig, TargetError};
use migration_stream::ram::NoMultifd;
use migration_stream::raw::early::EarlySections;
use migration_stream::raw::opaque_tail::tail_at_end;
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{
    Configuration, ConfigurationRule, DecoderConfig, StreamReader, TailError, TailLimits,
    TransportError,
};
use multifd::{MultifdConfig, RecvChannel, RecvSet};

use tool_support::device_state::Excess;
use tool_support::input::{Input, InputError, find_stream};

use crate::counted::Counted;
use crate::endpoint::Endpoint;
use crate::guest::{Devices, Guest, version};
use crate::memory::{HoldError, Memory};
use crate::progress::{Figures, Progress, Stage};
use crate::{Access, Channels};
use migration_stream::MachineVersion;

/// Where a guest comes from, and how.
#[derive(Clone, Debug)]
pub struct IncomingConfig {
    /// The socket to listen at, or the file.
    pub from: Endpoint,
    /// Multifd's channels (the capability `multifd`). A file written by channels needs none.
    pub channels: Option<Channels>,
    /// How pages that have their places in a file are read.
    pub access: Access,
    /// Pages may come as differences (the capability `xbzrle`).
    pub xbzrle: bool,
    /// The version of a machine type whose name has none.
    pub machine_version: Option<MachineVersion>,
    /// The UUID with which the source's channels introduce themselves, zero if it has none.
    pub uuid: [u8; 16],
    /// How much memory the guest may have, bytes.
    pub max_memory: u64,
    /// How much device state it may have, bytes: before memory, and behind it together with its
    /// description and with dirty bitmaps.
    pub max_device_state: usize,
    /// Takes a guest from a source that does not wait to hear that it was taken.
    pub without_return_path: bool,
    /// How long a read or write may wait for the source.
    pub timeout: Duration,
    /// How long the source may say nothing between two items of its stream, where its guest may
    /// stand still because its operator wants it to (`pause-before-switchover`).
    pub pause_timeout: Duration,
}

/// A relay that waits for a guest.
#[derive(Debug)]
pub struct Incoming {
    config: IncomingConfig,
    origin: Origin,
}

enum Origin {
    Socket {
        acceptor: Box<Acceptor>,
        address: Address,
    },
    Pipe {
        channel: FdChannel,
        offset: u64,
    },
    File {
        file: Arc<dyn PositionedFile>,
        /// The same one, as its pages are read.
        pages: Arc<dyn PositionedFile>,
        offset: u64,
    },
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket { address, .. } => f.debug_tuple("Socket").field(address).finish(),
            Self::Pipe { offset, .. } => f.debug_tuple("Pipe").field(offset).finish(),
            Self::File { offset, .. } => f.debug_tuple("File").field(offset).finish(),
        }
    }
}

/// A guest that was taken over. Its source stands still until [`Received::confirm`], if it has
/// opened a return path; dropping this gives the guest back to it.
#[derive(Debug)]
pub struct Received {
    /// The guest.
    pub guest: Guest,
    /// What taking it cost.
    pub figures: Figures,
    loaded: Loaded,
    waits: bool,
    has_left: bool,
}

impl Incoming {
    /// Listens, or opens the file.
    ///
    /// # Errors
    /// Neither can be done.
    pub fn open(config: IncomingConfig) -> Result<Self, IncomingError> {
        let origin = match &config.from {
            Endpoint::Socket(address) => {
                let listener = Listener::bind(address)?;
                let address = listener.address().clone();
                let limits = Limits::default()
                    .complete(config.timeout)
                    .channel(config.timeout);
                let multifd = config.channels.map(|c| config.multifd(c));
                let acceptor = Acceptor::new(listener, multifd.as_ref(), limits)?;
                Origin::Socket {
                    acceptor: Box::new(acceptor),
                    address,
                }
            }
            Endpoint::File { .. } if config.channels.is_some() => {
                return Err(IncomingError::ChannelsOfFile);
            }
            Endpoint::File { path, offset } => {
                let failed = |source| IncomingError::File {
                    path: path.clone(),
                    source,
                };
                match Input::open(path, *offset, config.timeout)? {
                    Input::Pipe { channel, offset } => Origin::Pipe { channel, offset },
                    Input::File { file, offset } => {
                        let pages = if config.access.direct {
                            let direct = open_direct(path, File::options().read(true));
                            Arc::new(direct.map_err(failed)?)
                        } else {
                            Arc::clone(&file)
                        };
                        Origin::File {
                            file,
                            pages,
                            offset,
                        }
                    }
                }
            }
        };
        Ok(Self { config, origin })
    }

    /// Where the source is to migrate to, with the port that the system chose if none was asked for;
    /// `None` for a file.
    #[must_use]
    pub const fn address(&self) -> Option<&Address> {
        match &self.origin {
            Origin::Socket { address, .. } => Some(address),
            Origin::File { .. } | Origin::Pipe { .. } => None,
        }
    }

    /// Waits for the source, without limit until it has connected, and takes its guest.
    ///
    /// # Errors
    /// [`IncomingError`]. The guest runs on at its source then.
    pub fn receive(self, progress: &Arc<Progress>) -> Result<Received, IncomingError> {
        self.announced(progress)?.receive(progress)
    }

    /// Waits for the source, without limit until it has connected, and for what it says of the guest
    /// before the first page.
    ///
    /// # Errors
    /// [`IncomingError`]. The guest runs on at its source then.
    pub fn announced(self, progress: &Arc<Progress>) -> Result<Announced, IncomingError> {
        let Self { config, origin } = self;
        let mut acceptor = match origin {
            Origin::Socket { acceptor, .. } => acceptor,
            Origin::Pipe { channel, offset } => {
                let channel = Counted::new(channel, Arc::clone(progress));
                let mut reader = StreamReader::new(channel, b"");
                find_stream(&mut reader, offset)?;
                return config.announced(reader, None, None, Pages::Stream, progress);
            }
            Origin::File {
                file,
                pages,
                offset,
            } => {
                let counted = |file| -> Arc<dyn PositionedFile> {
                    Arc::new(Counted::new(file, Arc::clone(progress)))
                };
                let stream = counted(Arc::clone(&file));
                let mut reader = StreamReader::from_file(Arc::clone(&stream), offset);
                find_stream(&mut reader, 0)?;
                let pages = FileReader::new(stream)
                    .with_threads(config.access.threads)
                    .with_pages_from(counted(pages));
                let pages = Pages::File(pages);
                return config.announced(reader, None, Some(&*file), pages, progress);
            }
        };
        let connected = acceptor.accept(None)?;
        // Nobody else is let in.
        drop(acceptor);
        let main = connected.main;
        let reader = StreamReader::new(
            Counted::new(main.share(), Arc::clone(progress)),
            &connected.prefix,
        );
        progress.incoming.add_bytes(connected.prefix.len());
        let pages = match config.channels {
            None => Pages::Stream,
            Some(channels) => Pages::Channels {
                multifd: Box::new(config.multifd(channels)),
                channels: connected.channels,
                main: main.share(),
            },
        };
        config.announced(reader, Some(main), None, pages, progress)
    }
}

/// A guest that is about to come.
#[derive(Debug)]
pub struct Announced {
    /// Memory for it.
    pub memory: Arc<Memory>,
    /// The source's configuration section, if it sends one.
    pub configuration: Option<Configuration>,
    target: Target,
    cancel: CancelToken,
    pages: Pages,
    line: Option<FdChannel>,
    begun: Instant,
    max_device_state: usize,
    pause_timeout: Duration,
}

impl Announced {
    /// Devices whose state came before memory.
    #[must_use]
    pub const fn early(&self) -> &EarlySections {
        self.target.early_sections()
    }

    /// Returns what ends [`Announced::receive`] from another thread. The guest runs on at its source then.
    #[must_use]
    pub const fn cancel_token(&self) -> &CancelToken {
        &self.cancel
    }

    /// Takes the guest.
    ///
    /// # Errors
    /// [`IncomingError`]. The guest runs on at its source then.
    pub fn receive(self, progress: &Arc<Progress>) -> Result<Received, IncomingError> {
        let waits = self.target.has_return_path();
        let early = self.target.early_sections().clone();
        let target = self.target.allowing_pauses_of(self.pause_timeout);
        let limits = limits(self.max_device_state);
        let (loaded, devices) = self.pages.load(target, &self.memory, limits, progress)?;
        Ok(Received {
            guest: Guest {
                memory: self.memory,
                configuration: self.configuration,
                early,
                devices,
            },
            figures: progress.incoming.figures(self.begun.elapsed()),
            loaded,
            waits,
            has_left: self.line.is_some() && !waits,
        })
    }
}

/// A tail of at most `len` bytes.
pub(crate) fn limits(len: usize) -> TailLimits {
    TailLimits {
        len,
        ..TailLimits::default()
    }
}

impl IncomingConfig {
    fn multifd(&self, channels: Channels) -> MultifdConfig {
        MultifdConfig::new(channels.count)
            .compression(channels.compression)
            .uuid(self.uuid)
            .stall_limit(self.timeout)
    }

    /// Compares the device state behind RAM with its limit before RAM is read, if the file says already how
    /// much it is.
    fn check_device_state(
        &self,
        file: &dyn PositionedFile,
        early: usize,
    ) -> Result<(), IncomingError> {
        let max = self.max_device_state;
        let len = tail_at_end(file, early, limits(max)).map_err(IncomingError::Read)?;
        match len {
            Some(len) if len > max as u64 => Err(IncomingError::DeviceState {
                len: Some(len),
                max,
                source: None,
            }),
            _ => Ok(()),
        }
    }

    fn announced(
        &self,
        mut reader: StreamReader,
        line: Option<FdChannel>,
        file: Option<&dyn PositionedFile>,
        pages: Pages,
        progress: &Arc<Progress>,
    ) -> Result<Announced, IncomingError> {
        let begun = Instant::now();
        progress.begin(Stage::Receiving);
        let target_config = TargetConfig::new(
            DecoderConfig::new(ConfigurationRule::AnyOrAbsent).xbzrle(self.xbzrle),
        )
        .max_devices(self.max_device_state);
        let cancel = CancelToken::new().map_err(IncomingError::Host)?;
        reader.set_cancel(&cancel);
        let return_path = line.as_ref().map(|line| Box::new(line.share()) as _);
        let (mut target, blocks) = Target::from_announcement(target_config, reader, return_path)?;
        if blocks.ignores_shared() {
            return Err(IncomingError::SharedMemory);
        }
        if line.is_some() && !target.has_return_path() && !self.without_return_path {
            return Err(IncomingError::NoReturnPath);
        }
        if let Some(file) = file {
            self.check_device_state(file, target.early_sections().len())?;
        }
        let configuration = target.configuration().cloned();
        let memory = Memory::new(blocks, self.max_memory, Arc::clone(progress))?;
        if matches!(pages, Pages::Channels { .. })
            && version(configuration.as_ref(), self.machine_version).flushes_each_section()
        {
            target = target.flushing_each_section();
        }
        Ok(Announced {
            memory: Arc::new(memory),
            configuration,
            target,
            cancel,
            pages,
            line,
            begun,
            max_device_state: self.max_device_state,
            pause_timeout: self.pause_timeout,
        })
    }
}

/// Which way pages come.
enum Pages {
    Stream,
    Channels {
        multifd: Box<MultifdConfig>,
        channels: Vec<FdChannel>,
        /// To be ended when a channel breaks.
        main: FdChannel,
    },
    File(FileReader),
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "Stream",
            Self::Channels { .. } => "Channels",
            Self::File(_) => "File",
        })
    }
}

impl Pages {
    fn load(
        self,
        target: Target,
        memory: &Arc<Memory>,
        limits: TailLimits,
        progress: &Arc<Progress>,
    ) -> Result<(Loaded, Devices), IncomingError> {
        let load = |barrier: &mut dyn PageBarrier| {
            let target = target.keeping_dirty_bitmaps();
            let (loaded, tail) = target.load_opaque(memory, barrier, limits)?;
            let bitmaps = loaded.dirty_bitmaps().clone();
            Ok::<_, TargetError>((loaded, Devices { tail, bitmaps }))
        };
        match self {
            Self::Stream => Ok(load(&mut NoMultifd)?),
            Self::File(mut reader) => Ok(load(&mut reader)?),
            Self::Channels {
                multifd,
                channels,
                main,
            } => {
                let channels = channels.into_iter().map(|channel| {
                    let closer = channel.share();
                    let counted = Counted::new(channel, Arc::clone(progress));
                    RecvChannel::new(counted, move || closer.shutdown())
                });
                let store = Arc::clone(memory);
                let set = RecvSet::start(store, channels.collect(), &multifd, move |_| {
                    main.shutdown();
                })
                .map_err(IncomingError::Channels)?;
                let loaded = load(&mut set.barrier());
                // Everything has landed, and idle channels are not waited at while the guest is held.
                let joined = set.join().map_err(IncomingError::Channels)?;
                // The channel that broke knows more than the main stream that was ended for it.
                joined.outcome.map_err(IncomingError::Channels)?;
                Ok(loaded?)
            }
        }
    }
}

impl Received {
    /// Whether the source stands still until it hears.
    #[must_use]
    pub const fn is_awaited(&self) -> bool {
        self.waits
    }

    /// Whether nobody else has the guest any more: its source neither waits nor is a file.
    #[must_use]
    pub const fn is_only_here(&self) -> bool {
        self.has_left
    }

    /// Tells the source that the guest is safe: it lets go of it.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn confirm(mut self) -> Result<(), TargetError> {
        self.loaded.confirm()
    }

    /// Returns whether the source is still there and waits to hear of the guest.
    pub fn source_waits(&mut self) -> bool {
        self.loaded.source_waits()
    }

    /// Gives the guest back to the source, where it runs on.
    pub fn refuse(self) {
        self.loaded.refuse();
    }
}

/// Why a guest could not be taken. It runs on at its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// Nobody can listen there.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The source's connections did not come.
    #[error("connections of the source")]
    Accept(#[from] migration_net::incoming::IncomingError),
    /// The file cannot be opened.
    #[error("opening {}", tool_support::Escaped(&.path.to_string_lossy()))]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("reading the end of the file")]
    Read(#[source] io::Error),
    /// There is no stream in the file or the pipe.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Channels were asked for where there can be none.
    #[error("a file has no multifd channels: what they wrote is read without them")]
    ChannelsOfFile,
    /// The stream is not sound, or broke.
    #[error("the incoming stream")]
    Stream(#[source] TargetError),
    /// The guest has more device state than is taken.
    #[error("{}", Excess { len: *.len, max: *.max as u64 })]
    DeviceState {
        /// How much, bytes; `None` where it was given up before the end.
        len: Option<u64>,
        /// The limit, bytes.
        max: usize,
        /// Where it was exceeded; `None` where a file says it before its stream is read so far.
        source: Option<TargetError>,
    },
    /// The process has no more descriptors.
    #[error("the host")]
    Host(#[source] io::Error),
    /// Multifd's channels.
    #[error("the incoming channels")]
    Channels(#[source] TransportError),
    /// It cannot be held.
    #[error("holding the guest")]
    Hold(#[from] HoldError),
    /// Part of memory is not in the stream.
    #[error(
        "the source leaves shared memory out of the stream (x-ignore-shared), and there is no \
         other way to it"
    )]
    SharedMemory,
    /// The guest that had come is not there any more.
    #[error("the guest that had come is gone")]
    Gone,
    /// The source would let go of the guest before it is safe.
    #[error(
        "the source has opened no return path, on which it would wait to hear that the guest is \
         safe (its capability return-path)"
    )]
    NoReturnPath,
}

impl From<TargetError> for IncomingError {
    fn from(source: TargetError) -> Self {
        match source {
            TargetError::Tail(TailError::TooLong { max, .. })
            | TargetError::DeviceTooLong { max, .. } => Self::DeviceState {
                len: None,
                max,
                source: Some(source),
            },
            source => Self::Stream(source),
        }
    }
}
