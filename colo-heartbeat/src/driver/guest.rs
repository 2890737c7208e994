//! The heartbeat's hold on the guest.

use crate::decision::StopReason;

/// The guest, as the heartbeat stops and suspends it.
pub trait Guest: Send + Sync {
    /// Stops the guest for good: neither COLO nor an operator may resume it. Returns when the guest is stopped.
    /// Called at most once, in the heartbeat's thread. The heartbeat itself ends a driver of COLO that runs.
    fn stop_for_good(&self, reason: StopReason);

    /// Suspends the guest until [`Guest::resume`] or [`Guest::stop_for_good`]: neither COLO nor an operator may
    /// resume it meanwhile, and neither is told. Returns when the guest is paused.
    fn suspend(&self);

    /// Ends [`Guest::suspend`]: the guest runs, unless something else has paused it.
    fn resume(&self);
}
