//! The line that shows what is going on.

use std::borrow::Cow;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar};

/// The line on stderr that shows what is going on. Hidden if nobody looks: no terminal, or `--json`.
pub struct Progress(ProgressBar);

impl Progress {
    /// A line that says nothing yet.
    pub fn new(hidden: bool) -> Self {
        let bar = if hidden {
            ProgressBar::hidden()
        } else {
            ProgressBar::new_spinner()
        };
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(bar)
    }

    /// Shows a stage.
    pub fn says(&self, what: impl Into<Cow<'static, str>>) {
        self.0.set_message(what);
    }

    /// Shows how far precopy has come, bytes.
    pub fn migrated(&self, sent: u64, left: u64) {
        self.says(format!(
            "precopy: {} sent, {} left",
            HumanBytes(sent),
            HumanBytes(left)
        ));
    }

    /// Shows a checkpoint and its pause.
    pub fn checkpoint(&self, number: u64, of: u64, pause_us: u64) {
        let pause = Duration::from_micros(pause_us).as_secs_f64() * 1000.0;
        self.says(format!("checkpoint {number} of {of}, {pause:.1} ms pause"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
