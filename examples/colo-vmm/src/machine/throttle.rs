//! Taking time from a guest's vCPUs, for `auto-converge`.
//!
//! The vCPUs run for [`SLICE`], then all of them rest for as long as the percentage asks for, and so
//! on. A stop of the machine ends a rest at once.

use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration_stream::precopy::Throttle;

use super::RunControl;

/// How long the vCPUs run between two rests.
const SLICE: Duration = Duration::from_millis(10);
/// At 100 % a rest would have no end.
const MAX_PERCENTAGE: u8 = 99;

/// Has the threads of a guest rest.
pub(super) struct CpuThrottle {
    control: Arc<RunControl>,
    kick: Arc<dyn Fn() + Send + Sync>,
    percentage: Arc<Percentage>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Percentage {
    now: Mutex<u8>,
    changed: Condvar,
}

impl Percentage {
    // A number is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, u8> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `time`, or until it is 0. Returns what it is then.
    fn after(&self, time: Duration) -> u8 {
        let begun = Instant::now();
        let mut now = self.lock();
        while *now > 0 {
            let left = time.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            now = self
                .changed
                .wait_timeout(now, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *now
    }
}

impl CpuThrottle {
    /// For the threads that `control` starts and stops. `kick` has each of them look at it.
    pub(super) fn new(control: Arc<RunControl>, kick: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            control,
            kick: Arc::new(kick),
            percentage: Arc::default(),
            thread: None,
        }
    }

    fn start(&mut self) {
        let control = Arc::clone(&self.control);
        let kick = Arc::clone(&self.kick);
        let percentage = Arc::clone(&self.percentage);
        let spawned = thread::Builder::new()
            .name("throttle".to_owned())
            .spawn(move || {
                loop {
                    let rest = rest_of(percentage.after(SLICE));
                    if rest.is_zero() {
                        return;
                    }
                    control.rest_for(rest);
                    kick();
                    percentage.after(rest);
                }
            });
        match spawned {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => tracing::warn!(%error, "the guest cannot be slowed down"),
        }
    }

    fn end(&mut self) {
        *self.percentage.lock() = 0;
        self.percentage.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that slows the guest down has panicked");
        }
        self.control.rest_for(Duration::ZERO);
    }
}

/// How long to rest after each [`SLICE`] for that share of the time.
fn rest_of(percentage: u8) -> Duration {
    let percentage = percentage.min(MAX_PERCENTAGE);
    SLICE * u32::from(percentage) / u32::from(100 - percentage)
}

impl Throttle for CpuThrottle {
    fn set(&mut self, percentage: u8) {
        if percentage == 0 {
            self.end();
            return;
        }
        *self.percentage.lock() = percentage;
        if self.thread.is_none() {
            self.start();
        }
    }

    /// This VMM does not offer the capability `dirty-limit`.
    fn set_dirty_limit(&mut self, _mib_per_second: Option<NonZeroU64>) {}
}

impl Drop for CpuThrottle {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_takes_its_share_of_the_time() {
        assert_eq!(rest_of(0), Duration::ZERO);
        assert_eq!(rest_of(50), SLICE);
        assert_eq!(rest_of(99), SLICE * 99);
        assert_eq!(rest_of(u8::MAX), SLICE * 99);
    }
}
