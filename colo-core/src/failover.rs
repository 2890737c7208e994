//! Failover of one side: the operator's handle, and the driver's slot.
//!
//! ```text
//!   request()        take_request()        exited(reason)        leave()
//! none -> requested -------------> active ---------------> ... -------> none, last-mode is set
//! ```
//! A request is stored before the driver is woken and its connections are shut, and the driver asks
//! for requests before it looks at how a step ended. So a connection that broke because of a
//! request is never taken for the reason of the end. (In QEMU the two race, and COLO_EXIT may say
//! `error` after a request.)

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cause::{ExitReason, Role};

/// `mode` and `last-mode` of `query-colo-status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ColoMode {
    /// Not in COLO.
    #[default]
    None,
    /// In COLO as the primary.
    Primary,
    /// In COLO as the secondary.
    Secondary,
}

impl From<Role> for ColoMode {
    fn from(role: Role) -> Self {
        match role {
            Role::Primary => Self::Primary,
            Role::Secondary => Self::Secondary,
        }
    }
}

/// `reason` of `query-colo-status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StatusReason {
    /// COLO has not ended, or never began.
    #[default]
    None,
    /// It has ended by request.
    Request,
    /// It has failed: it has ended, or waits for a decision.
    Error,
    /// A failover is under way.
    Processing,
}

/// The answer to `query-colo-status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ColoStatus {
    /// The side this is now.
    pub mode: ColoMode,
    /// The side this was when COLO last ended.
    pub last_mode: ColoMode,
    /// Why it ended.
    pub reason: StatusReason,
}

/// Why a failover request was refused. The texts are those of QMP replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The VM is not in COLO.
    #[error("VM is not in COLO mode")]
    NotInColo,
    /// A request is being carried out.
    #[error("COLO failover is already activated")]
    AlreadyActive,
    /// The VM of this side must not run: a checkpoint's install broke off half way, or it could not
    /// be resumed.
    #[error("this VM is in no state to run")]
    Unfit,
    /// This side was stopped for good, because the other side owns the guest, or may own it.
    #[error("this VM was stopped for good: the other side goes on, or may")]
    Stopped,
}

/// An operator's handle on one VM's failover. Clones are the same handle.
///
/// The VMM keeps one for the life of its VM. [`ColoControl::new`](crate::driver::ColoControl::new) takes a
/// clone and enters COLO with it. No call here can end a session's bookkeeping: only the driver can.
#[derive(Clone, Default)]
pub struct FailoverHandle {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    mode: ColoMode,
    last_mode: ColoMode,
    progress: Progress,
    exit: Option<ExitReason>,
    kick: Option<Kick>,
    /// Counts the times that COLO began.
    session: u64,
    /// This side's VM can never run again.
    unfit: bool,
    stop: Stop,
}

type Kick = Arc<dyn Fn() + Send + Sync>;

/// Whether this side was stopped for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stop {
    #[default]
    No,
    /// It was, and the driver has yet to be told.
    Untold,
    Told,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    None,
    Requested,
    Active,
}

impl FailoverHandle {
    /// Returns a handle of a VM that is not in COLO.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks this side to go on alone: QMP `x-colo-lost-heartbeat`. Returns at once; the end is
    /// reported by COLO_EXIT. The caller has made sure that the other side's VM does not run.
    ///
    /// # Errors
    /// Outside COLO, a request is being carried out already, or this side's VM cannot go on.
    pub fn request(&self) -> Result<(), RequestError> {
        let kick = {
            let mut shared = self.lock();
            if shared.stop != Stop::No {
                return Err(RequestError::Stopped);
            }
            if shared.unfit {
                return Err(RequestError::Unfit);
            }
            if shared.mode == ColoMode::None {
                return Err(RequestError::NotInColo);
            }
            if shared.progress != Progress::None {
                return Err(RequestError::AlreadyActive);
            }
            shared.progress = Progress::Requested;
            shared.kick.clone()
        };
        // Outside the lock, so that the hook may use the handle.
        if let Some(kick) = kick {
            kick();
        }
        Ok(())
    }

    /// Tells that this side's VM was stopped and never runs again. A running driver ends, as by
    /// [`ColoControl::quit`](crate::driver::ColoControl::quit), and so does a later one. Every later request is refused. A `colo_heartbeat::Heartbeat` calls this when it has
    /// stopped the guest.
    pub fn stop_for_good(&self) {
        let kick = {
            let mut shared = self.lock();
            if shared.stop != Stop::No {
                return;
            }
            shared.stop = Stop::Untold;
            shared.kick.clone()
        };
        if let Some(kick) = kick {
            kick();
        }
    }

    /// The answer to `query-colo-status`.
    #[must_use]
    pub fn status(&self) -> ColoStatus {
        let shared = self.lock();
        let reason = match (shared.exit, shared.progress) {
            _ if shared.mode != ColoMode::None && shared.progress != Progress::None => {
                StatusReason::Processing
            }
            (Some(ExitReason::Request), _) => StatusReason::Request,
            (Some(ExitReason::Error), _) => StatusReason::Error,
            (None, _) => StatusReason::None,
        };
        ColoStatus {
            mode: shared.mode,
            last_mode: shared.last_mode,
            reason,
        }
    }

    /// The state is plain values, whole at every moment: a thread that panicked with the lock does
    /// not spoil it.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The driver's side of a [`FailoverHandle`], from the moment at which COLO begins.
///
/// There is one for each session of COLO. It leaves COLO when it is dropped. Once another session has
/// begun on the same handle, nothing that is called here has an effect.
pub struct FailoverSlot {
    handle: FailoverHandle,
    session: u64,
}

impl FailoverSlot {
    /// Enters COLO on `handle`.
    ///
    /// `kick` is called once for a request, in the requester's thread, after the request was stored, and
    /// once for [`FailoverHandle::stop_for_good`]. It must end every call in which the driver may block: shut the
    /// connections, wake a wait.
    pub fn enter(
        handle: &FailoverHandle,
        role: Role,
        kick: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let mut shared = handle.lock();
        shared.mode = role.into();
        shared.progress = Progress::None;
        shared.exit = None;
        shared.unfit = false;
        if shared.stop != Stop::No {
            shared.stop = Stop::Untold;
        }
        shared.session += 1;
        let before = shared.kick.replace(Arc::new(kick));
        let session = shared.session;
        drop(shared);
        // What the hook owns may use the handle when it is dropped.
        drop(before);
        Self {
            handle: handle.clone(),
            session,
        }
    }

    /// Returns the operator's handle.
    #[must_use]
    pub const fn handle(&self) -> &FailoverHandle {
        &self.handle
    }

    /// Returns whether this side was stopped for good. True once in a session.
    #[must_use]
    pub fn take_stop(&self) -> bool {
        let Some(mut shared) = self.lock() else {
            return false;
        };
        let untold = shared.stop == Stop::Untold;
        if untold {
            shared.stop = Stop::Told;
        }
        untold
    }

    /// Tells that this side's VM must never run again. Requests are refused from now on.
    pub fn unfit(&self) {
        if let Some(mut shared) = self.lock() {
            shared.unfit = true;
        }
    }

    /// Returns whether there was a request since COLO began. True once. Call it when an action has ended, before
    /// its event is handed to the machine.
    #[must_use]
    pub fn take_request(&self) -> bool {
        let Some(mut shared) = self.lock() else {
            return false;
        };
        let requested = shared.progress == Progress::Requested;
        if requested {
            shared.progress = Progress::Active;
        }
        requested
    }

    /// Tells that COLO_EXIT was reported. The mode stays until [`FailoverSlot::leave`]: a wait for a decision may
    /// follow.
    pub fn exited(&self, reason: ExitReason) {
        if let Some(mut shared) = self.lock() {
            shared.exit = Some(reason);
        }
    }

    /// Leaves COLO: the machine is at its end. Without effect if this session has left.
    pub fn leave(&self) {
        let Some(mut shared) = self.lock() else {
            return;
        };
        if shared.progress == Progress::Active && !shared.unfit {
            // Whatever COLO_EXIT said, who goes on was somebody's decision (as in QEMU).
            shared.exit = Some(ExitReason::Request);
        }
        shared.last_mode = shared.mode;
        shared.mode = ColoMode::None;
        shared.progress = Progress::None;
        let kick = shared.kick.take();
        drop(shared);
        // What the hook owns may use the handle when it is dropped.
        drop(kick);
    }

    /// The handle's state, as long as this session lasts.
    fn lock(&self) -> Option<MutexGuard<'_, Shared>> {
        let shared = self.handle.lock();
        (shared.session == self.session && shared.mode != ColoMode::None).then_some(shared)
    }
}

impl Drop for FailoverSlot {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for FailoverSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailoverSlot")
            .field("handle", &self.handle)
            .field("session", &self.session)
            .finish()
    }
}

impl fmt::Debug for FailoverHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = self.lock();
        f.debug_struct("FailoverHandle")
            .field("mode", &shared.mode)
            .field("last_mode", &shared.last_mode)
            .field("progress", &shared.progress)
            .field("exit", &shared.exit)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn enter(handle: &FailoverHandle, role: Role) -> FailoverSlot {
        FailoverSlot::enter(handle, role, || {})
    }

    #[test]
    fn a_request_outside_colo_is_refused() {
        let handle = FailoverHandle::new();
        let refused = handle.request().unwrap_err();
        assert_eq!(refused.to_string(), "VM is not in COLO mode");
        assert_eq!(handle.status(), ColoStatus::default());
        let slot = enter(&handle, Role::Primary);
        slot.leave();
        assert_eq!(handle.request(), Err(RequestError::NotInColo));
    }

    #[test]
    fn a_request_is_stored_before_the_driver_is_woken_and_taken_once() {
        let handle = FailoverHandle::new();
        let kicks = Arc::new(AtomicUsize::new(0));
        let (seen, in_hook) = (kicks.clone(), handle.clone());
        let slot = FailoverSlot::enter(&handle, Role::Secondary, move || {
            assert_eq!(in_hook.status().reason, StatusReason::Processing);
            seen.fetch_add(1, Ordering::Relaxed);
        });
        handle.request().unwrap();
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
        assert!(slot.take_request());
        assert!(!slot.take_request());
        let refused = handle.request().unwrap_err();
        assert_eq!(refused.to_string(), "COLO failover is already activated");
    }

    #[test]
    fn the_status_follows_a_failover() {
        let handle = FailoverHandle::new();
        let status = |mode, last_mode, reason| ColoStatus {
            mode,
            last_mode,
            reason,
        };
        let slot = enter(&handle, Role::Secondary);
        let in_colo = status(ColoMode::Secondary, ColoMode::None, StatusReason::None);
        assert_eq!(handle.status(), in_colo);
        slot.exited(ExitReason::Error);
        let undecided = status(ColoMode::Secondary, ColoMode::None, StatusReason::Error);
        assert_eq!(handle.status(), undecided);
        handle.request().unwrap();
        let under_way = status(
            ColoMode::Secondary,
            ColoMode::None,
            StatusReason::Processing,
        );
        assert_eq!(handle.status(), under_way);
        assert!(slot.take_request());
        slot.leave();
        let over = status(ColoMode::None, ColoMode::Secondary, StatusReason::Request);
        assert_eq!(handle.status(), over);
    }

    #[test]
    fn a_session_that_is_over_does_not_end_the_next() {
        let handle = FailoverHandle::new();
        let first = enter(&handle, Role::Secondary);
        let second = enter(&handle, Role::Primary);
        handle.request().unwrap();
        handle.stop_for_good();
        assert!(!first.take_request() && !first.take_stop());
        first.exited(ExitReason::Error);
        first.unfit();
        first.leave();
        drop(first);
        let status = handle.status();
        assert_eq!(status.mode, ColoMode::Primary);
        assert_eq!(status.reason, StatusReason::Processing);
        assert!(second.take_request() && second.take_stop());
        drop(second);
        assert_eq!(handle.status().mode, ColoMode::None);
    }

    #[test]
    fn a_side_that_cannot_run_refuses_every_request_and_says_why() {
        let handle = FailoverHandle::new();
        let slot = enter(&handle, Role::Secondary);
        handle.request().unwrap();
        assert!(slot.take_request());
        slot.exited(ExitReason::Error);
        slot.unfit();
        assert_eq!(handle.request(), Err(RequestError::Unfit));
        slot.leave();
        assert_eq!(handle.request(), Err(RequestError::Unfit));
        // The request has decided nothing.
        assert_eq!(handle.status().reason, StatusReason::Error);
        let _slot = enter(&handle, Role::Secondary);
        handle.request().unwrap();
    }

    #[test]
    fn a_side_that_is_stopped_for_good_says_so_to_each_driver_once_and_refuses_requests() {
        let handle = FailoverHandle::new();
        let kicks = Arc::new(AtomicUsize::new(0));
        let seen = kicks.clone();
        let slot = FailoverSlot::enter(&handle, Role::Primary, move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert!(!slot.take_stop());
        handle.stop_for_good();
        handle.stop_for_good();
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
        assert!(slot.take_stop());
        assert!(!slot.take_stop());
        let refused = handle.request().unwrap_err();
        assert_eq!(refused, RequestError::Stopped);
        slot.leave();
        let slot = enter(&handle, Role::Primary);
        assert!(slot.take_stop());
    }

    #[test]
    fn of_many_requests_at_once_one_is_accepted() {
        let handle = FailoverHandle::new();
        let slot = enter(&handle, Role::Primary);
        let accepted = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| handle.request().is_ok()))
                .collect();
            threads
                .into_iter()
                .map(|thread| usize::from(thread.join().unwrap()))
                .sum::<usize>()
        });
        assert_eq!(accepted, 1);
        assert!(slot.take_request());
    }
}
