//! How the migration is going: what `query-migrate` answers, and the events on the way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration_stream::PAGE_SIZE;
use migration_stream::precopy::Progress;
use qmp_types::{
    Event, MigrationInfo, MigrationRamInfo, MigrationStatus, SocketAddress, XbzrleCacheInfo,
};

use super::Boundaries;
use crate::operator::EventBus;

/// The status of the present or last migration.
#[derive(Debug)]
pub struct Status {
    inner: Mutex<Inner>,
    bus: Arc<EventBus>,
    boundaries: Arc<Boundaries>,
}

#[derive(Debug, Default)]
struct Inner {
    status: Option<MigrationStatus>,
    error: Option<String>,
    /// Capability `events`, as it was when the migration began.
    events: bool,
    begun: Option<Instant>,
    setup: Option<Duration>,
    total: Option<Duration>,
    downtime: Option<Duration>,
    progress: Option<Progress>,
    listening: Vec<SocketAddress>,
}

impl Status {
    /// No migration yet.
    #[must_use]
    pub fn new(bus: Arc<EventBus>, boundaries: Arc<Boundaries>) -> Self {
        Self {
            inner: Mutex::default(),
            bus,
            boundaries,
        }
    }

    /// A migration begins; what was known of an earlier one is forgotten.
    pub fn begin(&self, events: bool, listening: Vec<SocketAddress>) {
        *self.lock() = Inner {
            events,
            begun: Some(Instant::now()),
            listening,
            ..Inner::default()
        };
        self.set(MigrationStatus::Setup);
    }

    /// Takes a new status, and tells of it if it is one.
    pub fn set(&self, status: MigrationStatus) {
        let mut inner = self.lock();
        if inner.status == Some(status) {
            return;
        }
        let elapsed = inner.begun.map(|begun| begun.elapsed());
        match status {
            MigrationStatus::Active => inner.setup = elapsed,
            MigrationStatus::Completed | MigrationStatus::Colo | MigrationStatus::Failed
                if inner.total.is_none() =>
            {
                inner.total = elapsed;
            }
            _ => {}
        }
        inner.status = Some(status);
        if inner.events {
            self.bus.publish(&Event::Migration { status });
        }
        drop(inner);
        self.boundaries.reach(&format!("status {status:?}"));
    }

    /// It went wrong.
    pub fn fail(&self, status: MigrationStatus, error: String) {
        tracing::error!(%status, %error, "migration");
        self.lock().error = Some(error);
        self.set(status);
    }

    /// Something went wrong that is worth telling, and goes on all the same.
    pub fn note_error(&self, error: String) {
        tracing::warn!(%error, "migration");
        self.lock().error = Some(error);
    }

    /// What went wrong on the way has come to a good end.
    pub fn clear_error(&self) {
        self.lock().error = None;
    }

    /// Takes note of how far the source is, and tells of a new pass.
    pub fn progress(&self, progress: &Progress) {
        let mut inner = self.lock();
        let before = inner.progress.replace(*progress).map_or(1, |p| p.pass);
        if inner.events && progress.pass > before {
            self.bus.publish(&Event::MigrationPass {
                pass: progress.pass,
            });
        }
    }

    /// How long the guest stood still at the switch-over.
    pub fn downtime(&self, downtime: Duration) {
        self.lock().downtime = Some(downtime);
    }

    /// The status, `None` before any migration.
    #[must_use]
    pub fn get(&self) -> Option<MigrationStatus> {
        self.lock().status
    }

    /// Is a migration on its way, COLO included?
    #[must_use]
    pub fn is_busy(&self) -> bool {
        use MigrationStatus::{Cancelled, Completed, Failed, None as Never};
        !matches!(
            self.get(),
            None | Some(Never | Completed | Failed | Cancelled)
        )
    }

    /// What `query-migrate` answers.
    #[must_use]
    pub fn info(&self) -> MigrationInfo {
        let inner = self.lock();
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let running = inner.begun.map(|begun| begun.elapsed());
        MigrationInfo {
            status: inner.status,
            ram: inner.progress.as_ref().map(ram),
            xbzrle_cache: inner.progress.as_ref().and_then(xbzrle),
            remaining: inner.progress.map(|p| p.remaining),
            total_time: inner.progress.and(inner.total.or(running)).map(ms),
            expected_downtime: inner.progress.and_then(|p| p.expected_downtime).map(ms),
            downtime: inner.downtime.map(ms),
            cpu_throttle_percentage: (inner.progress)
                .map(|p| u64::from(p.throttle))
                .filter(|percentage| *percentage > 0),
            setup_time: inner.progress.and(inner.setup).map(ms),
            error_desc: inner.error.clone(),
            socket_address: Some(inner.listening.clone()).filter(|all| !all.is_empty()),
            ..MigrationInfo::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Plain values, whole at every moment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Only where differences were sent.
fn xbzrle(progress: &Progress) -> Option<XbzrleCacheInfo> {
    let counters = progress.counters.xbzrle;
    (counters.cache_size > 0).then(|| XbzrleCacheInfo {
        cache_size: counters.cache_size,
        bytes: counters.bytes,
        pages: counters.pages,
        cache_miss: counters.cache_miss,
        cache_miss_rate: counters.cache_miss_rate(),
        encoding_rate: counters.encoding_rate(),
        overflow: counters.overflow,
    })
}

fn ram(progress: &Progress) -> MigrationRamInfo {
    let counters = progress.counters;
    let seconds = progress.elapsed.as_secs_f64().max(1e-6);
    let pages = counters.normal_pages + counters.zero_pages;
    #[allow(clippy::cast_precision_loss)] // figures for people
    let (transferred, rate) = (progress.transferred as f64, pages as f64 / seconds);
    MigrationRamInfo {
        transferred: progress.transferred,
        remaining: progress.remaining,
        total: progress.total,
        duplicate: counters.zero_pages,
        normal: counters.normal_pages,
        normal_bytes: counters.normal_pages * PAGE_SIZE,
        dirty_pages_rate: progress.dirty_pages_rate,
        mbps: transferred * 8.0 / 1e6 / seconds,
        dirty_sync_count: progress.pass,
        page_size: PAGE_SIZE,
        multifd_bytes: counters.channel_bytes,
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // as above
        pages_per_second: rate as u64,
        precopy_bytes: progress.transferred,
        dirty_sync_missed_zero_copy: counters.missed_zero_copy,
        ..MigrationRamInfo::default()
    }
}
