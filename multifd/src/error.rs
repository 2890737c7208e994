//! Why a set of channels stopped.

use std::sync::Arc;
use std::time::Duration;
use std::{error, fmt, io};

use migration_stream::{IdStr, InstanceId, MemoryError, TransportError};

use crate::compression::CompressionError;
use crate::packet::{Method, PacketError};

/// Which part of a packet was under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The header.
    Header,
    /// The payload behind it.
    Payload,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Payload => "payload",
        })
    }
}

/// What went wrong on a channel, or in the set as a whole: the source of every [`TransportError`]
/// of this crate. It can be cloned because whoever asks after the first error gets it again.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// A packet that cannot be, or is not for us.
    #[error("packet {index} of the channel is refused")]
    Packet {
        /// Its position among the packets of its channel, from 0 on.
        index: u64,
        /// What is wrong with it.
        #[source]
        source: PacketError,
    },
    /// A payload could not be made, or taken apart.
    #[error("compression of packet {index} of the channel")]
    Compression {
        /// The packet's position among those of its channel, from 0 on.
        index: u64,
        /// Why.
        #[source]
        source: CompressionError,
    },
    /// The channel's compression could not be set up.
    #[error("setting up compression")]
    Setup {
        /// Why.
        #[source]
        source: CompressionError,
    },
    /// The channel cannot send without copying.
    #[error("setting up zero-copy send")]
    ZeroCopy {
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// Compressed pages are not sent out of guest memory.
    #[error("zero-copy send of pages that are compressed")]
    CompressedZeroCopy,
    /// Guest memory, or the store, refused a range.
    #[error("{what}")]
    Memory {
        /// What was attempted.
        what: &'static str,
        /// Why it was refused.
        #[source]
        source: Arc<MemoryError>,
    },
    /// A device refused the state that came for it.
    #[error("loading the state of '{idstr}', instance {instance}, from packet {index}")]
    DeviceState {
        /// The device's name.
        idstr: IdStr,
        /// Its instance.
        instance: InstanceId,
        /// The packet's position among those of its channel, from 0 on.
        index: u64,
        /// Why.
        #[source]
        source: Arc<dyn error::Error + Send + Sync>,
    },
    /// All channels together have read more state of devices than they may keep.
    #[error(
        "device state on its way on all channels is more than the {limit} bytes of receive_memory \
        (MultifdConfig)"
    )]
    DeviceStateMemory {
        /// What they may keep, bytes.
        limit: usize,
    },
    /// Device state is not sent on channels that are compressed: no receiver takes it there.
    #[error("device state on channels that are compressed")]
    CompressedDeviceState,
    /// Device state that does not fit a packet, or none at all.
    #[error("{len} bytes of device state for one packet, expected 1 to 4294967295")]
    DeviceStateLength {
        /// How many.
        len: usize,
    },
    /// The connection broke, or the peer did nothing for too long.
    #[error("{what} the {part} of packet {index}")]
    Io {
        /// `reading` or `writing`.
        what: &'static str,
        /// Which part of the packet.
        part: Part,
        /// The packet's position among those of its channel, from 0 on.
        index: u64,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer closed a channel that this side sends on. It does so when it has failed, of which the
    /// reason is there, or when it has other settings: neither the number of channels nor the
    /// compression is negotiated.
    #[error("the target closed the channel{} (this side has {channels} channels, compression \
        {method:?}; the target's settings must be the same)", describe_packets(*.packets))]
    PeerClosed {
        /// How many packets had been written to it, of which it may have read fewer; `None` if that is
        /// not known.
        packets: Option<u64>,
        /// Channels of this side.
        channels: u8,
        /// How this side compresses.
        method: Method,
        /// What the system says.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer ended the channel inside a packet.
    #[error("the channel ended after {got} of {expected} bytes of the {part} of packet {index}")]
    Eof {
        /// Which part of the packet.
        part: Part,
        /// The packet's position among those of its channel, from 0 on.
        index: u64,
        /// Bytes of the part that came.
        got: usize,
        /// Length of the part, bytes.
        expected: usize,
    },
    /// The peer ended the channel between packets, but the main stream asks for a SYNC packet.
    #[error("the channel ended without the sync packet that belongs to the main stream's flush")]
    Ended,
    /// A channel waited at its SYNC packet and the main stream never had the flush to it.
    #[error("no flush on the main stream within {limit:?} of the channel's sync packet")]
    NoFlush {
        /// How long the channel waited.
        limit: Duration,
    },
    /// The main stream ended a checkpoint's memory before the channel's last pages were flushed.
    #[error("pages came on the channel after its last sync packet, and the checkpoint's ram ended")]
    NotSynchronised,
    /// A wait was given up.
    #[error("gave up waiting for {what}")]
    Stalled {
        /// What was waited for.
        what: &'static str,
    },
    /// The main stream could not be written.
    #[error("writing the flush record to the main stream")]
    Main {
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The set was ended from our own side.
    #[error("the channels were shut down")]
    Closed,
    /// Other channels than were configured.
    #[error("{got} channels, expected {expected}")]
    ChannelCount {
        /// Channels handed in.
        got: usize,
        /// Channels configured.
        expected: u8,
    },
    /// A thread could not be started.
    #[error("starting the channel's thread")]
    Spawn {
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// A thread panicked, in the memory or the transport that was plugged in.
    #[error("the channel's thread panicked")]
    Panicked,
    /// A thread did not end although its channel was shut.
    #[error("the channel's thread did not end within {limit:?} of its shutdown")]
    Stuck {
        /// How long it was waited for.
        limit: Duration,
    },
}

fn describe_packets(packets: Option<u64>) -> String {
    match packets {
        None => String::new(),
        Some(0) => " before its first packet".to_owned(),
        Some(1) => " after 1 packet".to_owned(),
        Some(n) => format!(" after {n} packets"),
    }
}

/// The first error of a set, and the channel it came from; `None` for the set as a whole.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) channel: Option<u8>,
    pub(crate) error: ChannelError,
}

impl From<Failure> for TransportError {
    fn from(failure: Failure) -> Self {
        Self {
            channel: failure.channel,
            source: Box::new(failure.error),
        }
    }
}
