//! What can be wrong with a command.

use super::number::CommandNumber;
use crate::IdStr;

/// What is wrong with a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// No command has this number.
    #[error("unknown command {number:#x} (length {len:#x})")]
    Unknown {
        /// The number.
        number: u16,
        /// Length of its payload, bytes.
        len: u16,
    },
    /// Command 8.
    #[error("deprecated command 0x8 (length {len:#x}); before QEMU 11.0: ENABLE_COLO")]
    Deprecated {
        /// Length of its payload, bytes.
        len: u16,
    },
    /// The payload's length is not one the command can have.
    #[error(
        "command {command:?} with a payload of {len} bytes, expected {expected}",
        expected = command.expected()
    )]
    Length {
        /// The command.
        command: CommandNumber,
        /// Length of its payload, bytes.
        len: u16,
    },
    /// A discard's payload is of another version.
    #[error("command PostcopyRamDiscard of version {found}, expected 0")]
    DiscardVersion {
        /// The version.
        found: u8,
    },
    /// The name in a discard is not followed by a zero byte.
    #[error("block name '{block}' in PostcopyRamDiscard ends with {found:#04x}, expected 0")]
    DiscardName {
        /// The name.
        block: IdStr,
        /// The byte after it.
        found: u8,
    },
    /// The ranges of a discard end inside one.
    #[error("PostcopyRamDiscard of '{block}': {left} bytes are not a whole number of ranges")]
    DiscardPartialRange {
        /// The block.
        block: IdStr,
        /// Bytes after its name.
        left: usize,
    },
    /// A discard without ranges, or with more than fit.
    #[error("{count} ranges in PostcopyRamDiscard, expected 1 to {max}")]
    DiscardRanges {
        /// How many there are.
        count: usize,
        /// How many fit.
        max: usize,
    },
}
