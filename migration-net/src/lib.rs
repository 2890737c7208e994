//! How a guest gets from one VMM to another: over one connection, over parallel channels, or through a file.
//!
//! - [`Route`]: how a guest goes, over connections or through a file.
//! - [`Address`], [`Listener`] and [`ResolvedAddress`]: where to listen, and where to connect to.
//! - [`outgoing`]: the connections of a source.
//! - [`incoming`]: the connections of a target, whoever else connects.
//!
//! The README has both sides of a migration, compiled.
//!
//! # Features
//! - `multifd` (default): channels, by the crate `multifd`.
#![forbid(unsafe_code)]

mod address;
mod channels;
pub mod incoming;
pub mod outgoing;
mod route;

pub use address::{
    Address, AddressError, AddressSyntax, KeepAlive, Listener, ResolvedAddress, TcpOptions,
};
pub use channels::{ChannelCount, ChannelId, Channels, PacketError};
pub use route::{Destination, Origin, Pages, Route};

/// Compiles the example of the README.
#[cfg(all(doctest, feature = "multifd"))]
#[doc = include_str!("../README.md")]
struct Readme;
