//! What a source says of itself while it runs, and what it is told.

use std::time::Duration;

use crate::{TransportCounters, Vm};

/// Watches a migration and steers it. A VM that wants neither implements this without a method.
pub trait SourceObserver {
    /// Called at least every 50 ms, whatever the peer does, and answers what to do next. While the migration is paused
    /// before the switch-over ([`SourceStatus::PreSwitchover`]), [`Control::Continue`] goes on waiting
    /// and [`Control::SwitchOver`] ends the pause (`migrate-continue`).
    fn progress(&mut self, progress: &Progress) -> Control {
        let _ = progress;
        Control::Continue
    }

    /// Something has happened (the capability `events`).
    fn event(&mut self, event: SourceEvent) {
        let _ = event;
    }
}

impl<C: SourceObserver, D> SourceObserver for Vm<C, D> {
    fn progress(&mut self, progress: &Progress) -> Control {
        self.control.progress(progress)
    }

    fn event(&mut self, event: SourceEvent) {
        self.control.event(event);
    }
}

/// Where a migration is, as `query-migrate` calls it. What comes before is `setup`, what comes after
/// is the result of [`Source::run`](super::Source::run).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceStatus {
    /// Memory is sent while the guest runs: `active`.
    Active,
    /// The guest stands still until the VMM lets the switch-over go on: `pre-switchover`.
    PreSwitchover,
    /// The rest of memory and the devices are sent: `device`.
    Device,
}

/// What happens in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// The status is another one (event `MIGRATION`).
    Status(SourceStatus),
    /// A round over guest memory has ended and this one begins, 2 the first time (event
    /// `MIGRATION_PASS`, QEMU 11.1).
    Pass(u64),
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Switch over now, whatever is still pending.
    SwitchOver,
    /// Give up; the guest runs on here.
    Cancel,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where the migration is.
    pub status: SourceStatus,
    /// Rounds over guest memory so far, from 1; QEMU's dirty-sync-count.
    pub pass: u64,
    /// Bytes of guest memory still to be sent, as far as the dirty log was read.
    pub remaining: u64,
    /// Bytes of guest memory in all.
    pub total: u64,
    /// Bytes on every channel.
    pub transferred: u64,
    /// Pages by kind, and the channels' share of the bytes.
    pub counters: TransportCounters,
    /// Pages that became dirty in the last round, a second.
    pub dirty_pages_rate: u64,
    /// Bytes a second while sending, 0 before the first measurement.
    pub bandwidth: u64,
    /// How much of their time the vCPUs lose (`cpu-throttle-percentage`), percent.
    pub throttle: u8,
    /// How long the guest would stand still if it were switched over now.
    pub expected_downtime: Option<Duration>,
    /// Since the migration began.
    pub elapsed: Duration,
}
