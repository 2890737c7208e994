//! What an operator may change while a migration runs, and the rate limit that follows from it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::raw::rate::RateLimiter;

/// Bandwidth and downtime limits, shared between the migration and whoever sets them.
///
/// Relaxed atomics suffice: each value stands for itself and is only ever a limit.
#[derive(Debug)]
pub struct Limits {
    limiter: Arc<RateLimiter>,
    downtime_us: AtomicU64,
}

impl Limits {
    /// `max_bandwidth` in bytes a second, 0 for no limit; `downtime` is how long the guest may stand
    /// still at the switch-over.
    #[must_use]
    pub fn new(max_bandwidth: u64, downtime: Duration) -> Self {
        let limits = Self {
            limiter: Arc::new(RateLimiter::new(max_bandwidth)),
            downtime_us: AtomicU64::new(0),
        };
        limits.set_downtime(downtime);
        limits
    }

    /// Sets the bandwidth, bytes a second, 0 for no limit. It takes effect at once.
    pub fn set_max_bandwidth(&self, bytes_per_second: u64) {
        self.limiter.set_limit(bytes_per_second);
    }

    /// Returns what the main stream and the channels pay to for each byte while a migration runs.
    #[must_use]
    pub const fn limiter(&self) -> &Arc<RateLimiter> {
        &self.limiter
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
        self.limiter.limit()
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
    fn small_samples_do_not_replace_a_measured_bandwidth() {
        let mut bandwidth = Bandwidth::default();
        assert_eq!(bandwidth.time_for(1), None);
        bandwidth.sample(1 << 20, Duration::from_secs(1));
        bandwidth.sample(10, Duration::from_secs(10));
        assert_eq!(bandwidth.get(), Some(1 << 20));
        assert_eq!(bandwidth.time_for(2 << 20), Some(Duration::from_secs(2)));
    }
}
