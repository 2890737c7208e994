//! How long a wait goes on: until a deadline, or while somebody makes progress.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration_stream::io::{CancelToken, deadline_after, deadline_from};

/// The end of one wait.
#[derive(Debug)]
pub(crate) struct Patience {
    deadline: Option<Instant>,
    limit: Duration,
    progress: u64,
    until: Instant,
    cancel: Option<CancelToken>,
}

/// How often a wait that can be cancelled looks whether it was.
const LOOK: Duration = Duration::from_millis(20);

impl Patience {
    /// A wait until `deadline`, or without one until `progress` has not changed for `limit`.
    pub(crate) fn new(deadline: Option<Instant>, limit: Duration, progress: u64) -> Self {
        let until = deadline.unwrap_or_else(|| deadline_after(limit));
        Self {
            deadline,
            limit,
            progress,
            until,
            cancel: None,
        }
    }

    /// The same wait, whose time is also over when `token` was cancelled.
    pub(crate) fn until_cancelled(self, token: Option<&CancelToken>) -> Self {
        let cancel = token.cloned();
        Self { cancel, ..self }
    }

    /// Waits on `changed`; false when the time is over. It can wake without a reason.
    pub(crate) fn wait<'a, T>(
        &mut self,
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
        progress: impl Fn(&T) -> u64,
    ) -> (MutexGuard<'a, T>, bool) {
        let progress = progress(&guard);
        let now = Instant::now();
        if self.deadline.is_none() && progress != self.progress {
            self.progress = progress;
            self.until = deadline_from(now, self.limit);
        }
        let Some(left) = self
            .until
            .checked_duration_since(now)
            .filter(|d| !d.is_zero())
        else {
            return (guard, false);
        };
        let left = match &self.cancel {
            Some(token) if token.is_cancelled() => return (guard, false),
            Some(_) => left.min(LOOK),
            None => left,
        };
        let (guard, _) = changed
            .wait_timeout(guard, left)
            .unwrap_or_else(PoisonError::into_inner);
        (guard, true)
    }
}

/// Locks `mutex`. What it protects stays consistent across a panic: every change is one assignment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
