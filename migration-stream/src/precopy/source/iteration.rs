//! Rounds over guest memory while the guest runs, until what is left fits the downtime limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Acks, Control, Round, Source, SourceEvent, SourceObserver};
use crate::io::deadline_from;
use crate::precopy::error::SourceError;
use crate::precopy::ram::Budget;
use crate::precopy::watch::WATCH;
use crate::{DirtyLog, PAGE_SIZE, PageTransport};

/// A PART ends after this long, so that the log, the return path and cancellation are looked at.
const PART_TIME: Duration = Duration::from_millis(50);

impl<T: PageTransport, D: DirtyLog> Source<T, D> {
    pub(super) fn iterate(&mut self, observer: &mut dyn SourceObserver) -> Result<(), SourceError> {
        loop {
            let control = observer.progress(&self.progress());
            self.check_return_path()?;
            match control {
                Control::SwitchOver => self.asked = true,
                Control::Continue => {}
                Control::Cancel => return Err(SourceError::Cancelled),
            }
            if self.asked && self.is_acknowledged()? {
                return Ok(());
            }
            if self.ram.pending_pages() == 0 {
                self.next_round(observer)?;
                observer.event(SourceEvent::Pass(self.pass));
                let left = self.ram.pending_pages() * PAGE_SIZE;
                // Before the first measurement there is nothing to estimate with, but an idle guest
                // has nothing left to send either.
                if left == 0
                    || self
                        .bandwidth
                        .time_for(left)
                        .is_some_and(|t| t <= self.limits.downtime())
                {
                    if self.is_acknowledged()? {
                        return Ok(());
                    }
                    if left == 0 {
                        std::thread::sleep(WATCH);
                    }
                }
            }
            self.part(observer)?;
        }
    }

    pub(super) fn check_return_path(&mut self) -> Result<(), SourceError> {
        if let Some(return_path) = &mut self.return_path {
            return_path.check_progress()?;
        }
        self.check_surplus()
    }

    /// No more acknowledgements than devices that give one.
    fn check_surplus(&self) -> Result<(), SourceError> {
        match (&self.acks, &self.return_path) {
            (Some(Acks { expected, .. }), Some(return_path))
                if return_path.switchover_acks() > *expected =>
            {
                Err(SourceError::SurplusSwitchoverAck {
                    expected: *expected,
                })
            }
            _ => Ok(()),
        }
    }

    /// Whether the destination has taken the device sections before RAM.
    fn is_early_taken(&mut self) -> Result<bool, SourceError> {
        let (Some(early), Some(return_path)) = (&mut self.early, &self.return_path) else {
            return Ok(true);
        };
        if return_path.has_taken_early_sections() {
            self.early = None;
            return Ok(true);
        }
        let since = *early.waiting.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.config.confirm_timeout {
            return Err(SourceError::EarlySectionsUnanswered);
        }
        Ok(false)
    }

    /// Whether all that the switch-over waits for has come.
    fn is_acknowledged(&mut self) -> Result<bool, SourceError> {
        if !self.is_early_taken()? {
            return Ok(false);
        }
        let (Some(acks), Some(return_path)) = (&mut self.acks, &self.return_path) else {
            return Ok(true);
        };
        let missing = acks.expected.saturating_sub(return_path.switchover_acks());
        let since = *acks.waiting.get_or_insert_with(Instant::now);
        if missing > 0 && since.elapsed() >= self.config.confirm_timeout {
            let expected = acks.expected;
            return Err(SourceError::SwitchoverAckMissing { missing, expected });
        }
        Ok(missing == 0)
    }

    /// All that was known to be dirty has been sent: reads the log again.
    fn next_round(&mut self, observer: &mut dyn SourceObserver) -> Result<(), SourceError> {
        let dirtied = self.watched(observer, |ram, _| ram.sync_dirty())?;
        if let Some(throttling) = &mut self.throttling {
            throttling.synced(dirtied * PAGE_SIZE, self.ram.bytes(&self.out));
        }
        let elapsed = self.round.begun.elapsed().max(Duration::from_micros(1));
        self.dirty_pages_rate = (u128::from(dirtied) * 1_000_000 / elapsed.as_micros())
            .try_into()
            .unwrap_or(u64::MAX);
        self.pass += 1;
        self.round = Round {
            begun: Instant::now(),
            bytes: self.ram.bytes(&self.out),
            busy: Duration::ZERO,
        };
        Ok(())
    }

    fn part(&mut self, observer: &mut dyn SourceObserver) -> Result<(), SourceError> {
        let limiter = Arc::clone(self.limits.limiter());
        let (begun, idle) = (Instant::now(), limiter.idle());
        let budget = Budget {
            bytes: u64::MAX,
            until: deadline_from(begun, PART_TIME),
        };
        self.watched(observer, |ram, out| ram.part(out, budget))?;
        // The switch-over is not limited: what the limit takes says nothing about it.
        let idle = limiter.idle().saturating_sub(idle);
        self.round.busy += begun.elapsed().saturating_sub(idle);
        self.bandwidth.sample(
            self.ram.bytes(&self.out) - self.round.bytes,
            self.round.busy,
        );
        Ok(())
    }
}
