//! Deadlines from durations that callers choose: no addition that can overflow.

use std::time::{Duration, Instant};

/// What stands for "never" where a duration is too long for an [`Instant`]: a century.
const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Returns the moment `limit` from now.
///
/// `Instant::now() + limit` panics for [`Duration::MAX`], the natural "no limit". This returns a moment in the
/// far future for it.
///
/// ```
/// use std::time::{Duration, Instant};
/// use migration_stream::io::deadline_after;
///
/// assert!(deadline_after(Duration::MAX) > Instant::now() + Duration::from_secs(1 << 30));
/// ```
#[must_use]
pub fn deadline_after(limit: Duration) -> Instant {
    deadline_from(Instant::now(), limit)
}

/// Returns the moment `limit` after `now`, as [`deadline_after`] does.
#[must_use]
pub fn deadline_from(now: Instant, limit: Duration) -> Instant {
    now.checked_add(limit)
        .or_else(|| now.checked_add(FAR))
        .unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_added_and_one_without_end_is_a_century() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(deadline_from(now, second), now + second);
        assert_eq!(deadline_from(now, Duration::ZERO), now);
        assert_eq!(deadline_from(now, Duration::MAX), now + FAR);
        // Also from a deadline that has no end itself.
        let late = deadline_from(now, Duration::MAX);
        assert!(deadline_from(late, Duration::MAX) > late);
    }
}
