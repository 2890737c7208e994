//! Slowing a guest down that writes memory faster than it can be sent (QEMU's capabilities
//! `auto-converge` and `dirty-limit`).

use std::fmt;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// What slows vCPUs down. The VMM implements it; a migration calls it from its own thread and takes
/// back whatever it set before it stops the guest, or when it ends in any other way.
pub trait Throttle: Send {
    /// Takes `percentage` of their time from all vCPUs: 0 for none of it, at most 99.
    fn set(&mut self, percentage: u8);

    /// Lets each vCPU write at most this many MiB of new pages a second; `None` lifts the limit.
    fn set_dirty_limit(&mut self, mib_per_second: Option<NonZeroU64>);
}

/// When and how a guest is slowed down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleConfig {
    /// The guest writes too much when it writes more than this percentage of what is sent
    /// meanwhile, 1 to 100 (`throttle-trigger-threshold`).
    pub trigger_threshold: u8,
    /// What is done about it.
    pub means: ThrottleMeans,
}

/// How a guest is slowed down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThrottleMeans {
    /// All vCPUs get less time, and less still while that does not help (`auto-converge`).
    AutoConverge {
        /// The first percentage taken, 1 to 99 (`cpu-throttle-initial`).
        initial: u8,
        /// How much more each time, 1 to 99 (`cpu-throttle-increment`).
        increment: u8,
        /// Never more than this, `initial` to 99 (`max-cpu-throttle`).
        max: u8,
        /// Takes no more than is still needed, less than `increment` towards the end
        /// (`cpu-throttle-tailslow`).
        tailslow: bool,
    },
    /// A vCPU that writes pages faster than this waits (`dirty-limit`).
    DirtyLimit {
        /// MiB a second for each vCPU (`vcpu-dirty-limit`).
        mib_per_second: NonZeroU64,
    },
}

impl ThrottleConfig {
    /// `auto-converge` with QEMU's defaults: from 50 % on, 20 % and then 10 % more, 99 % at most.
    pub const AUTO_CONVERGE: Self = Self {
        trigger_threshold: 50,
        means: ThrottleMeans::AutoConverge {
            initial: 20,
            increment: 10,
            max: 99,
            tailslow: false,
        },
    };

    /// `dirty-limit` with QEMU's defaults: from 50 % on, 1 MiB a second.
    pub const DIRTY_LIMIT: Self = Self {
        trigger_threshold: 50,
        means: ThrottleMeans::DirtyLimit {
            mib_per_second: NonZeroU64::MIN,
        },
    };

    fn check(&self) -> Result<(), ThrottleConfigError> {
        let in_range = |parameter, value, min, max| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(ThrottleConfigError {
                    parameter,
                    value,
                    min,
                    max,
                })
            }
        };
        let threshold = self.trigger_threshold;
        in_range("throttle-trigger-threshold", threshold, 1, 100)?;
        if let ThrottleMeans::AutoConverge {
            initial,
            increment,
            max,
            tailslow: _,
        } = self.means
        {
            in_range("cpu-throttle-initial", initial, 1, 99)?;
            in_range("cpu-throttle-increment", increment, 1, 99)?;
            in_range("max-cpu-throttle", max, initial, 99)?;
        }
        Ok(())
    }
}

/// A parameter that is out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{parameter} is {value}, expected {min} to {max}")]
pub struct ThrottleConfigError {
    /// The parameter, as QMP calls it.
    pub parameter: &'static str,
    /// What it is.
    pub value: u8,
    /// The least it may be.
    pub min: u8,
    /// The most it may be.
    pub max: u8,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Throttle(u8),
    LimitDirtying(NonZeroU64),
}

/// Looks no more often than this, so that a short round says nothing.
const PERIOD: Duration = Duration::from_secs(1);
/// A guest has to write too much in this many periods.
const HIGH_PERIODS: u32 = 2;

/// Decides, from figures alone.
#[derive(Debug)]
struct Controller {
    config: ThrottleConfig,
    /// When the period began, and how much had been sent by then.
    period: (Instant, u64),
    dirtied: u64,
    high_periods: u32,
    percentage: u8,
    is_limited: bool,
}

impl Controller {
    const fn new(config: ThrottleConfig, now: Instant, sent: u64) -> Self {
        Self {
            config,
            period: (now, sent),
            dirtied: 0,
            high_periods: 0,
            percentage: 0,
            is_limited: false,
        }
    }

    /// The dirty log was read: `dirtied` bytes of pages have been written since it was read before,
    /// `sent` bytes have left in all.
    fn synced(&mut self, now: Instant, dirtied: u64, sent: u64) -> Option<Action> {
        self.dirtied = self.dirtied.saturating_add(dirtied);
        let (begun, sent_before) = self.period;
        if now.saturating_duration_since(begun) < PERIOD {
            return None;
        }
        let sent_meanwhile = sent.saturating_sub(sent_before);
        self.period = (now, sent);
        let dirtied = std::mem::take(&mut self.dirtied);
        let threshold = u128::from(sent_meanwhile) * u128::from(self.config.trigger_threshold);
        let threshold = u64::try_from(threshold / 100).unwrap_or(u64::MAX);
        if dirtied <= threshold {
            return None;
        }
        self.high_periods += 1;
        if self.high_periods < HIGH_PERIODS {
            return None;
        }
        self.high_periods = 0;
        self.slow_down(dirtied, threshold)
    }

    fn slow_down(&mut self, dirtied: u64, threshold: u64) -> Option<Action> {
        match self.config.means {
            ThrottleMeans::AutoConverge {
                initial,
                increment,
                max,
                tailslow,
            } => {
                let now = self.percentage;
                let next = match now {
                    0 => initial,
                    _ if tailslow => {
                        // The share of time with which the guest would write just the threshold.
                        let share = 100 - now;
                        let ideal =
                            u128::from(share) * u128::from(threshold) / u128::from(dirtied.max(1));
                        let ideal = u8::try_from(ideal).unwrap_or(share);
                        now + share.saturating_sub(ideal).min(increment)
                    }
                    _ => now + increment,
                };
                self.percentage = next.min(max);
                (self.percentage != now).then_some(Action::Throttle(self.percentage))
            }
            ThrottleMeans::DirtyLimit { mib_per_second } => {
                (!std::mem::replace(&mut self.is_limited, true))
                    .then_some(Action::LimitDirtying(mib_per_second))
            }
        }
    }
}

/// A controller and what it controls; lets the guest go when it is dropped.
pub(super) struct Throttling {
    controller: Controller,
    throttle: Box<dyn Throttle>,
}

impl Throttling {
    pub(super) fn new(
        config: ThrottleConfig,
        throttle: Box<dyn Throttle>,
        sent: u64,
    ) -> Result<Self, ThrottleConfigError> {
        config.check()?;
        Ok(Self {
            controller: Controller::new(config, Instant::now(), sent),
            throttle,
        })
    }

    /// As [`Controller::synced`], and does what follows from it.
    pub(super) fn synced(&mut self, dirtied: u64, sent: u64) {
        match self.controller.synced(Instant::now(), dirtied, sent) {
            Some(Action::Throttle(percentage)) => self.throttle.set(percentage),
            Some(Action::LimitDirtying(limit)) => self.throttle.set_dirty_limit(Some(limit)),
            None => {}
        }
    }

    /// What is taken from the vCPUs now.
    pub(super) const fn percentage(&self) -> u8 {
        self.controller.percentage
    }
}

impl Drop for Throttling {
    fn drop(&mut self) {
        if self.controller.percentage != 0 {
            self.throttle.set(0);
        }
        if self.controller.is_limited {
            self.throttle.set_dirty_limit(None);
        }
    }
}

impl fmt::Debug for Throttling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttling")
            .field("controller", &self.controller)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A link of 100 MiB a second, and a guest that writes `dirtied` MiB in each.
    fn seconds(config: ThrottleConfig, dirtied: &[u64]) -> Vec<Option<Action>> {
        let begun = Instant::now();
        let mut controller = Controller::new(config, begun, 0);
        (1u32..)
            .zip(dirtied)
            .map(|(i, dirtied)| {
                let sent = u64::from(i) * 100 * MIB;
                controller.synced(begun + PERIOD * i, dirtied * MIB, sent)
            })
            .collect()
    }

    #[test]
    fn a_guest_that_writes_half_of_what_is_sent_is_left_alone() {
        assert_eq!(
            seconds(ThrottleConfig::AUTO_CONVERGE, &[50; 20]),
            [None; 20]
        );
    }

    #[test]
    fn every_second_high_period_takes_more_time_up_to_the_most() {
        let actions = seconds(ThrottleConfig::AUTO_CONVERGE, &[51; 24]);
        let taken: Vec<_> = actions.into_iter().flatten().collect();
        let expected = [20, 30, 40, 50, 60, 70, 80, 90, 99].map(Action::Throttle);
        assert_eq!(taken, expected);
        // High periods need not follow each other, as in QEMU.
        assert_eq!(
            seconds(ThrottleConfig::AUTO_CONVERGE, &[51, 0, 0, 51]),
            [None, None, None, Some(Action::Throttle(20))]
        );
    }

    #[test]
    fn towards_the_end_no_more_than_is_needed_is_taken() {
        let config = ThrottleConfig {
            means: ThrottleMeans::AutoConverge {
                initial: 20,
                increment: 10,
                max: 99,
                tailslow: true,
            },
            ..ThrottleConfig::AUTO_CONVERGE
        };
        // 80 % of the time write 52 MiB: 76 % of it would write 50.
        let taken: Vec<_> = seconds(config, &[90, 90, 52, 52, 500, 500])
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(taken, [20, 24, 34].map(Action::Throttle));
    }

    #[test]
    fn a_dirty_limit_is_set_once() {
        let actions = seconds(ThrottleConfig::DIRTY_LIMIT, &[80; 6]);
        let taken: Vec<_> = actions.into_iter().flatten().collect();
        assert_eq!(taken, [Action::LimitDirtying(NonZeroU64::MIN)]);
    }

    #[test]
    fn rounds_shorter_than_a_second_are_taken_together() {
        let begun = Instant::now();
        let mut controller = Controller::new(ThrottleConfig::AUTO_CONVERGE, begun, 7 * MIB);
        let mut actions = Vec::new();
        for i in 1..=20u32 {
            let sent = (7 + u64::from(i) * 10) * MIB;
            actions.push(controller.synced(begun + PERIOD / 10 * i, 6 * MIB, sent));
        }
        assert_eq!(actions.pop(), Some(Some(Action::Throttle(20))));
        assert_eq!(actions, [None; 19]);
    }

    #[derive(Clone, Default)]
    struct Vcpus(Arc<Mutex<(u8, Option<NonZeroU64>)>>);

    impl Throttle for Vcpus {
        fn set(&mut self, percentage: u8) {
            self.0.lock().unwrap().0 = percentage;
        }
        fn set_dirty_limit(&mut self, limit: Option<NonZeroU64>) {
            self.0.lock().unwrap().1 = limit;
        }
    }

    #[test]
    fn a_guest_runs_at_full_speed_when_the_migration_ends() {
        for config in [ThrottleConfig::AUTO_CONVERGE, ThrottleConfig::DIRTY_LIMIT] {
            let vcpus = Vcpus::default();
            let mut throttling = Throttling::new(config, Box::new(vcpus.clone()), 0).unwrap();
            let past = Instant::now().checked_sub(PERIOD * 2).unwrap();
            for _ in 0..HIGH_PERIODS {
                throttling.controller.period.0 = past;
                throttling.synced(MIB, 0);
            }
            let (percentage, limit) = *vcpus.0.lock().unwrap();
            assert!(percentage == 20 || limit.is_some());
            assert_eq!(percentage, throttling.percentage());
            drop(throttling);
            assert_eq!(*vcpus.0.lock().unwrap(), (0, None));
        }
    }

    #[test]
    fn parameters_out_of_qemus_ranges_are_refused_by_name() {
        let auto = |initial, increment, max| ThrottleConfig {
            means: ThrottleMeans::AutoConverge {
                initial,
                increment,
                max,
                tailslow: false,
            },
            ..ThrottleConfig::AUTO_CONVERGE
        };
        let threshold = |trigger_threshold| ThrottleConfig {
            trigger_threshold,
            ..ThrottleConfig::DIRTY_LIMIT
        };
        for (config, parameter) in [
            (auto(0, 10, 99), "cpu-throttle-initial"),
            (auto(100, 10, 99), "cpu-throttle-initial"),
            (auto(20, 0, 99), "cpu-throttle-increment"),
            (auto(20, 10, 19), "max-cpu-throttle"),
            (auto(20, 10, 100), "max-cpu-throttle"),
            (threshold(0), "throttle-trigger-threshold"),
            (threshold(101), "throttle-trigger-threshold"),
        ] {
            assert_eq!(config.check().unwrap_err().parameter, parameter);
        }
        assert_eq!(threshold(100).check(), Ok(()));
        assert_eq!(auto(99, 99, 99).check(), Ok(()));
    }
}
