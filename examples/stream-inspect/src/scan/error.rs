//! Why a stream could not be read.

use std::io;

use migration_stream::raw::early::EarlyError;
use migration_stream::{DecodeError, IdStr, SectionId, TailError};
use tool_support::device_state::Excess;

use crate::extract::ExtractError;
use crate::incoming::IncomingError;

/// Why a stream could not be read to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    /// It is not what a source of QEMU sends.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It breaks off, or cannot be read.
    #[error("reading byte {offset:#x} of the stream")]
    Stream {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The file ends before the pages of a block do.
    #[error("the file has {size:#x} bytes, but the pages of a block end at {end:#x}")]
    Truncated {
        /// Where they end.
        end: u64,
        /// Length of the file, bytes.
        size: u64,
    },
    /// Pages that have their places in a file, and there is none.
    #[error(
        "the pages of this stream have their places in its file (mapped-ram), but it comes through a pipe \
         or a connection: give the file itself"
    )]
    NoFile,
    /// The device sections cannot be told apart.
    #[error(transparent)]
    Tail(TailError),
    /// The guest has more device state than is taken.
    #[error("{}", Excess { len: *.len, max: *.max as u64 })]
    DeviceState {
        /// How much, bytes; `None` where it was given up before the end.
        len: Option<u64>,
        /// The limit, bytes.
        max: usize,
        /// Why the last thing that looked like its end was none.
        source: Option<TailError>,
    },
    /// A section before RAM is not as the description has it.
    #[error(transparent)]
    EarlyDescription(#[from] EarlyError),
    /// A section whose length nobody knows.
    #[error(
        "section '{idstr}' at byte {offset:#x} comes before the end of RAM, and nothing says how \
         long it is"
    )]
    Early {
        /// The section.
        idstr: IdStr,
        /// Where it begins.
        offset: u64,
    },
    /// A continuation of something that is not RAM.
    #[error("{id} at byte {offset:#x} goes on, and it is not RAM")]
    Unknown {
        /// The section.
        id: SectionId,
        /// Where.
        offset: u64,
    },
    /// The source has switched to postcopy.
    #[error(
        "the source went on with postcopy at byte {offset:#x}: no guest is whole in its stream"
    )]
    Postcopy {
        /// Where.
        offset: u64,
    },
    /// The source cannot be answered, or is not wanted.
    #[error(transparent)]
    Incoming(#[from] IncomingError),
    /// What was found cannot be written.
    #[error(transparent)]
    Extract(#[from] ExtractError),
}

impl From<TailError> for ScanError {
    fn from(error: TailError) -> Self {
        match error {
            TailError::TooLong { max, rejected } => Self::DeviceState {
                len: None,
                max,
                source: rejected.map(|rejected| *rejected),
            },
            error => Self::Tail(error),
        }
    }
}
