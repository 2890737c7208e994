//! Why a migration failed.

use std::io;

use crate::BoxError;
use crate::raw::command::CommandNumber;
use crate::{MemoryError, SectionId, TransportError};

/// Why an outgoing migration failed. Except for [`SourceError::OutcomeUnknown`] the guest is still the
/// source's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The main stream could not be written.
    #[error("writing the migration stream")]
    Stream(#[from] io::Error),
    /// Pages could not be sent.
    #[error("sending guest memory")]
    Transport(#[from] TransportError),
    /// Guest memory or its dirty log could not be read.
    #[error("reading guest memory")]
    Memory(#[from] MemoryError),
    /// The return path broke, or carried what it must not.
    #[error("return path")]
    ReturnPath(#[source] BoxError),
    /// The destination reported a failure by a SHUT message.
    #[error("the destination reported error {status}")]
    Refused {
        /// The status of its SHUT message, not 0.
        status: u32,
    },
    /// The destination did not confirm the migration.
    #[error("the destination closed the return path without confirming the migration")]
    Unconfirmed,
    /// The VMM could not stop, resume or save the VM.
    #[error("{what}")]
    Vm {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: BoxError,
    },
    /// The migration failed, and the guest stays paused because it could not be resumed either.
    #[error("{cause}; and then resuming the guest failed")]
    NotResumed {
        /// Why the migration failed.
        cause: Box<SourceError>,
        /// Why the guest was not resumed.
        source: BoxError,
    },
    /// Everything was sent and no answer came: the destination may run the guest, which the library
    /// leaves paused here.
    #[error("everything was sent, and the destination did not say whether it has the guest")]
    OutcomeUnknown {
        /// Why no answer is known.
        #[source]
        cause: Box<SourceError>,
    },
    /// More acknowledgements of the switch-over than devices that give one.
    #[error("switchover-ack came more than the expected {expected} times")]
    SurplusSwitchoverAck {
        /// How many were expected.
        expected: u32,
    },
    /// The destination's devices are not ready for the switch-over.
    #[error("{missing} of {expected} switchover-ack messages did not come in time")]
    SwitchoverAckMissing {
        /// How many are missing.
        missing: u32,
        /// How many were expected.
        expected: u32,
    },
    /// The destination has not said that it has taken the device sections before RAM.
    #[error("the destination does not answer the ping behind the device sections before ram")]
    EarlySectionsUnanswered,
    /// Acknowledgements are expected where none can arrive.
    #[error("switchover-ack without a return path")]
    SwitchoverAckWithoutReturnPath,
    /// The VMM asked for it.
    #[error("the migration was cancelled")]
    Cancelled,
}

/// Why an incoming migration failed. The guest was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The main stream could not be read.
    #[error("reading the migration stream at offset {offset:#x}")]
    Stream {
        /// Where in the stream.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The stream says what it must not.
    #[error(transparent)]
    Decode(#[from] crate::DecodeError),
    /// Pages could not be received.
    #[error("receiving guest memory")]
    Transport(#[from] TransportError),
    /// A page could not be stored.
    #[error("storing guest memory")]
    Memory(#[from] MemoryError),
    /// A message could not be sent on the return path.
    #[error("return path")]
    ReturnPath(#[source] io::Error),
    /// The source has closed the connection without waiting for the confirmation, so it may run the
    /// guest on.
    #[error(
        "the source closed the connection at offset {offset:#x} before it was told that the guest \
         has arrived, and may run it on"
    )]
    SourceGone {
        /// Where in the stream.
        offset: u64,
    },
    /// A PING, or another command that wants an answer, came before the return path was opened.
    #[error(
        "command {command:?} at offset {offset:#x} wants an answer, and no return path is open"
    )]
    NoReturnPath {
        /// The command.
        command: CommandNumber,
        /// Where in the stream.
        offset: u64,
    },
    /// The source goes over to postcopy.
    #[error(
        "the source goes over to postcopy (command {command:?} at offset {offset:#x}), and this side \
         takes precopy only: do not start postcopy there (migrate-start-postcopy), or switch its \
         capabilities postcopy-ram and dirty-bitmaps off"
    )]
    Postcopy {
        /// The command.
        command: CommandNumber,
        /// Where in the stream.
        offset: u64,
    },
    /// A PART or END section of something else than RAM and dirty bitmaps.
    #[error(
        "section {id} at offset {offset:#x} has several parts, which only ram and dirty bitmaps \
         have here"
    )]
    IterableDevice {
        /// The section.
        id: SectionId,
        /// Where in the stream.
        offset: u64,
    },
    /// Dirty bitmaps, which nobody asked to keep.
    #[error("dirty bitmaps at offset {offset:#x}, which are not kept here")]
    DirtyBitmaps {
        /// Where in the stream.
        offset: u64,
    },
    /// A device section could not be loaded.
    #[error("device section '{idstr}' instance {instance} at offset {offset:#x}", idstr = crate::Escaped(.idstr))]
    Device {
        /// Its idstr.
        idstr: String,
        /// Its instance id.
        instance: u32,
        /// Where its body begins.
        offset: u64,
        /// What the VMM says of it.
        source: BoxError,
    },
    /// The VMM does not take the state of the devices.
    #[error("{what}")]
    Vm {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: BoxError,
    },
    /// A device section is longer than [`TargetConfig::max_devices`](super::TargetConfig).
    #[error(
        "device section '{idstr}' instance {instance} at offset {offset:#x} has more than the {max} \
         bytes accepted",
        idstr = crate::Escaped(.idstr)
    )]
    DeviceTooLong {
        /// Its idstr.
        idstr: String,
        /// Its instance id.
        instance: u32,
        /// Where its body begins.
        offset: u64,
        /// The limit, bytes.
        max: usize,
    },
    /// A section other than a device's stands before RAM.
    #[error(
        "section '{idstr}' at offset {offset:#x} stands before ram and has several parts, whose ends \
         only its device knows",
        idstr = crate::Escaped(.idstr)
    )]
    BeforeRam {
        /// Its idstr.
        idstr: String,
        /// Where in the stream.
        offset: u64,
    },
    /// The end of a device section before RAM was not found.
    #[error(
        "the end of device section '{idstr}' instance {instance} at offset {offset:#x}, which stands \
         before ram, was not found within {searched} bytes: only the description at the end of the \
         stream says how long it is",
        idstr = crate::Escaped(.idstr)
    )]
    EarlyEnd {
        /// Its idstr.
        idstr: String,
        /// Its instance id.
        instance: u32,
        /// Where its body begins.
        offset: u64,
        /// How far it was looked for, bytes.
        searched: usize,
    },
    /// A device section before RAM is not as long as it seemed.
    #[error(transparent)]
    Early(#[from] crate::raw::early::EarlyError),
    /// Device sections taken as they are do not end, or not as their description says.
    #[error("device sections")]
    Tail(#[from] crate::TailError),
    /// The [token](crate::StreamReader::set_cancel) of the stream's reader ended it.
    #[error("the migration was cancelled")]
    Cancelled,
    /// What must be there is not.
    #[error("the stream ended at offset {offset:#x} without {what}")]
    Missing {
        /// What was expected.
        what: &'static str,
        /// Where in the stream.
        offset: u64,
    },
}
