//! How much a primary sends between checkpoints.

use std::sync::atomic::Ordering;

use colo_core::Role;
use colo_core::driver::GapConfig;
use qmp_types::QmpError;

use super::{Migration, lock};

impl Migration {
    /// `x-set-colo-gap-bandwidth`: changes how much a primary sends between checkpoints at most, bytes a
    /// second, in the present COLO and in those to come.
    ///
    /// # Errors
    /// It sends none.
    pub fn set_gap_bandwidth(&self, bandwidth: u64) -> Result<(), QmpError> {
        if self.options.gap.is_none() {
            return Err(QmpError::generic(
                "Pages are sent between checkpoints only with --gap-bandwidth",
            ));
        }
        let job = lock(&self.job);
        self.gap_bandwidth.store(bandwidth, Ordering::Release);
        // A driver whose control is not there yet reads the other.
        if let Some(control) = &job.colo {
            control.set_gap_bandwidth(bandwidth);
        }
        Ok(())
    }

    /// What [`Migration::set_gap_bandwidth`] changes; `None` where no pages are sent between checkpoints.
    #[must_use]
    pub fn gap_bandwidth(&self) -> Option<u64> {
        let control = lock(&self.job).colo.clone();
        match control {
            Some(control) if control.role() == Role::Primary => control.gap_bandwidth(),
            _ => self.gap().map(|gap| gap.bandwidth),
        }
    }

    /// How the next COLO is to send pages between checkpoints.
    pub(super) fn gap(&self) -> Option<GapConfig> {
        self.options.gap.map(|gap| GapConfig {
            bandwidth: self.gap_bandwidth.load(Ordering::Acquire),
            ..gap
        })
    }
}
