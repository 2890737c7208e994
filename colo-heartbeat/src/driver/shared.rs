//! What the heartbeat's threads and its owner have together.

use std::io::{PipeWriter, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration_stream::io::without_write_signals;

use crate::arbiter::Answer;
use crate::arbitration::Request;
use crate::beat::Phase;
use crate::decision::StopReason;
use crate::failover::ColoEnd;
use crate::link::Endpoint;
use crate::peer::{PeerState, Rhythm};

/// The state of a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeartbeatReport {
    /// The peer's liveness.
    pub peer: PeerState,
    /// The age of its last beat.
    pub peer_age: Option<Duration>,
    /// The phase in its last beat.
    pub peer_phase: Option<Phase>,
    /// Whether there is a connection with beats of the peer's.
    pub connected: bool,
    /// This side's phase.
    pub phase: Phase,
    /// Why this side's guest has stopped, or is suspended until the arbiter answers.
    pub stop: Option<StopReason>,
    /// How this side beats.
    pub rhythm: Rhythm,
    /// Which end of the connection this side is.
    pub endpoint: Endpoint,
    /// The arbiter's kind.
    pub arbiter: &'static str,
    /// How long a lease lasts without renewal.
    pub term: Option<Duration>,
    /// The arbiter's last answer, `None` before the first.
    pub answer: Option<String>,
    /// The generation of the last grant.
    pub generation: Option<u64>,
    /// Why a beat was last refused.
    pub refused: Option<String>,
}

pub(super) struct Shared {
    pub(super) report: Mutex<(HeartbeatReport, Instant)>,
    /// It has survived another pair: its guest is never given up as long as it runs.
    pub(super) survivor: AtomicBool,
    /// What has become of COLO: see [`Heartbeat::colo_ended`](super::Heartbeat::colo_ended).
    pub(super) ended: Mutex<Option<ColoEnd>>,
    /// Wishes that were not looked at yet: see [`Heartbeat::take_over`](super::Heartbeat::take_over).
    pub(super) requests: Mutex<Vec<Request>>,
    pub(super) quit: AtomicBool,
    pub(super) wake: Mutex<PipeWriter>,
}

impl Shared {
    /// What the arbiter has said last.
    pub(super) fn note(&self, answer: &Answer) {
        let mut report = lock(&self.report);
        report.0.answer = Some(match answer {
            Answer::Won(_) => "won".to_owned(),
            Answer::Lost(owner) => format!("lost to {owner}"),
            Answer::Unreachable(error) => error.chain(),
        });
        if let Answer::Won(grant) = answer {
            report.0.generation = Some(grant.generation);
        }
    }

    pub(super) fn wake(&self) {
        // The pipe is read as soon as it has something: one that is full is about to be. Its reader may have
        // ended, which must not raise SIGPIPE.
        let _ = without_write_signals(|| lock(&self.wake).write(&[1]));
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
