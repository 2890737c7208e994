//! What can be wrong in postcopy.

use super::state::PostcopyState;
use crate::raw::command::CommandNumber;

/// What stands behind the bits.
pub(super) const END_MARK: u64 = 0x0123_4567_89ab_cdef;

/// What is wrong with the bitmap of a block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// It is that of a block that this side does not have.
    #[error("bitmap of an unknown ram block '{name}'", name = crate::Escaped(.name))]
    UnknownBlock {
        /// Its name.
        name: String,
    },
    /// Its length is not that of the block.
    #[error("bitmap of {found} bytes, expected {expected}")]
    Length {
        /// The length received.
        found: u64,
        /// The block's.
        expected: u64,
    },
    /// Something else stands where it should end.
    #[error("bitmap ends with {found:#018x}, expected {END_MARK:#018x}")]
    EndMark {
        /// What stands there.
        found: u64,
    },
    /// A block of more pages than fit in memory.
    #[error("bitmap of {pages} pages")]
    TooLong {
        /// How many.
        pages: u64,
    },
}

/// What is wrong with the order of postcopy's commands, or with what both sides have to agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OrderError {
    /// The command does not belong where it came.
    #[error("command {command:?} in postcopy state '{state}'")]
    State {
        /// The command.
        command: CommandNumber,
        /// The state in which it came.
        state: PostcopyState,
    },
    /// LISTEN or RUN outside of a package.
    #[error("command {command:?} outside of a package")]
    NotPackaged {
        /// The command.
        command: CommandNumber,
    },
    /// A command that cannot be inside of a package, another package among them.
    #[error("command {command:?} inside of a package")]
    InPackage {
        /// The command.
        command: CommandNumber,
    },
    /// Postcopy of RAM is on here, and off at the source.
    #[error("postcopy of ram is on, but the source advises none")]
    RamNotAdvised,
    /// Postcopy of RAM is off here, and on at the source.
    #[error("postcopy of ram is off, but the source advises it")]
    RamAdvised,
    /// The RAM blocks are in pages of another size.
    #[error("ram in pages of sizes {received:#x}, expected {local:#x}")]
    RamPageSizes {
        /// The source's sizes, bytes, or-ed together.
        received: u64,
        /// Our own.
        local: u64,
    },
    /// Another target page size.
    #[error("target page size {received:#x}, expected {local:#x}")]
    TargetPageSize {
        /// The source's, bytes.
        received: u64,
        /// Our own, bytes.
        local: u64,
    },
    /// RAM is to be dropped that does not come by postcopy.
    #[error("command PostcopyRamDiscard, but postcopy of ram was not advised")]
    DiscardWithoutRam,
    /// The stream ends before postcopy does.
    #[error("the stream ends in postcopy state '{state}'")]
    EndOfStream {
        /// The state.
        state: PostcopyState,
    },
    /// A connection that broke, or that is there again, where that is no part of postcopy.
    #[error("no recovery from postcopy state '{state}'")]
    NotRecoverable {
        /// The state.
        state: PostcopyState,
    },
}

/// What is wrong with a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackageError {
    /// Longer than is accepted, or than can be said.
    #[error("package of {len} bytes, expected at most {max}")]
    TooLong {
        /// Its length, bytes.
        len: u64,
        /// The limit, bytes.
        max: u32,
    },
    /// Something in it reaches beyond its end.
    #[error("an item reaches at least {by} bytes beyond the end of its package")]
    Overrun {
        /// By how many bytes, at least.
        by: u64,
    },
    /// It ends, and the guest was not told to run.
    #[error("the package ends without command PostcopyRun")]
    NoRun,
    /// It goes on after the guest was told to run.
    #[error("{len} bytes in the package behind command PostcopyRun")]
    AfterRun {
        /// How many there are.
        len: u64,
    },
}
