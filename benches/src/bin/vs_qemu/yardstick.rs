//! What the machine itself makes of something that takes as long as a pause: two threads that do nothing
//! but wake each other. How far its slowest is from its median no pause of that length can be below.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ::tests::Result;
use colo_vmm::demo::Spread;
use serde::{Deserialize, Serialize};

/// The two threads' times. They are busy between two measurements, as the two guests are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Yardstick {
    /// How often each of the two woke the other in one measurement.
    pub wakes: usize,
    /// Every time, ms.
    pub times_ms: Vec<f64>,
    /// The same.
    pub time_ms: Spread,
}

/// Measurements to learn from how many wakes take how long.
const TRIALS: usize = 10;
/// Wakes in each of them.
const TRIAL_WAKES: usize = 20;
/// From one of them to the next.
const TRIAL_DELAY: Duration = Duration::from_millis(10);

impl Yardstick {
    /// Measures `wanted` times, with `delay` in between, something that takes about `length`.
    pub fn measure(wanted: usize, delay: Duration, length: Duration) -> Result<Self> {
        let trials = turns(TRIALS, TRIAL_DELAY, TRIAL_WAKES)?;
        let usual = Spread::of(trials).ok_or("nothing was measured")?.p50;
        let wakes = (length.as_secs_f64() * 1e3 / usual * TRIAL_WAKES as f64).round();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // small and positive
        let wakes = (wakes as usize).max(1);
        let times_ms = turns(wanted, delay, wakes)?;
        Ok(Self {
            wakes,
            time_ms: Spread::of(times_ms.iter().copied()).ok_or("nothing was measured")?,
            times_ms,
        })
    }
}

/// How long `wakes` wakes of each thread by the other take, ms, `count` times.
fn turns(count: usize, delay: Duration, wakes: usize) -> Result<Vec<f64>> {
    let (mut here, mut there) = UnixStream::pair()?;
    let turn = AtomicUsize::new(0);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let answering = scope.spawn(|| -> std::io::Result<()> {
            let mut byte = [0];
            for next in 1..=count {
                while turn.load(Ordering::Acquire) < next {
                    if is_over.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
                for _ in 0..wakes {
                    there.read_exact(&mut byte)?;
                    there.write_all(&byte)?;
                }
            }
            Ok(())
        });
        let mut times = Vec::with_capacity(count);
        let mut measured = || -> std::io::Result<()> {
            let mut byte = [0];
            for next in 1..=count {
                let due = Instant::now() + delay;
                while Instant::now() < due {
                    std::hint::spin_loop();
                }
                let begun = Instant::now();
                turn.store(next, Ordering::Release);
                for _ in 0..wakes {
                    here.write_all(&byte)?;
                    here.read_exact(&mut byte)?;
                }
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            Ok(())
        };
        let outcome = measured();
        is_over.store(true, Ordering::Relaxed);
        // Whoever is in the middle of a turn hears that there is no more of it.
        here.shutdown(std::net::Shutdown::Both)?;
        let answered = answering
            .join()
            .map_err(|_| "the answering thread failed")?;
        outcome?;
        answered?;
        Ok(times)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_measured_as_are_wanted() {
        let delay = Duration::from_millis(1);
        let yardstick = Yardstick::measure(5, delay, Duration::from_micros(500)).unwrap();
        assert_eq!(yardstick.times_ms.len(), 5);
        assert!(yardstick.wakes >= 1);
        assert!(yardstick.time_ms.p50 > 0.0);
    }
}
