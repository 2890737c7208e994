//! How far a relay is, for somebody who watches it, and its final figures.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What a relay is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// It waits for the source.
    Waiting,
    /// It takes the guest.
    Receiving,
    /// It writes the guest into its store.
    Storing,
    /// It reads the guest from its store.
    Loading,
    /// It gives the guest away.
    Sending,
    /// It gives away what of the guest has arrived.
    Forwarding,
}

impl Stage {
    const ALL: [Self; 6] = [
        Self::Waiting,
        Self::Receiving,
        Self::Storing,
        Self::Loading,
        Self::Sending,
        Self::Forwarding,
    ];
}

/// Counters that are written by whoever works and read by whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    stage: AtomicU8,
    memory: AtomicU64,
    /// What came in.
    pub incoming: Flow,
    /// What went out.
    pub outgoing: Flow,
}

impl Progress {
    /// What is being done.
    #[must_use]
    pub fn stage(&self) -> Stage {
        let stage = usize::from(self.stage.load(Relaxed));
        Stage::ALL.get(stage).copied().unwrap_or(Stage::Waiting)
    }

    /// Bytes of guest memory, 0 as long as they are not known.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory.load(Relaxed)
    }

    pub(crate) fn begin(&self, stage: Stage) {
        self.stage.store(stage as u8, Relaxed);
    }

    pub(crate) fn set_memory(&self, bytes: u64) {
        self.memory.store(bytes, Relaxed);
    }
}

/// One direction.
#[derive(Debug, Default)]
pub struct Flow {
    bytes: AtomicU64,
    pages: AtomicU64,
    zero_pages: AtomicU64,
}

impl Flow {
    /// Bytes on the wire or in the file, all channels together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Pages with content, as often as they crossed.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages.load(Relaxed)
    }

    /// Pages that crossed as zero.
    #[must_use]
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages.load(Relaxed)
    }

    pub(crate) fn add_bytes(&self, n: usize) {
        self.bytes.fetch_add(n as u64, Relaxed);
    }

    pub(crate) fn add_pages(&self, n: u64) {
        self.pages.fetch_add(n, Relaxed);
    }

    pub(crate) fn add_zero_pages(&self, n: u64) {
        self.zero_pages.fetch_add(n, Relaxed);
    }

    pub(crate) fn set(&self, bytes: u64, pages: u64, zero_pages: u64) {
        self.bytes.store(bytes, Relaxed);
        self.pages.store(pages, Relaxed);
        self.zero_pages.store(zero_pages, Relaxed);
    }

    pub(crate) fn figures(&self, time: Duration) -> Figures {
        Figures {
            bytes: self.bytes(),
            pages: self.pages(),
            zero_pages: self.zero_pages(),
            time,
        }
    }
}

/// What one direction took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Bytes on the wire or in the file, all channels together.
    pub bytes: u64,
    /// Pages with content, as often as they crossed.
    pub pages: u64,
    /// Pages that crossed as zero.
    pub zero_pages: u64,
    /// From the connection to the last byte, and for an outgoing guest to its confirmation.
    pub time: Duration,
}

impl Figures {
    /// Bytes that crossed, MiB a second.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // for people
    pub fn mib_per_second(&self) -> f64 {
        self.bytes as f64 / f64::from(1 << 20) / self.time.as_secs_f64().max(1e-6)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes, {} pages and {} zero pages in {:.3} s, {:.0} MiB/s",
            self.bytes,
            self.pages,
            self.zero_pages,
            self.time.as_secs_f64(),
            self.mib_per_second()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_read_as_it_was_written() {
        let progress = Progress::default();
        for stage in Stage::ALL {
            progress.begin(stage);
            assert_eq!(progress.stage(), stage);
        }
    }

    #[test]
    fn figures_are_said_in_words() {
        let flow = Flow::default();
        flow.set(4 << 20, 1000, 24);
        assert_eq!(
            flow.figures(Duration::from_millis(500)).to_string(),
            "4194304 bytes, 1000 pages and 24 zero pages in 0.500 s, 8 MiB/s"
        );
    }
}
