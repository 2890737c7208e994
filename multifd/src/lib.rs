//! QEMU's multifd: the RAM pages of a migration on 1 to 255 connections beside the main stream.
//!
//! On both sides every channel has a thread. The source's find the zero pages and write packets of
//! up to 128 pages out of guest memory; the destination's read them into a
//! [`PageStore`](migration_stream::PageStore). Nothing else of the migration is on the channels:
//! at a sync point each carries one SYNC packet, and the main stream a MULTIFD_FLUSH record. The
//! bytes are those of QEMU 7.2 to 11.1 (`migration/multifd*.c`).
//!
//! ```no_run
//! use std::error::Error;
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use migration_stream::precopy::RamSetup;
//! use migration_stream::{DirtyLog, GuestRam, PageStore, StreamWriter};
//! use multifd::incoming::{Acceptor, Limits};
//! use multifd::{IncomingPages, Listener, MultifdConfig, RecvSet, SendSet, outgoing};
//!
//! /// What `Source::start` takes: the main stream, and the channels as the transport of RAM.
//! fn source<D: DirtyLog>(
//!     ram: Arc<dyn GuestRam>,
//!     log: D,
//! ) -> Result<(StreamWriter, RamSetup<SendSet, D>), Box<dyn Error>> {
//!     let (config, limit) = (MultifdConfig::default(), Duration::from_secs(30));
//!     let to = "tcp:target:4444".parse()?;
//!     let out = outgoing::connect(&to, Some(&config), limit, limit, None)?;
//!     let channels = out.channels.into_iter().map(Into::into).collect();
//!     let transport = SendSet::start(ram, channels, &config)?;
//!     Ok((StreamWriter::new(out.main), RamSetup { log, transport }))
//! }
//!
//! /// What `Target::load` takes: the store, and the channels that fill it.
//! fn target<S: PageStore + 'static>(store: S) -> Result<IncomingPages<S>, Box<dyn Error>> {
//!     let config = MultifdConfig::default();
//!     let listener = Listener::bind(&"tcp:0.0.0.0:4444".parse()?)?;
//!     let incoming = Acceptor::new(listener, Some(&config), Limits::default())?.accept(None)?;
//!     let channels = incoming.channels.into_iter().map(Into::into).collect();
//!     // The loader of the main stream notices at once when a channel breaks.
//!     let main = incoming.main.share();
//!     let set = RecvSet::start(store, channels, &config, move |_| main.shutdown())?;
//!     Ok(IncomingPages::multifd(set))
//! }
//! ```
//!
//! - [`SendSet`] and [`RecvSet`]: the two ends, from connected channels.
//! - [`incoming`] and [`outgoing`]: how to get those.
//! - [`packet`], [`device_state`] and [`compression`]: what is on the wire.
//!
//! # Features
//! - `zlib` (default): [`Compression::Zlib`].
//! - `zstd` (default): [`Compression::Zstd`] and [`Compression::ZstdAdaptive`].
#![forbid(unsafe_code)]

mod address;
mod channel;
pub mod compression;
mod config;
mod crew;
pub mod device_state;
mod error;
pub mod incoming;
pub mod outgoing;
pub mod packet;
mod pages;
mod patience;
mod recv;
mod runs;
mod send;

pub use address::{Address, AddressError, AddressSyntax, KeepAlive, Listener, Route, TcpOptions};
pub use channel::{RecvChannel, SendChannel};
#[cfg(feature = "zlib")]
pub use config::ZlibLevel;
#[cfg(feature = "zstd")]
pub use config::ZstdLevel;
pub use config::{
    ChannelCount, ChannelId, Compression, Flush, MultifdConfig, ZstdRange, ZstdRangeError,
};
pub use crew::AbortHandle;
pub use error::{ChannelError, Part};
pub use pages::IncomingPages;
pub use recv::{Joined, RecvBarrier, RecvCounters, RecvSet};
pub use send::{LevelWatch, SendSet};

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
