//! A limit on bytes a second that holds over any second, whatever carries them.
//!
//! [`TokenBucket`] is the account, without clock or threads. [`RateLimiter`] lets any number of threads share one:
//! each pays for its bytes right before it writes them, so that every byte is counted once, as it leaves, compressed
//! if it is, and nothing that is queued can escape the limit.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Credit that is not used is kept for this long: a second carries at most a twentieth more than the limit, and the
/// one write that overdraws.
const BURST: Duration = Duration::from_millis(50);
/// How often whoever waits for the limit looks whether it is to go on.
const SLICE: Duration = Duration::from_millis(50);
const NANOS: i128 = 1_000_000_000;

/// An account of bytes against a rate. A debt is carried until it is paid.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Bytes a second, 0 for no limit.
    rate: u64,
    /// Bytes times nanoseconds, so that nothing is lost to rounding; a debt if negative.
    balance: i128,
    /// For how long credit is kept that is not used.
    burst: Duration,
    at: Instant,
}

impl TokenBucket {
    /// Returns an account with neither credit nor debt. `rate` is in bytes a second, 0 for no limit.
    #[must_use]
    pub const fn new(rate: u64, now: Instant) -> Self {
        Self {
            rate,
            balance: 0,
            burst: BURST,
            at: now,
        }
    }

    /// Returns the same account for somebody who comes every `interval`: credit is kept for as long, and for 50 ms at
    /// least.
    #[must_use]
    pub fn used_every(self, interval: Duration) -> Self {
        let burst = self.burst.max(interval);
        Self { burst, ..self }
    }

    /// Sets the rate from `now` on. A debt stays, in bytes; without a limit there is none.
    pub fn set_rate(&mut self, now: Instant, rate: u64) {
        if rate == self.rate {
            return;
        }
        self.earn(now);
        if rate == 0 || self.rate == 0 {
            self.balance = 0;
        }
        self.rate = rate;
        self.balance = self.balance.min(self.most());
    }

    /// Takes `bytes` out, whether they are there or not.
    pub fn spend(&mut self, now: Instant, bytes: u64) {
        self.earn(now);
        if self.rate > 0 {
            let spent = i128::from(bytes).saturating_mul(NANOS);
            self.balance = self.balance.saturating_sub(spent);
        }
    }

    /// Returns how long it takes to pay the debt; zero if there is none.
    pub fn delay(&mut self, now: Instant) -> Duration {
        self.earn(now);
        if self.rate == 0 || self.balance >= 0 {
            return Duration::ZERO;
        }
        let nanos = self.balance.unsigned_abs().div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Returns how many bytes can be spent without a debt; all there are if there is no limit.
    pub fn credit(&mut self, now: Instant) -> u64 {
        self.earn(now);
        if self.rate == 0 {
            return u64::MAX;
        }
        u64::try_from((self.balance / NANOS).max(0)).unwrap_or(u64::MAX)
    }

    fn earn(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let nanos = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let earned = nanos.saturating_mul(self.rate.into());
        self.balance = self.balance.saturating_add(earned).min(self.most());
    }

    /// The most credit that is kept.
    fn most(&self) -> i128 {
        let nanos = i128::try_from(self.burst.as_nanos()).unwrap_or(i128::MAX);
        nanos.saturating_mul(self.rate.into())
    }
}

/// A [`TokenBucket`] that threads share: each waits in it before it writes.
///
/// One thread waits for the account and the others for their turn, so that a thousand of them cost no more wake-ups
/// than one. A new limit takes effect at once, also for whoever waits.
#[derive(Debug)]
pub struct RateLimiter {
    limit: AtomicU64,
    lifted: AtomicBool,
    turn: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    bucket: TokenBucket,
    /// Somebody waits for the account.
    waits: bool,
    /// Threads that have something to do and do not wait for the limit.
    working: usize,
    /// Since when the limit alone is waited for.
    idle_since: Option<Instant>,
    idle: Duration,
}

impl State {
    fn note_idle(&mut self, now: Instant) {
        match (self.waits && self.working == 0, self.idle_since) {
            (true, None) => self.idle_since = Some(now),
            (false, Some(since)) => {
                self.idle += now.saturating_duration_since(since);
                self.idle_since = None;
            }
            _ => {}
        }
    }
}

impl RateLimiter {
    /// Returns a limiter to `limit` bytes a second, 0 for no limit.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit: AtomicU64::new(limit),
            lifted: AtomicBool::new(false),
            turn: Mutex::new(()),
            state: Mutex::new(State {
                bucket: TokenBucket::new(limit, Instant::now()),
                waits: false,
                working: 0,
                idle_since: None,
                idle: Duration::ZERO,
            }),
            changed: Condvar::new(),
        }
    }

    /// Sets the limit, bytes a second, 0 for none.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
        self.wake();
    }

    /// Returns the limit that was set, bytes a second, 0 for none.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Suspends the limit, as for a switch-over, or lets it hold again.
    pub fn lift(&self, lifted: bool) {
        self.lifted.store(lifted, Ordering::Relaxed);
        self.wake();
    }

    /// Returns what holds now, bytes a second, 0 for no limit.
    #[must_use]
    pub fn rate(&self) -> u64 {
        if self.lifted.load(Ordering::Relaxed) {
            return 0;
        }
        self.limit()
    }

    /// Waits until `bytes` may be written. `go_on` is asked every 50 ms at most while it waits. Returns false, and
    /// pays nothing, when `go_on` does.
    pub fn pay(&self, bytes: u64, mut go_on: impl FnMut() -> bool) -> bool {
        if self.rate() == 0 {
            return true;
        }
        let _turn = lock(&self.turn);
        let mut state = lock(&self.state);
        let paid = loop {
            let now = Instant::now();
            state.bucket.set_rate(now, self.rate());
            let delay = state.bucket.delay(now);
            if delay.is_zero() {
                state.bucket.spend(now, bytes);
                break true;
            }
            if !go_on() {
                break false;
            }
            state.waits = true;
            state.note_idle(now);
            let waited = self.changed.wait_timeout(state, delay.min(SLICE));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waits = false;
        state.note_idle(Instant::now());
        paid
    }

    /// Says that the calling thread has something to do, until what is returned is dropped: time in which it does
    /// not wait for the limit counts as busy.
    pub fn work(&self) -> Work<'_> {
        let counts = self.rate() > 0;
        if counts {
            self.count(1);
        }
        Work {
            limiter: self,
            counts,
        }
    }

    /// Returns for how long nothing was done but to wait for the limit, in all.
    #[must_use]
    pub fn idle(&self) -> Duration {
        let state = lock(&self.state);
        let since = state.idle_since.map_or(Duration::ZERO, |s| s.elapsed());
        state.idle + since
    }

    fn count(&self, change: isize) {
        let mut state = lock(&self.state);
        state.working = state.working.saturating_add_signed(change);
        state.note_idle(Instant::now());
    }

    fn wake(&self) {
        // With the lock, so that nobody is between looking and waiting.
        drop(lock(&self.state));
        self.changed.notify_all();
    }
}

/// A thread that has something to do; see [`RateLimiter::work`].
#[derive(Debug)]
pub struct Work<'a> {
    limiter: &'a RateLimiter,
    counts: bool,
}

impl Work<'_> {
    /// Waits as [`RateLimiter::pay`] does.
    pub fn pay(&mut self, bytes: u64, go_on: impl FnMut() -> bool) -> bool {
        if self.counts {
            self.limiter.count(-1);
        }
        let paid = self.limiter.pay(bytes, go_on);
        if self.counts {
            self.limiter.count(1);
        }
        paid
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        if self.counts {
            self.limiter.count(-1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held but `go_on`, and then nothing is half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
