//! The cost of a checkpoint.

use std::time::{Duration, Instant};

use crate::message::Message;
use crate::step::{Step, Wait};

/// One complete checkpoint, as one side saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointReport {
    /// Counts from 1.
    pub number: u64,
    /// How long this side's guest did not run: from the beginning of [`Step::PauseVm`] until the VM
    /// was resumed in [`Step::ResumeVm`].
    pub pause: Duration,
    /// Primary: how long the sending of the checkpoint's RAM and device state took.
    pub transfer: Duration,
    /// Primary: from the beginning of [`Step::PauseVm`] until the secondary had loaded the checkpoint.
    /// The pause ends there, or before with another [`Resume`](crate::Resume).
    pub until_loaded: Duration,
    /// The steps in order, each with the time it took.
    pub steps: Vec<(Step, Duration)>,
    /// Bytes of RAM on the wire, with their headers, on all channels. On the secondary, bytes received since the
    /// checkpoint before.
    pub ram_bytes: u64,
    /// Pages of the checkpoint, zero pages included. On the secondary, pages received on all channels since the
    /// checkpoint before, in the background transfer or in the checkpoint. On the primary, pages that the dirty log
    /// named; `unchanged_pages` of them did not cross.
    pub dirty_pages: u64,
    /// Primary: pages sent by background transfer since the checkpoint before.
    pub background_pages: u64,
    /// Primary: dirty pages since the checkpoint before, those of the background transfer included, that were
    /// compared with what was sent of them last.
    pub compared_pages: u64,
    /// Primary: dirty pages, in the same time, that did not cross because the secondary has their content.
    pub unchanged_pages: u64,
    /// Primary: dirty pages that were copied while the VM was paused, with local-copy resume.
    pub frozen_pages: u64,
    /// Secondary: pages copied into the guest, those its own guest had dirtied included.
    pub flushed_pages: u64,
    /// Bytes of device state.
    pub device_bytes: u64,
}

/// Collects the reports of one side's checkpoints.
#[derive(Clone, Debug, Default)]
pub(crate) struct CheckpointMeter {
    report: CheckpointReport,
    stopped: Option<Instant>,
    resumed: Option<Instant>,
    /// When the VM stopped for this checkpoint, and when its state began to leave.
    captured: Option<Instant>,
    sending: Option<Instant>,
    /// Pages that were compared, and left out, until the checkpoint before.
    elided: (u64, u64),
}

impl CheckpointMeter {
    /// A meter before the first checkpoint.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A step has been carried out.
    pub(crate) fn step(&mut self, step: Step, began: Instant, ended: Instant) {
        match step {
            Step::PauseVm => {
                self.stopped = Some(began);
                self.captured = Some(began);
            }
            Step::Send(Message::VmstateSend) => self.sending = Some(began),
            Step::SendDevices => self.report.transfer = since(self.sending.take(), ended),
            Step::Await(Wait::Message(Message::VmstateLoaded)) => {
                self.report.until_loaded = since(self.captured.take(), ended);
            }
            Step::ResumeVm => {
                let ended = self.resumed.take().unwrap_or(ended);
                self.report.pause = since(self.stopped.take(), ended);
            }
            _ => {}
        }
        let time = ended.saturating_duration_since(began);
        self.report.steps.push((step, time));
    }

    /// Notes when the VM was resumed, in the step that ends next.
    pub(crate) const fn resumed(&mut self, at: Instant) {
        self.resumed = Some(at);
    }

    /// RAM has crossed.
    pub(crate) const fn ram(&mut self, bytes: u64, dirty_pages: u64) {
        self.report.ram_bytes = bytes;
        self.report.dirty_pages = dirty_pages;
    }

    /// Pages have crossed by background transfer.
    pub(crate) const fn background(&mut self, pages: u64) {
        self.report.background_pages += pages;
    }

    /// Takes the numbers of pages compared and elided since COLO began.
    pub(crate) const fn elided(&mut self, compared: u64, unchanged: u64) {
        self.report.compared_pages = compared.saturating_sub(self.elided.0);
        self.report.unchanged_pages = unchanged.saturating_sub(self.elided.1);
        self.elided = (compared, unchanged);
    }

    /// RAM was copied while the VM stood still.
    pub(crate) const fn kept(&mut self, pages: u64) {
        self.report.frozen_pages = pages;
    }

    /// The cache was flushed.
    pub(crate) const fn flushed(&mut self, pages: u64) {
        self.report.flushed_pages = pages;
    }

    /// Device state has crossed.
    pub(crate) const fn devices(&mut self, bytes: u64) {
        self.report.device_bytes = bytes;
    }

    /// The report of the checkpoint that is complete now; the next begins. What came before the
    /// request (COLO's start, the wait for the checkpoint to become due) is left out.
    pub(crate) fn complete(&mut self) -> CheckpointReport {
        let number = self.report.number + 1;
        let mut report = std::mem::take(&mut self.report);
        let began = report
            .steps
            .iter()
            .position(|(step, _)| step.begins_checkpoint())
            .unwrap_or(0);
        report.steps.drain(..began);
        report.number = number;
        self.report.number = number;
        report
    }
}

fn since(begin: Option<Instant>, end: Instant) -> Duration {
    begin.map_or(Duration::ZERO, |begin| end.saturating_duration_since(begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_pause_lasts_from_the_stop_to_the_end_of_the_resume() {
        let start = Instant::now();
        let mut meter = CheckpointMeter::new();
        let due = Step::Await(Wait::CheckpointDue);
        let request = Step::Send(Message::CheckpointRequest);
        for _ in 0..2 {
            meter.step(Step::ResumeVm, start, start);
        }
        meter.step(due, start, start + 200 * MS);
        meter.step(request, start + 200 * MS, start + 201 * MS);
        meter.step(Step::PauseVm, start + 201 * MS, start + 202 * MS);
        let send = Step::Send(Message::VmstateSend);
        meter.step(send, start + 202 * MS, start + 202 * MS);
        meter.step(Step::SendRam, start + 202 * MS, start + 205 * MS);
        meter.ram(8192, 2);
        meter.elided(10, 4);
        meter.step(Step::SendDevices, start + 205 * MS, start + 206 * MS);
        meter.devices(100);
        let loaded = Step::Await(Wait::Message(Message::VmstateLoaded));
        meter.step(loaded, start + 206 * MS, start + 209 * MS);
        meter.step(Step::ResumeVm, start + 209 * MS, start + 210 * MS);
        let report = meter.complete();
        assert_eq!(report.number, 1);
        assert_eq!(report.pause, 9 * MS);
        assert_eq!((report.transfer, report.until_loaded), (4 * MS, 8 * MS));
        assert!(report.steps.contains(&(Step::SendRam, 3 * MS)));
        assert!(report.steps.iter().all(|(step, _)| *step != due));
        assert_eq!(report.steps.len(), 7);
        assert_eq!(
            (report.ram_bytes, report.dirty_pages, report.device_bytes),
            (8192, 2, 100)
        );
        assert_eq!((report.compared_pages, report.unchanged_pages), (10, 4));
        meter.elided(13, 5);
        let next = meter.complete();
        assert_eq!((next.number, next.ram_bytes), (2, 0));
        assert_eq!((next.compared_pages, next.unchanged_pages), (3, 1));
    }
}
