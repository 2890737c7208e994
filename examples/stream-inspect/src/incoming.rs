//! A stream that a source sends, which keeps its guest: the migration is never confirmed.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration_net::incoming::{Acceptor, Limits};
use migration_net::{Address, AddressError, Listener};
use migration_stream::io::{
    ByteSink, ByteSource, CancelToken, Chunk, FdChannel, PositionedFile, Readiness,
};
use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::raw::command::Command;
use migration_stream::raw::return_path::ReturnPathMessage;
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{
    Configuration, MachineVersion, MemoryError, PAGE_SIZE, PageStore, StreamReader, TransportError,
};
use multifd::{MultifdConfig, RecvChannel, RecvSet};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::scan::{Beside, BesideBlock, Origin, ScanError};

/// The longest run of pages that a channel may want room for, bytes.
const SCRATCH: usize = 4 << 20;

/// What a source is expected to do.
#[derive(Clone, Debug)]
pub struct ListenConfig {
    /// Where to listen.
    pub at: Address,
    /// Multifd's channels (the capability `multifd`).
    pub multifd: Option<MultifdConfig>,
    /// Takes a stream from a source that opens no return path, and therefore cannot be told to keep
    /// its guest.
    pub without_return_path: bool,
    /// How long a read may wait for the source.
    pub timeout: Duration,
}

/// A socket at which a source is waited for.
#[derive(Debug)]
pub struct Listening {
    config: ListenConfig,
    acceptor: Acceptor,
    address: Address,
}

impl Listening {
    /// Listens.
    ///
    /// # Errors
    /// Nobody can listen there.
    pub fn open(config: ListenConfig) -> Result<Self, IncomingError> {
        let listener = Listener::bind(&config.at)?;
        let address = listener.address().clone();
        let limits = Limits::default()
            .complete(config.timeout)
            .channel(config.timeout);
        let acceptor = Acceptor::new(listener, config.multifd.as_ref(), limits)?;
        Ok(Self {
            config,
            acceptor,
            address,
        })
    }

    /// Where the source is to migrate to.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the source, without limit until it has connected.
    ///
    /// # Errors
    /// Its connections do not come.
    pub fn accept(mut self) -> Result<(SourceOrigin, StreamReader), IncomingError> {
        let connected = self.acceptor.accept(None)?;
        // Nobody else is let in: the address is free again.
        drop(self.acceptor);
        let reader = StreamReader::new(connected.main.share(), &connected.prefix);
        let origin = SourceOrigin {
            out: connected.main,
            is_open: false,
            config: self.config,
            waiting: connected.channels,
            channels: None,
            flushes_each_section: false,
        };
        Ok((origin, reader))
    }
}

/// A source. It is told that the migration has failed when this is dropped, and its guest runs on.
pub struct SourceOrigin {
    out: FdChannel,
    is_open: bool,
    config: ListenConfig,
    waiting: Vec<FdChannel>,
    channels: Option<Channels>,
    flushes_each_section: bool,
}

struct Channels {
    set: RecvSet<Counts>,
    bytes: Arc<AtomicU64>,
}

impl SourceOrigin {
    fn send(&mut self, message: &ReturnPathMessage) -> Result<(), IncomingError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.out
            .write_all(&[Chunk::Bytes(&bytes)])
            .map_err(IncomingError::Socket)
    }
}

impl Origin for SourceOrigin {
    fn failure(&self) -> Option<ScanError> {
        let channels = self.channels.as_ref()?;
        let error = channels.set.barrier().failure()?;
        Some(IncomingError::Channels(error).into())
    }

    fn command(&mut self, command: &Command) -> Result<(), ScanError> {
        match command {
            Command::OpenReturnPath => self.is_open = true,
            Command::Ping(value) if self.is_open => self.send(&ReturnPathMessage::Pong(*value))?,
            _ => {}
        }
        Ok(())
    }

    fn announced(
        &mut self,
        configuration: Option<&Configuration>,
        blocks: &RamBlockTable,
    ) -> Result<(), ScanError> {
        if !self.is_open && !self.config.without_return_path {
            return Err(IncomingError::NoReturnPath.into());
        }
        let Some(multifd) = &self.config.multifd else {
            return Ok(());
        };
        let version = configuration.and_then(|c| MachineVersion::of(&c.machine));
        self.flushes_each_section = version.is_some_and(MachineVersion::flushes_each_section);
        let bytes = Arc::new(AtomicU64::new(0));
        let channels = std::mem::take(&mut self.waiting).into_iter().map(|source| {
            let closer = source.share();
            let counted = Counted {
                source,
                bytes: Arc::clone(&bytes),
            };
            RecvChannel::new(counted, move || closer.shutdown())
        });
        let main = self.out.share();
        let store = Counts::new(blocks.clone())?;
        let set = RecvSet::start(store, channels.collect(), multifd, move |_| main.shutdown())
            .map_err(IncomingError::Channels)?;
        self.channels = Some(Channels { set, bytes });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ScanError> {
        if let Some(channels) = &self.channels {
            channels
                .set
                .barrier()
                .flush()
                .map_err(IncomingError::Channels)?;
        }
        Ok(())
    }

    fn flushes_each_section(&self) -> bool {
        self.flushes_each_section
    }

    fn beside(&mut self) -> Result<Beside, ScanError> {
        let Some(Channels { set, bytes }) = self.channels.take() else {
            return Ok(Beside::default());
        };
        let joined = set.join().map_err(IncomingError::Channels)?;
        joined.outcome.map_err(IncomingError::Channels)?;
        Ok(Beside {
            bytes: bytes.load(Relaxed),
            blocks: joined.store.into_blocks(),
        })
    }

    fn file(&self) -> Option<&Arc<dyn PositionedFile>> {
        None
    }
}

impl Drop for SourceOrigin {
    fn drop(&mut self) {
        if self.is_open {
            // If it cannot be told, the connection that ends tells it as much.
            let _ = self.send(&ReturnPathMessage::Shut { status: 1 });
        }
        self.out.shutdown();
    }
}

impl std::fmt::Debug for SourceOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceOrigin")
            .field("config", &self.config)
            .field("is_open", &self.is_open)
            .finish_non_exhaustive()
    }
}

/// Counts pages, and keeps none.
struct Counts {
    table: RamBlockTable,
    /// All channels write into it, and nobody reads it.
    scratch: MmapRegion,
    blocks: Vec<Mutex<BesideBlock>>,
}

impl Counts {
    fn new(table: RamBlockTable) -> Result<Self, IncomingError> {
        let scratch = MmapRegion::new(SCRATCH).map_err(|e| IncomingError::Memory(e.into()))?;
        let blocks = table.iter().map(|_| Mutex::default()).collect();
        Ok(Self {
            table,
            scratch,
            blocks,
        })
    }

    fn into_blocks(self) -> Vec<BesideBlock> {
        let blocks = self.blocks.into_iter();
        blocks
            .map(|block| block.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect()
    }

    fn block(
        &self,
        id: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<MutexGuard<'_, BesideBlock>, MemoryError> {
        let (block, counts) = self
            .table
            .get(id)
            .zip(self.blocks.get(id.index()))
            .ok_or(MemoryError::NoBlock(id))?;
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > block.used_length()) {
            return Err(MemoryError::OutOfBlock {
                name: block.name().to_owned(),
                offset,
                len,
                used_length: block.used_length(),
            });
        }
        Ok(counts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PageStore for Counts {
    fn blocks(&self) -> &RamBlockTable {
        &self.table
    }

    fn prepare(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        drop(self.block(block, offset, len)?);
        self.scratch
            .get_slice(0, len)
            .map_err(|source| MemoryError::Backend {
                what: "room for a run of pages",
                source: source.into(),
            })
    }

    fn landed(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        let mut counts = self.block(block, offset, len)?;
        let pages = len as u64 / PAGE_SIZE;
        counts.normal += pages;
        counts.unique.insert(offset / PAGE_SIZE, pages);
        Ok(())
    }

    fn zero(&self, block: BlockId, offset: u64, len: usize) -> Result<(), MemoryError> {
        let mut counts = self.block(block, offset, len)?;
        let pages = len as u64 / PAGE_SIZE;
        counts.zero += pages;
        counts.unique.insert(offset / PAGE_SIZE, pages);
        Ok(())
    }
}

/// A channel whose bytes are counted.
struct Counted {
    source: FdChannel,
    bytes: Arc<AtomicU64>,
}

impl ByteSource for Counted {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read_scatter(guest, buf)?;
        self.bytes.fetch_add(n as u64, Relaxed);
        Ok(n)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let n = self.source.try_read(buf)?;
        self.bytes.fetch_add(n.unwrap_or_default() as u64, Relaxed);
        Ok(n)
    }

    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        self.source.wait(other, deadline)
    }

    fn set_read_deadline(&mut self, deadline: Option<Instant>) {
        self.source.set_read_deadline(deadline);
    }

    fn set_cancel(&mut self, token: &CancelToken) {
        ByteSource::set_cancel(&mut self.source, token);
    }

    fn set_quick_ack(&mut self, on: bool) {
        self.source.set_quick_ack(on);
    }
}

/// Why a source's stream could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// Nobody can listen there.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The source's connections did not come.
    #[error("connections of the source")]
    Accept(#[from] migration_net::incoming::IncomingError),
    /// The connection to the source.
    #[error("the connection to the source")]
    Socket(#[source] io::Error),
    /// Multifd's channels.
    #[error("the source's channels")]
    Channels(#[source] TransportError),
    /// Room for pages.
    #[error("room for pages")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The source would let go of its guest.
    #[error(
        "the source has opened no return path (its capability return-path): it would take its guest \
         for migrated when it has sent everything"
    )]
    NoReturnPath,
}
