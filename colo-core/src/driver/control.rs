//! What other threads may ask of a running driver.

use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cause::Role;
use crate::message::Message;
use crate::step::Step;
use crate::{FailoverHandle, Schedule};

/// A handle on one side's COLO, for the threads that serve the operator, the packet comparer, the
/// VM's own end. Clones are the same handle.
#[derive(Clone)]
pub struct ColoControl {
    inner: Arc<Inner>,
}

struct Inner {
    role: Role,
    failover: FailoverHandle,
    schedule: Mutex<Schedule>,
    quit: AtomicBool,
    gap: Mutex<GapCap>,
    /// Wakes a wait that is not for the peer. A byte at a time, so that it never fills.
    wake: Mutex<PipeWriter>,
    woken: PipeReader,
    signalled: AtomicBool,
    disconnect: Box<dyn Fn() + Send + Sync>,
}

/// The most that is sent between checkpoints, bytes a second.
#[derive(Debug, Default)]
struct GapCap {
    /// What the driver was told; `None` as long as it sends none.
    configured: Option<u64>,
    /// What was asked for since the control was made.
    asked: Option<u64>,
}

impl ColoControl {
    /// A control for `role`, whose first checkpoint is due `delay` from now. `disconnect` shuts
    /// every connection to the peer; it is called from any thread.
    ///
    /// `failover` enters COLO here: a request made from now on is seen by the driver.
    ///
    /// # Errors
    /// No pipe could be made.
    pub fn new(
        role: Role,
        failover: FailoverHandle,
        delay: Duration,
        disconnect: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (woken, wake) = io::pipe()?;
        let inner = Arc::new(Inner {
            role,
            failover,
            schedule: Mutex::new(Schedule::new(delay, Instant::now())),
            quit: AtomicBool::new(false),
            gap: Mutex::default(),
            wake: Mutex::new(wake),
            woken,
            signalled: AtomicBool::new(false),
            disconnect: Box::new(disconnect),
        });
        let weak = Arc::downgrade(&inner);
        inner.failover.enter(role, move || {
            if let Some(inner) = weak.upgrade() {
                (inner.disconnect)();
                inner.wake();
            }
        });
        Ok(Self { inner })
    }

    /// Which side this is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.inner.role
    }

    /// The failover request and status.
    #[must_use]
    pub fn failover(&self) -> &FailoverHandle {
        &self.inner.failover
    }

    /// The VM ends: leave COLO, and leave the VM stopped.
    pub fn quit(&self) {
        self.inner.quit.store(true, Ordering::Release);
        (self.inner.disconnect)();
        self.inner.wake();
    }

    /// Changes `x-checkpoint-delay`, and takes a checkpoint at once.
    pub fn set_checkpoint_delay(&self, delay: Duration) {
        self.schedule().set_delay(delay);
        self.inner.wake();
    }

    /// Asks for a checkpoint: the outputs of the two sides differ.
    pub fn demand_checkpoint(&self) {
        self.schedule().demand();
        self.inner.wake();
    }

    /// Primary: changes how much is sent between checkpoints at most, bytes a second, 0 for no limit
    /// ([`GapConfig::bandwidth`](super::GapConfig::bandwidth)): from the next round of pages on, of which one is
    /// due at every [`GapConfig::interval`](super::GapConfig::interval). Without effect where none are sent.
    pub fn set_gap_bandwidth(&self, bandwidth: u64) {
        self.gap().asked = Some(bandwidth);
    }

    /// Primary: how much is sent between checkpoints at most, bytes a second, 0 for no limit. `None` where no
    /// pages are: the driver was not told to, the transport has no channels for them, COLO has not begun.
    #[must_use]
    pub fn gap_bandwidth(&self) -> Option<u64> {
        let gap = self.gap();
        gap.configured
            .map(|configured| gap.asked.unwrap_or(configured))
    }

    /// Pages are sent between checkpoints from now on, at most `bandwidth` unless something else was asked for.
    pub(super) fn gap_begins(&self, bandwidth: u64) {
        self.gap().configured = Some(bandwidth);
    }

    /// Two numbers, whole at every moment.
    fn gap(&self) -> MutexGuard<'_, GapCap> {
        self.inner
            .gap
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts every connection to the peer.
    pub(super) fn disconnect(&self) {
        (self.inner.disconnect)();
    }

    pub(super) fn take_quit(&self) -> bool {
        self.inner.quit.swap(false, Ordering::AcqRel)
    }

    /// When the next checkpoint is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.schedule().next_due()
    }

    /// Keeps the schedule informed.
    pub(super) fn step_begins(&self, step: Step, now: Instant) {
        if step == Step::Send(Message::CheckpointRequest) {
            self.schedule().begin(now);
        }
    }

    pub(super) fn step_ended(&self, step: Step, now: Instant) {
        match step {
            Step::StopVm => self.schedule().captured(),
            Step::ReportCheckpoint => self.schedule().complete(now),
            _ => {}
        }
    }

    /// Blocks until somebody asks for something.
    pub(super) fn wait_for_request(&self) -> io::Result<()> {
        (&self.inner.woken).read_exact(&mut [0])?;
        self.inner.signalled.store(false, Ordering::Release);
        Ok(())
    }

    /// Readable when somebody asks for something, to be followed by [`Self::drain`].
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.inner.woken.as_fd()
    }

    /// Takes the byte that made [`Self::wake_fd`] readable.
    pub(super) fn drain(&self) -> io::Result<()> {
        self.wait_for_request()
    }

    /// The schedule is plain values, whole at every moment: a thread that panicked does not spoil it.
    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.inner
            .schedule
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn wake(&self) {
        if !self.signalled.swap(true, Ordering::AcqRel) {
            let mut wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
            // The reader lives as long as the writer: this cannot fail but by a signal, and then
            // the next request wakes.
            if wake.write_all(&[1]).is_err() {
                self.signalled.store(false, Ordering::Release);
            }
        }
    }
}

impl fmt::Debug for ColoControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ColoControl")
            .field("role", &self.inner.role)
            .field("failover", &self.inner.failover)
            .finish_non_exhaustive()
    }
}
