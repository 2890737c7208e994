//! What an operator is told of checkpoints and failovers: counted here, and nowhere else.
//! `x-query-colo-figures` and the [metrics](crate::metrics) say the same.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use colo_core::{Cause, CheckpointReport};
use colo_heartbeat::HeartbeatReport;
use qmp_types::{ColoFigures, ColoMode, LastCheckpoint, MigrationInfo, RunState};

/// Upper bounds of the classes into which pauses are counted. QEMU's are tens of milliseconds, ours
/// some; more than a second is a fault.
pub(crate) const PAUSE_BOUNDS: [Duration; 10] = [
    Duration::from_millis(1),
    Duration::from_micros(2500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
];

/// All checkpoints of this process so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) checkpoints: u64,
    pub(crate) pause: Duration,
    /// Pauses up to each of [`PAUSE_BOUNDS`] and above that before it; the longer ones are in none.
    pub(crate) pauses: [u64; PAUSE_BOUNDS.len()],
    pub(crate) ram_bytes: u64,
    pub(crate) device_bytes: u64,
    pub(crate) dirty_pages: u64,
    pub(crate) compared_pages: u64,
    pub(crate) unchanged_pages: u64,
    pub(crate) flushed_pages: u64,
    pub(crate) last: Option<Last>,
    pub(crate) failovers: Vec<(Failover, u64)>,
}

/// The last one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Last {
    at: Instant,
    pub(crate) pause: Duration,
    pub(crate) ram_bytes: u64,
    pub(crate) device_bytes: u64,
    pub(crate) dirty_pages: u64,
    pub(crate) unchanged_pages: u64,
}

impl Last {
    /// How long ago it was completed.
    pub(crate) fn age(&self) -> Duration {
        self.at.elapsed()
    }
}

/// Why a side went on alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failover {
    /// What has ended COLO.
    pub(crate) cause: &'static str,
    /// Who had this side go on.
    pub(crate) decided_by: &'static str,
}

/// Who had this side go on, as far as is known before it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decider {
    Operator,
    Heartbeat,
    Policy,
}

impl Decider {
    const fn name(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Heartbeat => "heartbeat",
            Self::Policy => "policy",
        }
    }
}

/// A cause in one word, for those who count them.
pub(crate) const fn cause_name(cause: &Cause) -> &'static str {
    match cause {
        Cause::FailoverRequested => "request",
        Cause::Quit => "quit",
        Cause::PeerLost { .. } => "peer-lost",
        Cause::DeadlineExpired { .. } => "deadline",
        Cause::UnexpectedMessage { .. } | Cause::UnknownMessage { .. } => "protocol",
        Cause::StepFailed(_) => "step-failed",
        _ => "other",
    }
}

/// Counts the checkpoints and failovers of one guest in this process.
#[derive(Debug, Default)]
pub(crate) struct Figures(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    totals: Totals,
    /// What ended COLO last, until it is known what has become of the guest.
    cause: Option<&'static str>,
    /// An operator has asked for failover.
    asked: bool,
}

impl Figures {
    /// A checkpoint is complete.
    pub(crate) fn note(&self, report: &CheckpointReport) {
        let mut inner = self.lock();
        let totals = &mut inner.totals;
        totals.checkpoints += 1;
        totals.pause = totals.pause.saturating_add(report.pause);
        let class = PAUSE_BOUNDS.iter().position(|bound| report.pause <= *bound);
        if let Some(count) = class.and_then(|class| totals.pauses.get_mut(class)) {
            *count += 1;
        }
        totals.ram_bytes = totals.ram_bytes.saturating_add(report.ram_bytes);
        totals.device_bytes = totals.device_bytes.saturating_add(report.device_bytes);
        totals.dirty_pages = totals.dirty_pages.saturating_add(report.dirty_pages);
        totals.compared_pages = totals.compared_pages.saturating_add(report.compared_pages);
        totals.unchanged_pages = totals
            .unchanged_pages
            .saturating_add(report.unchanged_pages);
        totals.flushed_pages = totals.flushed_pages.saturating_add(report.flushed_pages);
        totals.last = Some(Last {
            at: Instant::now(),
            pause: report.pause,
            ram_bytes: report.ram_bytes,
            device_bytes: report.device_bytes,
            dirty_pages: report.dirty_pages,
            unchanged_pages: report.unchanged_pages,
        });
    }

    /// An operator asks for failover, or has been refused.
    pub(crate) fn operator_asks(&self, asks: bool) {
        self.lock().asked = asks;
    }

    /// COLO has ended.
    pub(crate) fn ended(&self, cause: &Cause) {
        self.lock().cause = Some(cause_name(cause));
    }

    /// This side goes on alone, by the decision of `otherwise` if an operator has not asked for it.
    pub(crate) fn went_on(&self, otherwise: Decider) -> Failover {
        let mut inner = self.lock();
        let decider = match std::mem::take(&mut inner.asked) {
            true => Decider::Operator,
            false => otherwise,
        };
        let failover = Failover {
            cause: inner.cause.take().unwrap_or("other"),
            decided_by: decider.name(),
        };
        let counts = &mut inner.totals.failovers;
        match counts.iter_mut().find(|(of, _)| *of == failover) {
            Some((_, count)) => *count += 1,
            // As many as there are causes and deciders.
            None => counts.push((failover, 1)),
        }
        failover
    }

    /// All of it.
    pub(crate) fn totals(&self) -> Totals {
        self.lock().totals.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Plain values, whole at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a guest at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Observation {
    /// Its name, where a process has several.
    pub(crate) guest: Option<String>,
    pub(crate) role: ColoMode,
    pub(crate) state: RunState,
    pub(crate) migration: MigrationInfo,
    pub(crate) totals: Totals,
    pub(crate) heartbeat: Option<HeartbeatReport>,
    /// Bytes that the guest has put out, and how many of them are held back.
    pub(crate) serial: Option<(u64, usize)>,
}

impl Observation {
    /// What `x-query-colo-figures` answers, without what only a primary knows.
    pub(crate) fn figures(&self) -> ColoFigures {
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        ColoFigures {
            checkpoints: self.totals.checkpoints,
            total_pause_us: us(self.totals.pause),
            last: self.totals.last.map(|last| LastCheckpoint {
                pause_us: us(last.pause),
                age_ms: u64::try_from(last.age().as_millis()).unwrap_or(u64::MAX),
                ram_bytes: last.ram_bytes,
                device_bytes: last.device_bytes,
                dirty_pages: last.dirty_pages,
                unchanged_pages: last.unchanged_pages,
            }),
            heartbeat_age_us: self
                .heartbeat
                .as_ref()
                .and_then(|report| report.peer_age)
                .map(us),
            gap_bandwidth: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use colo_core::{PeerLoss, Step};

    use super::*;

    #[test]
    fn a_pause_belongs_to_the_class_of_its_bound() {
        let figures = Figures::default();
        for us in [0, 1000, 1001, 2500, 1_000_000, 1_000_001] {
            let mut report = CheckpointReport::default();
            report.pause = Duration::from_micros(us);
            report.dirty_pages = 3;
            figures.note(&report);
        }
        let totals = figures.totals();
        assert_eq!(totals.pauses, [2, 2, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!((totals.checkpoints, totals.dirty_pages), (6, 18));
        assert_eq!(totals.pause, Duration::from_micros(2_004_502));
        let last = totals.last.unwrap();
        assert_eq!(last.pause, Duration::from_micros(1_000_001));
    }

    #[test]
    fn failovers_are_counted_by_cause_and_decider() {
        let figures = Figures::default();
        let lost = Cause::PeerLost {
            during: Step::SendRam,
            loss: PeerLoss::Closed,
        };
        for asks in [false, true, false] {
            figures.operator_asks(asks);
            figures.ended(&lost);
            figures.went_on(Decider::Heartbeat);
        }
        // One that an operator was refused is not an operator's.
        figures.operator_asks(true);
        figures.operator_asks(false);
        figures.ended(&Cause::FailoverRequested);
        figures.went_on(Decider::Policy);
        let failover = |cause, decided_by| Failover { cause, decided_by };
        assert_eq!(
            figures.totals().failovers,
            [
                (failover("peer-lost", "heartbeat"), 2),
                (failover("peer-lost", "operator"), 1),
                (failover("request", "policy"), 1),
            ]
        );
    }
}
