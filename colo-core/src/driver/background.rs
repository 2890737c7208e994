//! Background transfer: pages that are sent between two checkpoints.

use std::time::{Duration, Instant};

use migration_stream::io::deadline_from;
use migration_stream::raw::checkpoint::{Budget, RamSender};
use migration_stream::raw::rate::TokenBucket;
use migration_stream::{DirtyLog, PAGE_SIZE, PageTransport};

use super::{ColoControl, StepError};

/// Background transfer: pages are sent between checkpoints, so that fewer are left for the next one.
/// Multifd's channels carry them; without channels, nothing is sent between checkpoints.
///
/// A QEMU secondary (11.1) copies pages that it receives *during* its failover into the guest that goes on. Its
/// connections have to end before it is told `x-colo-lost-heartbeat`: by the end of the primary's
/// process, or by `yank` there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackgroundTransfer {
    bandwidth: u64,
    interval: Duration,
}

impl BackgroundTransfer {
    /// Limits the transfer to `bandwidth` bytes a second on the wire; 0 is no limit, and the default. A low
    /// limit leaves more pages for the checkpoint, and so lengthens the pause. It can be changed while
    /// COLO goes on: [`ColoControl::set_background_bandwidth`].
    #[must_use]
    pub const fn bandwidth(mut self, bandwidth: u64) -> Self {
        self.bandwidth = bandwidth;
        self
    }

    /// Reads the dirty log every `interval`; the default is 20 ms. Every reading makes the guest's next
    /// write to each page a little slower. A page that most of the last three readings report is left
    /// for the checkpoint.
    #[must_use]
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }
}

impl Default for BackgroundTransfer {
    /// No limit, every 20 ms.
    fn default() -> Self {
        Self {
            bandwidth: 0,
            interval: Duration::from_millis(20),
        }
    }
}

/// When the next round of pages is due.
#[derive(Debug)]
pub(super) struct Background {
    interval: Duration,
    next: Instant,
    /// What was sent, as it left, against the bandwidth.
    account: TokenBucket,
}

impl Background {
    /// Begins the background transfer; `None` if the transport has no channels for it.
    pub(super) fn begin<T: PageTransport, D: DirtyLog>(
        config: BackgroundTransfer,
        ram: &mut RamSender<T, D>,
        control: &ColoControl,
    ) -> Option<Self> {
        if !ram.begin_ahead() {
            tracing::info!("no background transfer: the transport has no channels");
            return None;
        }
        control.background_begins(config.bandwidth);
        Some(Self {
            interval: config.interval,
            next: Instant::now(),
            account: TokenBucket::new(config.bandwidth, Instant::now()).used_every(config.interval),
        })
    }

    /// When there is something to do.
    pub(super) const fn next(&self) -> Instant {
        self.next
    }

    /// Sends a round of pages if it is time for one. It ends when a checkpoint is `due`, or after
    /// what `bandwidth`, bytes a second, has room for; no channel blocks longer than until `deadline`.
    pub(super) fn send<T: PageTransport, D: DirtyLog>(
        &mut self,
        ram: &mut RamSender<T, D>,
        bandwidth: u64,
        due: Option<Instant>,
        deadline: Option<Instant>,
    ) -> Result<u64, StepError> {
        let now = Instant::now();
        if now < self.next {
            return Ok(0);
        }
        let end = deadline_from(now, self.interval);
        self.account.set_rate(now, bandwidth);
        let credit = self.account.credit(now);
        if credit < PAGE_SIZE {
            self.next = end;
            return Ok(0);
        }
        let before = ram.counters().channel_bytes;
        let budget = Budget {
            bytes: credit,
            until: due.map_or(end, |due| due.min(end)),
        };
        ram.set_deadline(deadline);
        let pages = ram.send_ahead(budget)?;
        // All of it has been written: headers and compression are in it.
        let sent = ram.counters().channel_bytes.saturating_sub(before);
        self.account.spend(Instant::now(), sent);
        // The guest has the time between rounds, however long they take.
        self.next = Instant::now().max(end);
        Ok(pages)
    }
}
