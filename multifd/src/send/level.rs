//! The level of all channels of a set, where it adapts.

use std::ops::Range;
use std::sync::atomic::{AtomicI8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::channel_id::ChannelCount;
use crate::compression::{LevelControl, PacketTimes};
use crate::config::{Compression, ZstdRange};

/// Says at which level the channels of a [`SendSet`](super::SendSet) compress just now. It outlives the
/// set.
#[derive(Clone, Debug)]
pub struct LevelWatch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    control: Mutex<LevelControl>,
    level: AtomicI8,
    changes: AtomicU64,
}

impl LevelWatch {
    /// The level of channels that compress so, if it is one that adapts.
    pub(super) fn of(compression: Compression, channels: ChannelCount) -> Option<Self> {
        compression.range().map(|range| Self::new(range, channels))
    }

    fn new(range: ZstdRange, channels: ChannelCount) -> Self {
        let control = LevelControl::new(range, channels);
        Self(Arc::new(Shared {
            level: AtomicI8::new(control.level()),
            changes: AtomicU64::new(0),
            control: Mutex::new(control),
        }))
    }

    /// The level, in the range that was given.
    #[must_use]
    pub fn level(&self) -> i8 {
        self.0.level.load(Ordering::Relaxed)
    }

    /// How often it has changed.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Relaxed)
    }

    fn observe(&self, packet: &PacketTimes) -> i8 {
        // Nothing panics while it is held.
        let control = self.0.control.lock();
        let mut control = control.unwrap_or_else(PoisonError::into_inner);
        let before = control.level();
        let level = control.observe(packet);
        if level != before {
            self.0.level.store(level, Ordering::Relaxed);
            self.0.changes.fetch_add(1, Ordering::Relaxed);
        }
        level
    }
}

/// One channel's part in it.
#[derive(Debug)]
pub(super) struct Pace {
    watch: LevelWatch,
    /// When the last packet with data was written, if there was no sync point since.
    written: Option<Instant>,
}

impl Pace {
    pub(super) const fn new(watch: LevelWatch) -> Self {
        Self {
            watch,
            written: None,
        }
    }

    /// A packet is written that was compressed between two moments, and then `waited` for the limit on bandwidth;
    /// the level from now on.
    pub(super) fn written(
        &mut self,
        compressing: Range<Instant>,
        waited: Duration,
        bytes_in: usize,
        bytes_out: usize,
    ) -> i8 {
        let now = Instant::now();
        let before = self.written.replace(now);
        self.watch.observe(&PacketTimes {
            bytes_in: bytes_in as u64,
            bytes_out: bytes_out as u64,
            compressing: compressing.end - compressing.start,
            writing: (now - compressing.end).saturating_sub(waited),
            other: before.map_or(Duration::ZERO, |before| compressing.start - before + waited),
        })
    }

    /// The channel waits for the others, and then perhaps for pages that are not there yet.
    pub(super) const fn sync(&mut self) {
        self.written = None;
    }
}
