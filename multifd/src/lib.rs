//! QEMU's multifd: the RAM pages of a migration on 1 to 255 connections beside the main stream.
//!
//! On both sides every channel has a thread. The source's find the zero pages and write packets of
//! up to 128 pages out of guest memory; the destination's read them into a
//! [`PageStore`](migration_stream::PageStore). Nothing else of the migration is on the channels:
//! at a sync point each carries one SYNC packet, and the main stream a MULTIFD_FLUSH record. The
//! bytes are those of QEMU 7.2 to 11.1 (`migration/multifd*.c`).
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use migration_stream::ram::BlockId;
//! use migration_stream::{GuestRam, PageStore, PageTransport, StreamWriter};
//! use multifd::incoming::{Acceptor, Limits};
//! use multifd::{Listener, MultifdConfig, RecvSet, SendSet, outgoing};
//!
//! fn source(ram: Arc<dyn GuestRam>) -> Result<(), Box<dyn std::error::Error>> {
//!     let config = MultifdConfig::default();
//!     let limit = Duration::from_secs(30);
//!     let out = outgoing::connect(
//!         &"tcp:127.0.0.1:4444".parse()?,
//!         Some(&config),
//!         limit,
//!         limit,
//!         None,
//!     )?;
//!     let mut main = StreamWriter::new(out.main);
//!     let channels = out.channels.into_iter().map(Into::into).collect();
//!     let mut pages = SendSet::start(ram, channels, &config)?;
//!     pages.send(&mut main, BlockId::new(0), 0, 256)?; // between the main stream's sections
//!     pages.sync(&mut main)?;
//!     pages.join()?;
//!     Ok(())
//! }
//!
//! fn destination<S: PageStore + 'static>(store: S) -> Result<S, Box<dyn std::error::Error>> {
//!     let config = MultifdConfig::default();
//!     let listener = Listener::bind(&"tcp:127.0.0.1:4444".parse()?)?;
//!     let incoming = Acceptor::new(listener, Some(&config), Limits::default())?.accept(None)?;
//!     let waker = incoming.main.share();
//!     let channels = incoming.channels.into_iter().map(Into::into).collect();
//!     let set = RecvSet::start(store, channels, &config, move |_| waker.shutdown())?;
//!     let barrier = set.barrier(); // for whoever reads the main stream
//!     # drop(barrier);
//!     Ok(set.join()?.store)
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
