//! Accepting an incoming migration: which connection is the main channel, which are multifd's.
//!
//! The source connects the main channel first but writes to it last: channels can introduce
//! themselves in any order, and before the main channel's first byte is there. So connections are
//! told apart by what they say, many at a time: [`Classifier`] decides without any I/O,
//! [`Collection`] decides how long each is waited for and how many there may be, and [`Acceptor`]
//! runs both over a listening socket and everything that was accepted from it.

mod acceptor;
mod classifier;
mod collection;
mod error;

pub use acceptor::{Acceptor, Incoming};
pub use classifier::{Classifier, Greeting, MAIN_MAGIC, Refusal, Role};
pub use collection::{Collection, Limits};
pub use error::IncomingError;
