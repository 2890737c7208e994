//! What the command line says about migration.

use std::sync::Arc;
use std::time::Duration;

use colo_core::{Deadlines, OnPeerLoss, Resume};
use migration_stream::WhenToCompare;
use migration_stream::io::SendMode;
use multifd::ZstdRange;
use ram_cache::CacheKind;
use uuid::Uuid;

use super::Boundaries;

/// What the command line says about migration.
#[derive(Clone, Debug)]
pub struct MigrationOptions {
    /// Hash guest RAM and device state at every checkpoint, for a comparison of both sides.
    pub verify: bool,
    /// What a COLO secondary keeps checkpoints in.
    pub ram_cache: CacheKind,
    /// What a COLO side does when it has lost its peer.
    pub on_peer_loss: OnPeerLoss,
    /// How long the peer may take in COLO.
    pub deadlines: Deadlines,
    /// How long a connection may be silent, or be in the making, outside COLO.
    pub io_limit: Duration,
    /// The VM's UUID.
    pub uuid: Option<Uuid>,
    /// A primary's serial output waits for the checkpoint that contains what it came from.
    pub output_commit: bool,
    /// As a primary, when the guest runs again in a checkpoint.
    pub resume: Resume,
    /// As a primary, how much is sent between checkpoints at most, bytes a second, 0 for no limit; `None` if nothing is.
    pub gap: Option<u64>,
    /// As a source without the capability `zero-copy-send`, how pages are sent.
    pub send_mode: SendMode,
    /// As a source with zstd, between which levels it chooses, whatever `multifd-zstd-level` says.
    pub zstd_level: Option<ZstdRange>,
    /// How much device state a guest that comes in may have, bytes: each section of a migration, and all
    /// sections of a checkpoint.
    pub max_device_state: usize,
    /// Take all of guest RAM from the system while a guest is waited for, unless it is for COLO.
    pub prealloc: bool,
    /// As a primary, whether and when pages are left out that the secondary has already.
    pub skip_unchanged: Option<WhenToCompare>,
    /// What is done where something begins or ends.
    pub boundaries: Arc<Boundaries>,
}

impl Default for MigrationOptions {
    fn default() -> Self {
        Self {
            verify: false,
            ram_cache: CacheKind::default(),
            on_peer_loss: OnPeerLoss::default(),
            deadlines: Deadlines::default(),
            io_limit: Duration::from_secs(30),
            uuid: None,
            output_commit: false,
            resume: Resume::default(),
            gap: None,
            send_mode: SendMode::Copy,
            zstd_level: None,
            max_device_state: 64 << 20,
            prealloc: false,
            skip_unchanged: None,
            boundaries: Arc::default(),
        }
    }
}
