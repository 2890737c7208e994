//! The connections of a live migration: addresses, listening, connecting, and telling the connections
//! of one migration apart.
//!
//! - [`Address`], [`Listener`] and [`ResolvedAddress`]: where to listen, and where to connect to.
//! - [`outgoing`]: the connections of a source.
//! - [`incoming`]: the connections of a target, whoever else connects.
#![forbid(unsafe_code)]

mod address;
pub mod incoming;
pub mod outgoing;

pub use address::{
    Address, AddressError, AddressSyntax, KeepAlive, Listener, ResolvedAddress, TcpOptions,
};

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
