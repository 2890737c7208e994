//! How precopy is getting on, from what `query-migrate` answers.

use std::fmt;
use std::time::Duration;

use qmp_types::{MigrationInfo, MigrationStatus};

/// How far apart two readings are at least. Shorter ones say little about a rate.
pub(super) const PERIOD: Duration = Duration::from_secs(1);
/// So many readings in a row have to find that the guest writes as fast as pages leave.
const STUCK_READINGS: u32 = 3;
/// What the guest writes is known once the dirty log was read. Rounds are counted from 1.
const FIRST_MEASURED_ROUND: u64 = 2;

/// Readings of a precopy, and whether it will come to an end.
#[derive(Debug, Default)]
pub(super) struct Precopy {
    last: Option<(Duration, u64)>,
    stuck: u32,
    seen: Option<Reading>,
}

/// A precopy at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    round: u64,
    remaining: u64,
    total: u64,
    /// Bytes a second that the guest writes.
    written: u64,
    /// Bytes a second that leave.
    sent: u64,
    /// The share of its time that the guest loses to `auto-converge`, %.
    throttle: u64,
}

impl Precopy {
    /// Takes a reading, `at` after the beginning. Returns whether there was one to take: precopy goes
    /// on, and the last reading is at least [`PERIOD`] ago.
    pub(super) fn read(&mut self, at: Duration, info: &MigrationInfo) -> bool {
        let (Some(MigrationStatus::Active), Some(ram)) = (info.status, info.ram) else {
            return false;
        };
        let Some((before, transferred)) = self.last else {
            self.last = Some((at, ram.transferred));
            return false;
        };
        let elapsed = at.saturating_sub(before);
        if elapsed < PERIOD {
            return false;
        }
        self.last = Some((at, ram.transferred));
        let reading = Reading {
            round: ram.dirty_sync_count,
            remaining: ram.remaining,
            total: ram.total,
            written: ram.dirty_pages_rate.saturating_mul(ram.page_size),
            sent: per_second(ram.transferred.saturating_sub(transferred), elapsed),
            throttle: info.cpu_throttle_percentage.unwrap_or(0),
        };
        // Who writes just as fast as pages leave is measured a little above or below.
        let keeps_up = u128::from(reading.written) * 10 < u128::from(reading.sent) * 9;
        self.stuck = if reading.round < FIRST_MEASURED_ROUND || keeps_up {
            0
        } else {
            self.stuck.saturating_add(1)
        };
        self.seen = Some(reading);
        true
    }

    /// Whether the guest has kept writing as fast as pages leave.
    pub(super) const fn is_stuck(&self) -> bool {
        self.stuck >= STUCK_READINGS
    }

    /// Whether it was [stuck](Precopy::is_stuck) in the last reading and not in the one before.
    pub(super) const fn gets_stuck(&self) -> bool {
        self.stuck == STUCK_READINGS
    }

    /// Why it does not come to an end, and what helps; `None` if it may.
    pub(super) fn advice(&self, auto_converge: bool) -> Option<String> {
        let reading = self.seen.filter(|_| self.is_stuck())?;
        let way_out = if auto_converge {
            format!(
                "auto-converge takes {} % of the guest's time so far, and takes more with time",
                reading.throttle
            )
        } else {
            "--auto-converge slows the guest down until it does".to_owned()
        };
        Some(format!(
            "precopy does not converge: the guest writes {}, and {} leave; {way_out}. A higher \
             --max-bandwidth, more --multifd channels, a longer --downtime-limit or a guest that writes \
             less help too; a longer --timeout does not",
            Rate(reading.written),
            Rate(reading.sent)
        ))
    }
}

impl fmt::Display for Precopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(reading) = self.seen else {
            return f.write_str("precopy has not been measured");
        };
        write!(
            f,
            "precopy: round {}, {} of {} left, the guest writes {}, {} leave",
            reading.round,
            Size(reading.remaining),
            Size(reading.total),
            Rate(reading.written),
            Rate(reading.sent)
        )?;
        if reading.throttle > 0 {
            write!(f, ", auto-converge takes {} %", reading.throttle)?;
        }
        Ok(())
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000 / elapsed.as_micros().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Bytes, in MiB with one digit behind the point.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = u128::from(self.0) * 10 / (1 << 20);
        write!(f, "{}.{} MiB", tenths / 10, tenths % 10)
    }
}

/// The same, a second.
struct Rate(u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Size(self.0))
    }
}

#[cfg(test)]
mod tests {
    use qmp_types::MigrationRamInfo;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn info(round: u64, transferred: u64, dirty_pages_rate: u64) -> MigrationInfo {
        MigrationInfo {
            status: Some(MigrationStatus::Active),
            ram: Some(MigrationRamInfo {
                transferred,
                remaining: 8 * MIB,
                total: 16 * MIB,
                dirty_pages_rate,
                dirty_sync_count: round,
                page_size: 4096,
                ..MigrationRamInfo::default()
            }),
            ..MigrationInfo::default()
        }
    }

    /// Readings a second apart: pages a second that the guest writes, while 2 MiB leave.
    fn after(rounds: &[(u64, u64)]) -> Precopy {
        let mut precopy = Precopy::default();
        assert!(!precopy.read(Duration::ZERO, &info(1, 0, 0)));
        for (second, (round, pages)) in (1..).zip(rounds) {
            let at = Duration::from_secs(second);
            assert!(precopy.read(at, &info(*round, second * 2 * MIB, *pages)));
        }
        precopy
    }

    #[test]
    fn a_guest_that_writes_as_fast_as_pages_leave_is_said_not_to_converge() {
        let precopy = after(&[(3, 512), (4, 500), (5, 520)]);
        assert!(precopy.is_stuck() && precopy.gets_stuck());
        let advice = precopy.advice(false).unwrap();
        assert!(advice.contains("does not converge"), "{advice}");
        assert!(advice.contains("2.0 MiB/s leave"), "{advice}");
        assert!(advice.contains("--auto-converge slows"), "{advice}");
        let advice = precopy.advice(true).unwrap();
        assert!(advice.contains("auto-converge takes 0 %"), "{advice}");
        let line = precopy.to_string();
        assert!(line.contains("round 5, 8.0 MiB of 16.0 MiB left"), "{line}");
    }

    #[test]
    fn one_that_writes_less_or_is_in_its_first_rounds_may_converge() {
        for rounds in [
            &[(3, 512), (4, 500)][..],
            &[(1, 900), (1, 900), (2, 900), (2, 900)],
            &[(3, 512), (4, 400), (5, 512), (6, 512)],
        ] {
            assert_eq!(after(rounds).advice(false), None, "{rounds:?}");
        }
    }

    #[test]
    fn a_reading_is_taken_once_a_second_and_in_precopy_only() {
        let mut precopy = after(&[(3, 512)]);
        let soon = Duration::from_millis(1500);
        assert!(!precopy.read(soon, &info(3, 3 * MIB, 512)));
        let mut other = info(3, 9 * MIB, 512);
        other.status = Some(MigrationStatus::Colo);
        assert!(!precopy.read(Duration::from_secs(9), &other));
    }
}
