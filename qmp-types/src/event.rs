//! What a server says unasked.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::migration::{ColoExitReason, ColoMode, MigrationStatus};

qapi_enum! {
    /// Why a VM shuts down or is reset (`ShutdownCause`).
    pub enum ShutdownCause {
        /// There is no reason.
        None = "none",
        /// The host failed it.
        HostError = "host-error",
        /// `quit`.
        HostQmpQuit = "host-qmp-quit",
        /// `system_reset`.
        HostQmpSystemReset = "host-qmp-system-reset",
        /// A signal, such as SIGINT.
        HostSignal = "host-signal",
        /// The window was closed.
        HostUi = "host-ui",
        /// The guest shut down.
        GuestShutdown = "guest-shutdown",
        /// The guest reset itself.
        GuestReset = "guest-reset",
        /// The guest panicked.
        GuestPanic = "guest-panic",
        /// A part of the machine was reset.
        SubsystemReset = "subsystem-reset",
        /// Before a snapshot or a COLO checkpoint is loaded.
        SnapshotLoad = "snapshot-load",
    }
}

/// A COLO checkpoint as the side that took or loaded it saw it.
///
/// Not part of QEMU's schema.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ColoCheckpoint {
    /// Which side tells.
    pub mode: ColoMode,
    /// Which checkpoint, counted from 1.
    pub checkpoint: u64,
    /// How long the guest stood still for it, µs.
    pub pause_us: u64,
    /// How long its memory and device state took to leave, µs. Primary only, else 0.
    #[serde(default)]
    pub transfer_us: u64,
    /// From the guest's standing still until the secondary had loaded the checkpoint, µs. Primary
    /// only, else 0.
    #[serde(default)]
    pub loaded_us: u64,
    /// How many pages were sent since the checkpoint before, ahead of this one. Primary only, else 0.
    #[serde(default)]
    pub ahead_pages: u64,
    /// How many of the pages written since the checkpoint before were compared with what was sent of
    /// them last. Primary only, else 0.
    #[serde(default)]
    pub compared_pages: u64,
    /// How many of them were not sent, because the secondary has their content. Primary only, else 0.
    #[serde(default)]
    pub unchanged_pages: u64,
    /// How much guest memory was sent or received, bytes.
    pub ram_bytes: u64,
    /// How many pages the guest had written since the checkpoint before.
    pub dirty_pages: u64,
    /// How many pages were copied from the cache into guest memory. Secondary only, else 0.
    pub flushed_pages: u64,
    /// Size of the device state, bytes.
    pub device_bytes: u64,
    /// How much the guest had put on its serial line when it stood still for this checkpoint,
    /// bytes since its start. Primary only, else 0.
    pub serial_bytes: u64,
    /// A hash of guest memory, hexadecimal, if the VMM was told to compute it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_hash: Option<String>,
    /// A hash of the device state, hexadecimal, if the VMM was told to compute it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_hash: Option<String>,
    /// What the time went into, in order.
    pub steps: Vec<ColoCheckpointStep>,
}

/// A part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColoCheckpointStep {
    /// Its name.
    pub step: String,
    /// How long it took, µs.
    pub us: u64,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data", rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Event {
    /// The VM has been stopped.
    Stop,
    /// The VM runs again.
    Resume,
    /// The VM is about to be shut down.
    Shutdown {
        /// Whether the guest wanted it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// The VM has been reset. The reset before a checkpoint is loaded is not told.
    Reset {
        /// Whether the guest wanted it.
        guest: bool,
        /// Why.
        reason: ShutdownCause,
    },
    /// A migration is somewhere else now. Only sent with capability `events`.
    Migration {
        /// Where.
        status: MigrationStatus,
    },
    /// A pass over dirty memory has ended. Only sent with capability `events`; QEMU 11.1 counts
    /// from 1 and tells of the second first.
    MigrationPass {
        /// Which.
        pass: u64,
    },
    /// Everything of a guest was sent, and the destination did not say whether it has it: the guest
    /// stays paused until the answer comes or an operator decides. An extension of this project that
    /// QEMU does not have, hence the `X_` (QEMU's mark of what is experimental).
    #[serde(rename = "X_MIGRATION_UNKNOWN")]
    MigrationUnknown {
        /// Why, and what can be decided, in words.
        reason: String,
    },
    /// COLO has ended. Always sent.
    ColoExit {
        /// Which side the VM was.
        mode: ColoMode,
        /// Why it ended.
        reason: ColoExitReason,
    },
    /// A COLO checkpoint is over. An extension of this project that QEMU does not have, hence
    /// the `X_` (QEMU's mark of what is experimental).
    #[serde(rename = "X_COLO_CHECKPOINT")]
    ColoCheckpoint(Box<ColoCheckpoint>),
    /// This side's guest was stopped for good, because the other side goes on or may go on. An
    /// extension of this project.
    #[serde(rename = "X_COLO_STOPPED")]
    ColoStopped {
        /// Why, in words.
        reason: String,
    },
}

/// When an event happened, since 1970 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Whole seconds; -1 if the host does not know the time.
    pub seconds: i64,
    /// The rest, µs; -1 if the host does not know the time.
    pub microseconds: i64,
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        let unknown = Self {
            seconds: -1,
            microseconds: -1,
        };
        time.duration_since(UNIX_EPOCH).map_or(unknown, |since| {
            i64::try_from(since.as_secs()).map_or(unknown, |seconds| Self {
                seconds,
                microseconds: i64::from(since.subsec_micros()),
            })
        })
    }
}
