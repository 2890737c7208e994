//! How pages cross: records in the main stream, or multifd's channels beside it.

mod counters;
mod error;

pub use self::counters::TransportCounters;
pub use self::error::TransportError;
use crate::raw::transport::SendPages;

/// Sends pages: [`InStream`](crate::ram::InStream) in the main stream,
/// [`FileWriter`](crate::mapped_ram::FileWriter) into a file, `SendSet` of crate `multifd` on channels.
///
/// A VMM chooses one and gives it to [`Source::start`](crate::precopy::Source::start). The methods are those of
/// [`SendPages`], which drivers call, and which semantic versioning does not cover.
pub trait PageTransport: SendPages {}

impl<T: SendPages + ?Sized> PageTransport for T {}
