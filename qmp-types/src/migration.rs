//! How a migration is going: the answers to `query-migrate` and `query-colo-status`.

use serde::{Deserialize, Serialize};

use crate::address::SocketAddress;

qapi_enum! {
    /// Where a migration is (`MigrationStatus`). Management software follows the MIGRATION events
    /// that tell of it.
    pub enum MigrationStatus {
        /// There has been none.
        None = "none",
        /// Connecting, or listening.
        Setup = "setup",
        /// `migrate_cancel` has been given.
        Cancelling = "cancelling",
        /// Cancelled; the guest runs on the source.
        Cancelled = "cancelled",
        /// Sending, or loading.
        Active = "active",
        /// Postcopy, device state on its way.
        PostcopyDevice = "postcopy-device",
        /// The guest runs on the destination, pages are fetched.
        PostcopyActive = "postcopy-active",
        /// Postcopy has lost its connection.
        PostcopyPaused = "postcopy-paused",
        /// A new connection for it is being made.
        PostcopyRecoverSetup = "postcopy-recover-setup",
        /// Postcopy is finding out what is missing.
        PostcopyRecover = "postcopy-recover",
        /// Over.
        Completed = "completed",
        /// Has failed and is being cleaned up.
        Failing = "failing",
        /// Has failed.
        Failed = "failed",
        /// The VM is one of a COLO pair.
        Colo = "colo",
        /// Waiting for `migrate-continue`.
        PreSwitchover = "pre-switchover",
        /// The guest has been stopped; device state on its way.
        Device = "device",
        /// Waiting for devices to be unplugged.
        WaitUnplug = "wait-unplug",
    }
}

qapi_enum! {
    /// Which of a COLO pair the VM is (`COLOMode`).
    pub enum ColoMode {
        /// Not in COLO.
        None = "none",
        /// The side whose output goes out.
        Primary = "primary",
        /// The side that takes over.
        Secondary = "secondary",
    }
}

qapi_enum! {
    /// Why COLO ended (`COLOExitReason`).
    pub enum ColoExitReason {
        /// It has never begun.
        None = "none",
        /// Somebody asked for failover.
        Request = "request",
        /// The other side was lost, or broke the protocol.
        Error = "error",
        /// It has not ended.
        Processing = "processing",
    }
}

/// The answer to `query-colo-status` (`COLOStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ColoStatus {
    /// Which side the VM is now.
    pub mode: ColoMode,
    /// Which side it was before failover.
    pub last_mode: ColoMode,
    /// Why COLO ended.
    pub reason: ColoExitReason,
}

/// The answer to `x-query-colo-figures`, an extension of this project. Times are of this side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ColoFigures {
    /// Checkpoints that were completed since the process began.
    pub checkpoints: u64,
    /// How long the guest stood still for all of them, µs.
    pub total_pause_us: u64,
    /// The last one; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last: Option<LastCheckpoint>,
    /// The age of the other side's last beat, µs; absent without a heartbeat, and before the first beat.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub heartbeat_age_us: Option<u64>,
    /// The limit of the background transfer, bytes a second, 0 for no limit; `x-set-colo-gap-bandwidth` changes
    /// it. Absent without background transfer, as on a secondary.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gap_bandwidth: Option<u64>,
}

/// The last checkpoint in [`ColoFigures`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LastCheckpoint {
    /// How long the guest stood still, µs.
    pub pause_us: u64,
    /// How long ago it was completed, ms.
    pub age_ms: u64,
    /// Its memory on the wire, bytes, on all channels.
    pub ram_bytes: u64,
    /// Its device state, bytes.
    pub device_bytes: u64,
    /// Pages that had been written.
    pub dirty_pages: u64,
    /// Dirty pages that were not sent, because the secondary has their content.
    #[serde(default)]
    pub unchanged_pages: u64,
}

/// The answer to `query-migrate`. Before any migration it is empty: [`MigrationInfo::default`].
///
/// QEMU's members for postcopy, VFIO and the dirty limit are not here; read from a QEMU they are
/// left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// Where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<MigrationStatus>,
    /// RAM, on the source. QEMU leaves it out in status `colo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<MigrationRamInfo>,
    /// Left of the whole VM, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining: Option<u64>,
    /// XBZRLE, if it is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache: Option<XbzrleCacheInfo>,
    /// Since the start, or from start to end, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// How long the guest would stand still, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// How long it stood still, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Before the first page, ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// Throttling of the guest, %.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u64>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why the VM cannot be migrated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_reasons: Option<Vec<String>>,
    /// Where the destination listens; with a port of 0 it says which one it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_address: Option<Vec<SocketAddress>>,
}

/// RAM in the answer to `query-migrate` (`MigrationRAMInfo`). Read from a QEMU that lacks a
/// member, it is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationRamInfo {
    /// Sent, bytes.
    pub transferred: u64,
    /// Left, bytes.
    pub remaining: u64,
    /// RAM of the guest, bytes.
    pub total: u64,
    /// Pages of zeroes.
    pub duplicate: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// The same, bytes.
    pub normal_bytes: u64,
    /// Pages the guest dirties a second.
    pub dirty_pages_rate: u64,
    /// Throughput, megabits a second.
    pub mbps: f64,
    /// How often the dirty log has been read.
    pub dirty_sync_count: u64,
    /// Pages postcopy was asked for.
    pub postcopy_requests: u64,
    /// Size of a page, bytes.
    pub page_size: u64,
    /// Sent over multifd channels, bytes.
    pub multifd_bytes: u64,
    /// Pages sent a second.
    pub pages_per_second: u64,
    /// Sent while the guest ran on the source, bytes.
    pub precopy_bytes: u64,
    /// Sent while it stood still, bytes.
    pub downtime_bytes: u64,
    /// Sent while it ran on the destination, bytes.
    pub postcopy_bytes: u64,
    /// How often zero-copy had to copy.
    pub dirty_sync_missed_zero_copy: u64,
}

/// XBZRLE in the answer to `query-migrate` (`XBZRLECacheStats`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct XbzrleCacheInfo {
    /// Size of the cache, bytes.
    pub cache_size: u64,
    /// Sent, bytes.
    pub bytes: u64,
    /// Pages sent as differences.
    pub pages: u64,
    /// Pages not found.
    pub cache_miss: u64,
    /// Misses among pages.
    pub cache_miss_rate: f64,
    /// Bytes of a page to bytes sent.
    pub encoding_rate: f64,
    /// Pages whose difference was larger than they.
    pub overflow: u64,
}
