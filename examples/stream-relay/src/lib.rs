//! A relay for migration streams: takes a guest from a QEMU, holds it, and gives it to another one or
//! to a file, by another transport than it came by.
//!
//! ```text
//! Incoming ──> Arrival (memory as far as it has landed) ──────────> outgoing::forward
//!     └──────> Guest (memory, configuration, devices as they are) ──> outgoing::send
//!                 └──────────── store (a directory) ────────────┘
//! ```
//!
//! It knows no device and no machine: the blocks of memory are those that the source announces, and
//! device sections pass through as bytes, told apart by the description at the stream's end.
//!
//! | module | what |
//! |---|---|
//! | [`relay`] | the order of things: when the source hears that it may let go |
//! | [`incoming`], [`outgoing`] | a guest from a source, a guest to a destination |
//! | [`guest`], [`memory`], [`arrival`] | what is held, and what is on its way |
//! | [`store`] | what is kept in a directory |
//! | [`endpoint`], [`progress`] | addresses, figures |
//! | [`cli`] | the program |
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod arrival;
pub mod cli;
mod counted;
pub mod endpoint;
pub mod guest;
pub mod incoming;
pub mod memory;
pub mod outgoing;
mod partial;
pub mod progress;
pub mod relay;
pub mod store;

use std::num::NonZeroU8;

/// How the pages of a file with `mapped-ram` are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// By as many threads at a time (what the capability `multifd` is to QEMU's files).
    pub threads: NonZeroU8,
    /// Past the page cache (the parameter `direct-io`).
    pub direct: bool,
}

impl Default for Access {
    /// One thread, through the page cache.
    fn default() -> Self {
        Self {
            threads: NonZeroU8::MIN,
            direct: false,
        }
    }
}

/// How the multifd channels of one side are set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channels {
    /// How many.
    pub count: multifd::ChannelCount,
    /// How they compress.
    pub compression: multifd::Compression,
}
