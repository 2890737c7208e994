//! How much a primary sends between checkpoints.

use std::sync::atomic::Ordering;

use colo_core::ColoMode;
use colo_core::driver::BackgroundTransfer;
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
            control.set_background_bandwidth(bandwidth);
        }
        Ok(())
    }

    /// What [`Migration::set_gap_bandwidth`] changes; `None` where no pages are sent between checkpoints.
    #[must_use]
    pub fn gap_bandwidth(&self) -> Option<u64> {
        let control = lock(&self.job).colo.clone();
        match control {
            Some(control) if self.failover.status().mode == ColoMode::Primary => {
                control.background_bandwidth()
            }
            _ => self
                .options
                .gap
                .map(|_| self.gap_bandwidth.load(Ordering::Acquire)),
        }
    }

    /// How the next COLO is to send pages between checkpoints.
    pub(super) fn background(&self) -> Option<BackgroundTransfer> {
        let bandwidth = self.gap_bandwidth.load(Ordering::Acquire);
        (self.options.gap).map(|_| BackgroundTransfer::default().bandwidth(bandwidth))
    }
}
