//! When a checkpoint is due.

use std::time::{Duration, Instant};

/// QEMU's default of `x-checkpoint-delay`.
pub const DEFAULT_DELAY: Duration = Duration::from_secs(20);

/// The least time the guest runs between two checkpoints by default. Without any, a delay of zero
/// or a packet comparer that never agrees would leave it no time at all.
pub const DEFAULT_MIN_GAP: Duration = Duration::from_millis(1);

/// When the next checkpoint is due: after the delay, or at once when somebody demands one.
///
/// Time comes in as an argument and is monotonic, so that a step of the wall clock neither delays
/// nor floods checkpoints.
///
/// A demand made before the primary's VM stops for a checkpoint is satisfied by that checkpoint;
/// one that comes later asks for a state this checkpoint does not hold, and is kept for the next.
/// (QEMU clears its trigger when the secondary has received the checkpoint, and such a demand with
/// it.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    delay: Duration,
    min_gap: Duration,
    /// When the last checkpoint began; before the first, when COLO was entered.
    began: Instant,
    /// When the last checkpoint had been completed and the guest ran again.
    runs_since: Instant,
    demanded: bool,
}

impl Schedule {
    /// A schedule whose first checkpoint is due `delay` after `now`.
    #[must_use]
    pub const fn new(delay: Duration, now: Instant) -> Self {
        Self {
            delay,
            min_gap: DEFAULT_MIN_GAP,
            began: now,
            runs_since: now,
            demanded: false,
        }
    }

    /// The same with another least time for the guest to run between checkpoints.
    #[must_use]
    pub const fn with_min_gap(mut self, min_gap: Duration) -> Self {
        self.min_gap = min_gap;
        self
    }

    /// Changes `x-checkpoint-delay`. As in QEMU this demands a checkpoint at once, from which the
    /// new delay counts.
    pub const fn set_delay(&mut self, delay: Duration) {
        self.delay = delay;
        self.demand();
    }

    /// `x-checkpoint-delay`.
    #[must_use]
    pub const fn delay(&self) -> Duration {
        self.delay
    }

    /// Demands a checkpoint: the outputs of the two sides differ, or somebody asked.
    pub const fn demand(&mut self) {
        self.demanded = true;
    }

    /// When the next checkpoint is due, possibly in the past; `None` if that is beyond what the
    /// clock can express, which is never.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let earliest = self.runs_since.checked_add(self.min_gap)?;
        if self.demanded {
            return Some(earliest);
        }
        Some(self.began.checked_add(self.delay)?.max(earliest))
    }

    /// Is a checkpoint due?
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.next_due().is_some_and(|due| due <= now)
    }

    /// A checkpoint begins: the request is about to be sent. The delay to the next counts from here.
    pub const fn begin(&mut self, now: Instant) {
        self.began = now;
    }

    /// The primary's VM has stopped for the checkpoint: demands made so far are satisfied by it.
    pub const fn captured(&mut self) {
        self.demanded = false;
    }

    /// The checkpoint is complete and the guest runs.
    pub const fn complete(&mut self, now: Instant) {
        self.runs_since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(200);
    const MS: Duration = Duration::from_millis(1);

    fn checkpoint(schedule: &mut Schedule, at: Instant, takes: Duration) {
        schedule.begin(at);
        schedule.captured();
        schedule.complete(at + takes);
    }

    #[test]
    fn checkpoints_come_after_the_delay_counted_from_their_beginnings() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DELAY, start);
        assert!(!schedule.is_due(start + DELAY - MS));
        assert!(schedule.is_due(start + DELAY));
        checkpoint(&mut schedule, start + DELAY, 50 * MS);
        assert_eq!(schedule.next_due(), Some(start + 2 * DELAY));
    }

    #[test]
    fn the_guest_runs_for_the_minimum_gap_however_long_a_checkpoint_took() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DELAY, start).with_min_gap(10 * MS);
        checkpoint(&mut schedule, start, 5 * DELAY);
        schedule.demand();
        assert_eq!(schedule.next_due(), Some(start + 5 * DELAY + 10 * MS));
    }

    #[test]
    fn a_new_delay_asks_for_a_checkpoint_at_once_and_counts_from_it() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DEFAULT_DELAY, start);
        let now = start + 100 * MS;
        schedule.set_delay(DELAY);
        assert!(schedule.is_due(now));
        checkpoint(&mut schedule, now, MS);
        assert_eq!(schedule.next_due(), Some(now + DELAY));
    }

    #[test]
    fn a_demand_is_satisfied_by_the_checkpoint_that_captures_later() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DELAY, start);
        schedule.begin(start + DELAY);
        schedule.demand();
        schedule.captured();
        schedule.complete(start + DELAY + MS);
        assert_eq!(schedule.next_due(), Some(start + 2 * DELAY));
    }

    #[test]
    fn a_demand_after_the_capture_is_not_swallowed() {
        let start = Instant::now();
        let mut schedule = Schedule::new(DELAY, start);
        schedule.begin(start + DELAY);
        schedule.captured();
        schedule.demand();
        let done = start + DELAY + 5 * MS;
        schedule.complete(done);
        assert_eq!(schedule.next_due(), Some(done + DEFAULT_MIN_GAP));
    }

    #[test]
    fn a_delay_beyond_the_clock_is_never_due() {
        let start = Instant::now();
        let schedule = Schedule::new(Duration::MAX, start);
        assert_eq!(schedule.next_due(), None);
        assert!(!schedule.is_due(start + DELAY));
    }
}
