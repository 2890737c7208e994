//! What an operator may change while a migration runs, and the rate limit that follows from it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bandwidth and downtime limits, shared between the migration and whoever sets them.
///
/// Relaxed atomics suffice: each value stands for itself and is only ever a limit.
#[derive(Debug)]
pub struct Limits {
    max_bandwidth: AtomicU64,
    downtime_us: AtomicU64,
}

impl Limits {
    /// `max_bandwidth` in bytes a second, 0 for no limit; `downtime` is how long the guest may stand
    /// still at the switch-over.
    #[must_use]
    pub fn new(max_bandwidth: u64, downtime: Duration) -> Self {
        let limits = Self {
            max_bandwidth: AtomicU64::new(max_bandwidth),
            downtime_us: AtomicU64::new(0),
        };
        limits.set_downtime(downtime);
        limits
    }

    /// Sets the bandwidth, bytes a second, 0 for no limit.
    pub fn set_max_bandwidth(&self, bytes_per_second: u64) {
        self.max_bandwidth
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// Sets the downtime limit.
    pub fn set_downtime(&self, downtime: Duration) {
        self.downtime_us.store(
            u64::try_from(downtime.as_micros()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
    }

    /// Bytes a second, 0 for no limit.
    #[must_use]
    pub fn max_bandwidth(&self) -> u64 {
        self.max_bandwidth.load(Ordering::Relaxed)
    }

    /// How long the guest may stand still at the switch-over.
    #[must_use]
    pub fn downtime(&self) -> Duration {
        Duration::from_micros(self.downtime_us.load(Ordering::Relaxed))
    }
}

/// QEMU's defaults: 128 MiB a second and 300 ms (QAPI `MigrationParameters`, 11.1).
impl Default for Limits {
    fn default() -> Self {
        Self::new(128 << 20, Duration::from_millis(300))
    }
}

/// Windows of 100 ms, each with a tenth of the bandwidth.
#[derive(Debug)]
pub(super) struct RateWindow {
    started: Instant,
    used: u64,
}

/// Length of a window.
const WINDOW: Duration = Duration::from_millis(100);

impl RateWindow {
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            started: now,
            used: 0,
        }
    }

    /// Accounts `bytes` sent, and says how long to wait before the next ones.
    pub(super) fn account(&mut self, now: Instant, bytes: u64, max_bandwidth: u64) -> Duration {
        if max_bandwidth == 0 {
            return Duration::ZERO;
        }
        if now.duration_since(self.started) >= WINDOW {
            // What the last window overdrew is taken from this one: a large write does not lift
            // the limit.
            let budget = max_bandwidth / 10;
            self.used = self.used.saturating_sub(budget).min(budget);
            self.started = now;
        }
        self.used = self.used.saturating_add(bytes);
        if self.used >= max_bandwidth / 10 {
            (self.started + WINDOW).saturating_duration_since(now)
        } else {
            Duration::ZERO
        }
    }
}

/// Bandwidth as it was measured while sending, waits of the rate limit left out.
#[derive(Debug, Default)]
pub(super) struct Bandwidth {
    bytes_per_second: Option<u64>,
}

/// A sample below this says more about the scheduler than about the link.
const MIN_SAMPLE_BYTES: u64 = 256 << 10;

impl Bandwidth {
    /// Takes a sample: `bytes` left in `busy` time.
    pub(super) fn sample(&mut self, bytes: u64, busy: Duration) {
        let us = u64::try_from(busy.as_micros()).unwrap_or(u64::MAX).max(1);
        if bytes >= MIN_SAMPLE_BYTES || self.bytes_per_second.is_none() && bytes > 0 {
            self.bytes_per_second = Some(
                (u128::from(bytes) * 1_000_000 / u128::from(us))
                    .try_into()
                    .unwrap_or(u64::MAX),
            );
        }
    }

    /// Bytes a second, `None` before the first sample.
    pub(super) const fn get(&self) -> Option<u64> {
        self.bytes_per_second
    }

    /// How long `bytes` take at the measured bandwidth: the switch-over has no rate limit.
    pub(super) fn time_for(&self, bytes: u64) -> Option<Duration> {
        let rate = self.bytes_per_second?.max(1);
        let us = u128::from(bytes) * 1_000_000 / u128::from(rate);
        Some(Duration::from_micros(u64::try_from(us).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_window_waits_for_the_next_one_and_an_overdraft_is_paid_back() {
        let t0 = Instant::now();
        let mut window = RateWindow::new(t0);
        assert_eq!(window.account(t0, 50, 1000), Duration::ZERO);
        assert_eq!(window.account(t0 + WINDOW / 2, 50, 1000), WINDOW / 2);
        // A window later the budget is new.
        assert_eq!(window.account(t0 + WINDOW, 150, 1000), WINDOW);
        // 50 bytes too many were sent: half of the next window is gone.
        assert_eq!(window.account(t0 + WINDOW * 2, 49, 1000), Duration::ZERO);
        assert_ne!(window.account(t0 + WINDOW * 2, 1, 1000), Duration::ZERO);
    }

    #[test]
    fn no_limit_never_waits() {
        let t0 = Instant::now();
        assert_eq!(RateWindow::new(t0).account(t0, u64::MAX, 0), Duration::ZERO);
    }

    #[test]
    fn small_samples_do_not_replace_a_measured_bandwidth() {
        let mut bandwidth = Bandwidth::default();
        assert_eq!(bandwidth.time_for(1), None);
        bandwidth.sample(1 << 20, Duration::from_secs(1));
        bandwidth.sample(10, Duration::from_secs(10));
        assert_eq!(bandwidth.get(), Some(1 << 20));
        assert_eq!(bandwidth.time_for(2 << 20), Some(Duration::from_secs(2)));
    }
}
