//! Ticks, and the instants that the deciders are told.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(50);

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

pub(super) fn at(tick: u16) -> Instant {
    *START + TICK * u32::from(tick)
}

/// The first tick at which `instant` has come.
pub(super) fn tick_of(instant: Instant) -> u16 {
    let ticks = instant
        .saturating_duration_since(*START)
        .as_millis()
        .div_ceil(TICK.as_millis());
    u16::try_from(ticks).unwrap_or(u16::MAX)
}
