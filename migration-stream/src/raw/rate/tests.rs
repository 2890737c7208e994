//! The account over a simulated link, and the limiter among threads.

use std::sync::atomic::AtomicU64;
use std::thread;

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn what_is_overdrawn_is_paid_back_however_long_it_takes() {
    let t0 = Instant::now();
    let mut bucket = TokenBucket::new(1000, t0);
    assert_eq!(bucket.delay(t0), Duration::ZERO);
    bucket.spend(t0, 10_000);
    assert_eq!(bucket.delay(t0), 10 * SECOND);
    bucket.spend(t0 + SECOND, 1000);
    assert_eq!(bucket.delay(t0 + 5 * SECOND), 6 * SECOND);
    // Idle time is not saved up beyond a burst.
    assert_eq!(bucket.credit(t0 + 1000 * SECOND), 50);
    // A faster rate pays the same debt sooner; without one there is none.
    bucket.spend(t0 + 1000 * SECOND, 1050);
    bucket.set_rate(t0 + 1000 * SECOND, 2000);
    assert_eq!(bucket.delay(t0 + 1000 * SECOND), SECOND / 2);
    bucket.set_rate(t0 + 1000 * SECOND, 0);
    assert_eq!(bucket.delay(t0 + 1000 * SECOND), Duration::ZERO);
    assert_eq!(bucket.credit(t0), u64::MAX);
}

/// What happens on a simulated link.
#[derive(Clone, Debug)]
enum Event {
    /// A channel has so many bytes for the wire, after compression.
    Write(u64),
    /// Nobody has anything, or the peer takes nothing, for so many milliseconds.
    Stall(u64),
    /// The operator changes the limit.
    Limit(u64),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        40 => (1_u64..600_000).prop_map(Event::Write),
        3 => (1_u64..3000).prop_map(Event::Stall),
        1 => (1_u64..64).prop_map(|mib| Event::Limit(mib << 20)),
    ];
    prop::collection::vec(event, 1..600)
}

proptest! {
    #[test]
    fn no_second_carries_more_than_the_limit_and_a_tenth(
        first in 1_u64..64,
        events in events(),
    ) {
        let t0 = Instant::now();
        let mut now = t0;
        let mut limits = vec![(t0, first << 20)];
        let mut bucket = TokenBucket::new(first << 20, t0);
        let mut written: Vec<(Instant, u64)> = Vec::new();
        // Time in which there was something to write.
        let mut wanted = 0_u128;
        for event in &events {
            match *event {
                Event::Write(bytes) => {
                    let delay = bucket.delay(now);
                    wanted += delay.as_nanos() * u128::from(limits.last().unwrap().1);
                    now += delay;
                    bucket.spend(now, bytes);
                    written.push((now, bytes));
                }
                Event::Stall(ms) => now += Duration::from_millis(ms),
                Event::Limit(rate) => {
                    bucket.set_rate(now, rate);
                    limits.push((now, rate));
                }
            }
        }
        let largest = events.iter().filter_map(|e| match e {
            Event::Write(bytes) => Some(*bytes),
            _ => None,
        }).max().unwrap_or(0);
        let mut end = 0;
        let mut sum = 0;
        for (i, &(from, bytes)) in written.iter().enumerate() {
            while let Some(&(at, more)) = written.get(end).filter(|w| w.0 < from + SECOND) {
                let _ = at;
                sum += more;
                end += 1;
            }
            // The highest limit that held in that second, or until it began.
            let last_before = limits.iter().rposition(|l| l.0 < from).unwrap_or(0);
            let highest = limits[last_before..].iter()
                .filter(|l| l.0 < from + SECOND).map(|l| l.1).max().unwrap();
            prop_assert!(sum <= highest + highest / 10 + largest, "{sum} of {highest} at {i}");
            sum -= bytes;
        }
        // While there is data all of the limit is used.
        let total: u64 = written.iter().map(|w| w.1).sum();
        prop_assert!(u128::from(total) * 1_000_000_000 >= wanted * 9 / 10);
    }
}

#[test]
fn many_threads_share_one_limit() {
    let limiter = RateLimiter::new(4 << 20);
    let total = AtomicU64::new(0);
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert!(limiter.work().pay(16 << 10, || true));
                    total.fetch_add(16 << 10, Ordering::Relaxed);
                }
            });
        }
    });
    // 3.125 MiB at 4 MiB a second, but for what may be overdrawn: never sooner.
    let least = Duration::from_millis(781 - 50 - 4);
    assert!(begun.elapsed() >= least, "{:?}", begun.elapsed());
    // The account was all that was waited for.
    assert!(limiter.idle() >= least / 2, "{:?}", limiter.idle());
}

#[test]
fn a_new_limit_and_an_end_reach_whoever_waits() {
    for end in [
        (|limiter: &RateLimiter| limiter.set_limit(0)) as fn(&RateLimiter),
        |limiter| limiter.set_limit(u64::MAX),
        |limiter| limiter.lift(true),
    ] {
        let limiter = RateLimiter::new(1);
        assert!(limiter.pay(1 << 40, || true));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| assert!(limiter.pay(1, || true)));
            }
            thread::sleep(Duration::from_millis(20));
            end(&limiter);
        });
    }
    let limiter = RateLimiter::new(1);
    assert!(limiter.pay(1 << 40, || true));
    let mut asked = 0;
    assert!(!limiter.pay(1, || {
        asked += 1;
        asked < 3
    }));
}
