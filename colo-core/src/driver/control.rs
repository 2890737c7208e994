//! Requests of other threads to a running driver.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::wake::Wake;
use crate::cause::Role;
use crate::failover::{FailoverHandle, FailoverSlot};
use crate::message::Message;
use crate::schedule::Schedule;
use crate::step::Step;

/// A handle on one side's COLO, for other threads: the operator's, a packet comparer's, the VM's own end. Clones are
/// the same handle.
#[derive(Clone)]
pub struct ColoControl {
    inner: Arc<Inner>,
}

struct Inner {
    role: Role,
    failover: FailoverSlot,
    schedule: Mutex<Schedule>,
    quit: AtomicBool,
    background: Mutex<BackgroundCap>,
    /// Wakes a wait that is not for the peer.
    wake: Wake,
    disconnect: Box<dyn Fn() + Send + Sync>,
}

/// How often requests are looked for where nothing can wake the driver.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// The most that is sent between checkpoints, bytes a second.
#[derive(Debug, Default)]
struct BackgroundCap {
    /// What the driver was told; `None` as long as it sends none.
    configured: Option<u64>,
    /// What was asked for since the control was made.
    asked: Option<u64>,
}

impl ColoControl {
    /// Returns a control for `role`. `disconnect` shuts every connection to the peer. It is called from any thread,
    /// more than once.
    ///
    /// On a primary the first checkpoint is due `delay` from now. A secondary ignores `delay`: its waits for the
    /// primary are limited by [`Deadlines`](crate::Deadlines).
    ///
    /// `failover` enters COLO here: the driver sees every request from now on. It leaves COLO when the driver ends,
    /// or when the last clone of the control is dropped without a driver. Make the control right before the driver
    /// is called: the migration has switched over and the VM is paused.
    ///
    /// # Errors
    /// No pipe could be made.
    pub fn new(
        role: Role,
        failover: FailoverHandle,
        delay: Duration,
        disconnect: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let wake = Wake::new()?;
        let inner = Arc::new_cyclic(|weak: &Weak<Inner>| {
            let weak = Weak::clone(weak);
            // A request before this control is whole wakes nobody: the driver looks for requests when it
            // begins.
            let kick = move || {
                if let Some(inner) = weak.upgrade() {
                    (inner.disconnect)();
                    inner.wake.wake();
                }
            };
            Inner {
                role,
                failover: FailoverSlot::enter(&failover, role, kick),
                schedule: Mutex::new(Schedule::new(delay, Instant::now())),
                quit: AtomicBool::new(false),
                background: Mutex::default(),
                wake,
                disconnect: Box::new(disconnect),
            }
        });
        Ok(Self { inner })
    }

    /// Which side this is.
    pub(super) fn role(&self) -> Role {
        self.inner.role
    }

    /// Returns the operator's handle, with which this control has entered COLO.
    #[must_use]
    pub fn failover(&self) -> &FailoverHandle {
        self.inner.failover.handle()
    }

    /// The driver's side of it.
    pub(super) fn slot(&self) -> &FailoverSlot {
        &self.inner.failover
    }

    /// Ends COLO for a VM that ends. The VM stays paused.
    pub fn quit(&self) {
        self.inner.quit.store(true, Ordering::Release);
        (self.inner.disconnect)();
        self.inner.wake.wake();
    }

    /// Changes `x-checkpoint-delay`, and takes a checkpoint at once.
    pub fn set_checkpoint_delay(&self, delay: Duration) {
        self.schedule().set_delay(delay);
        self.inner.wake.wake();
    }

    /// Asks for a checkpoint at once, as when the outputs of the two sides differ.
    pub fn demand_checkpoint(&self) {
        self.schedule().demand();
        self.inner.wake.wake();
    }

    /// Primary: limits the background transfer to `bandwidth` bytes a second, 0 for no limit, from its next
    /// round on ([`BackgroundTransfer`](super::BackgroundTransfer)). Without effect where there is none.
    pub fn set_background_bandwidth(&self, bandwidth: u64) {
        self.background().asked = Some(bandwidth);
    }

    /// Returns a primary's limit of the background transfer, bytes a second, 0 for no limit. `None` where there is
    /// no such transfer: the driver was not told to, the transport has no channels for it, COLO has not
    /// begun, or this is a secondary.
    #[must_use]
    pub fn background_bandwidth(&self) -> Option<u64> {
        let cap = self.background();
        cap.configured
            .map(|configured| cap.asked.unwrap_or(configured))
    }

    /// Pages are sent between checkpoints from now on, at most `bandwidth` unless something else was asked for.
    pub(super) fn background_begins(&self, bandwidth: u64) {
        self.background().configured = Some(bandwidth);
    }

    /// Two numbers, whole at every moment.
    fn background(&self) -> MutexGuard<'_, BackgroundCap> {
        self.inner
            .background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts every connection to the peer.
    pub(super) fn disconnect(&self) {
        (self.inner.disconnect)();
    }

    /// Whether the VM is to end: it was told to, or this side was stopped for good.
    pub(super) fn take_quit(&self) -> bool {
        let quit = self.inner.quit.swap(false, Ordering::AcqRel);
        self.inner.failover.take_stop() || quit
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
            Step::PauseVm => self.schedule().captured(),
            Step::ReportCheckpoint => self.schedule().complete(now),
            _ => {}
        }
    }

    /// Blocks until somebody asks for something, or returns for no reason.
    pub(super) fn wait_for_request(&self) {
        if let Err(error) = self.inner.wake.wait() {
            // A pipe whose both ends are ours does not fail. A decision must be waited for all the
            // same: requests are looked for now and then.
            tracing::error!(%error, "the pipe that wakes the driver");
            thread::sleep(BETWEEN_LOOKS);
        }
    }

    /// Readable when somebody asks for something, to be followed by [`Self::drain`].
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.inner.wake.fd()
    }

    /// Takes the byte that made [`Self::wake_fd`] readable.
    pub(super) fn drain(&self) -> io::Result<()> {
        self.inner.wake.wait()
    }

    /// The schedule is plain values, whole at every moment: a thread that panicked does not spoil it.
    fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.inner
            .schedule
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
