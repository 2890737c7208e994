//! What checkpoints cost, for those who ask.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use colo_core::CheckpointReport;
use qmp_types::{ColoFigures, LastCheckpoint};

use super::lock;

/// The checkpoints of this process so far.
#[derive(Debug, Default)]
pub(crate) struct Figures(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    figures: ColoFigures,
    /// When the last one was completed.
    at: Option<Instant>,
}

impl Figures {
    /// A checkpoint is complete.
    pub(crate) fn note(&self, report: &CheckpointReport) {
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let mut inner = lock(&self.0);
        inner.at = Some(Instant::now());
        let figures = &mut inner.figures;
        figures.checkpoints += 1;
        figures.total_pause_us = figures.total_pause_us.saturating_add(us(report.pause));
        figures.last = Some(LastCheckpoint {
            pause_us: us(report.pause),
            age_ms: 0,
            ram_bytes: report.ram_bytes,
            device_bytes: report.device_bytes,
            dirty_pages: report.dirty_pages,
        });
    }

    /// All of it, as of now.
    pub(crate) fn get(&self) -> ColoFigures {
        let inner = lock(&self.0);
        let mut figures = inner.figures;
        if let (Some(last), Some(at)) = (&mut figures.last, inner.at) {
            last.age_ms = u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        }
        figures
    }
}
