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
//!
//! use migration_stream::io::FdChannel;
//! use migration_stream::precopy::RamSetup;
//! use migration_stream::{DirtyLog, GuestRam, PageStore};
//! use multifd::{IncomingPages, MultifdConfig, RecvSet, SendSet};
//!
//! /// What `Source::start` takes beside the main stream: the channels as the transport of RAM.
//! fn source<D: DirtyLog>(
//!     ram: Arc<dyn GuestRam>,
//!     log: D,
//!     channels: Vec<FdChannel>,
//! ) -> Result<RamSetup<SendSet, D>, Box<dyn Error>> {
//!     let channels = channels.into_iter().map(Into::into).collect();
//!     let transport = SendSet::start(ram, channels, &MultifdConfig::default())?;
//!     Ok(RamSetup { log, transport })
//! }
//!
//! /// What `Target::load` takes: the store, and the channels that fill it.
//! fn target<S: PageStore + 'static>(
//!     store: S,
//!     main: &FdChannel,
//!     channels: Vec<FdChannel>,
//! ) -> Result<IncomingPages<S>, Box<dyn Error>> {
//!     let channels = channels.into_iter().map(Into::into).collect();
//!     // The loader of the main stream notices at once when a channel breaks.
//!     let main = main.share();
//!     let set = RecvSet::start(store, channels, &MultifdConfig::default(), move |_| main.shutdown())?;
//!     Ok(IncomingPages::multifd(set))
//! }
//! ```
//!
//! - [`SendSet`] and [`RecvSet`]: the two ends, from connected channels (the crate `migration-net` connects them).
//! - [`packet`], [`device_state`] and [`compression`]: what is on the wire.
//!
//! # Features
//! - `zlib` (default): [`Compression::Zlib`].
//! - `zstd`: [`Compression::Zstd`]. It builds C code.
//! - `zstd-adaptive`: [`Compression::ZstdAdaptive`], whose level follows network and processors; with `zstd`.
#![forbid(unsafe_code)]

mod channel;
mod channel_id;
pub mod compression;
mod config;
mod crew;
pub mod device_state;
mod error;
pub mod packet;
mod pages;
mod patience;
mod recv;
mod runs;
mod send;

pub use channel::{RecvChannel, SendChannel};
pub use channel_id::{ChannelCount, ChannelId};
#[cfg(feature = "zlib")]
pub use config::ZlibLevel;
#[cfg(feature = "zstd")]
pub use config::ZstdLevel;
pub use config::{Compression, Flush, MultifdConfig};
#[cfg(feature = "zstd-adaptive")]
pub use config::{ZstdRange, ZstdRangeError};
pub use crew::AbortHandle;
pub use error::{ChannelError, Part};
pub use pages::IncomingPages;
pub use recv::{Joined, RecvBarrier, RecvCounters, RecvSet};
#[cfg(feature = "zstd-adaptive")]
pub use send::LevelWatch;
pub use send::SendSet;

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
