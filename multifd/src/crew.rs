//! The threads of a set of channels: they share one state, the first error ends them all, and they
//! can be waited for without hanging.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration_stream::io::deadline_after;

use crate::error::{ChannelError, Failure};
use crate::patience::{Patience, lock};

/// How long a channel's error is waited for when the main stream has failed.
const REPORT: Duration = Duration::from_millis(100);

/// What the thread that owns a set and the channels' threads have in common.
pub(crate) struct Crew<T> {
    state: Mutex<State<T>>,
    /// Something changed that the owner of the set may be waiting for.
    pub(crate) for_owner: Condvar,
    /// Something changed that a channel may be waiting for.
    pub(crate) for_channels: Condvar,
    /// Emptied when the threads are gone, so that no handle keeps a socket open.
    closers: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
    /// Set when the set can do no more, to be asked without the lock.
    over: AtomicBool,
    /// How long anything may wait without progress.
    pub(crate) limit: Duration,
}

/// The state of a set: what is common to both directions, and `T` for the rest.
#[derive(Debug)]
pub(crate) struct State<T> {
    inner: T,
    failure: Option<Failure>,
    /// The first error is being told, and is not to be seen before that is done.
    telling: bool,
    closing: bool,
    running: usize,
    /// Counts what the channels got done.
    pub(crate) progress: u64,
}

impl<T> State<T> {
    /// Why the set can do no more.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match &self.failure {
            Some(failure) => Err(failure.clone()),
            None if self.closing => Err(Failure {
                channel: None,
                error: ChannelError::Closed,
            }),
            None => Ok(()),
        }
    }

    /// The first error, none if the set was only closed.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.failure.clone()
    }

    /// Whether the channels are to end, for whatever reason.
    pub(crate) fn is_over(&self) -> bool {
        self.closing || self.telling || self.failure.is_some()
    }
}

impl<T> Deref for State<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for State<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> Crew<T> {
    pub(crate) fn new(
        inner: T,
        closers: Vec<Box<dyn Fn() + Send + Sync>>,
        limit: Duration,
    ) -> Self {
        let state = State {
            inner,
            failure: None,
            telling: false,
            closing: false,
            running: 0,
            progress: 0,
        };
        Self {
            state: Mutex::new(state),
            for_owner: Condvar::new(),
            for_channels: Condvar::new(),
            closers: Mutex::new(closers),
            over: AtomicBool::new(false),
            limit,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State<T>> {
        lock(&self.state)
    }

    /// Why the set can do no more; cheap while it can.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.over.load(Ordering::Relaxed) {
            return self.lock().check();
        }
        Ok(())
    }

    /// How long the owner waits: until `deadline`, or while there is progress. Without a deadline it
    /// has more patience than a channel whose peer does nothing, which may have begun to wait later
    /// and whose error says more.
    pub(crate) fn patience(&self, deadline: Option<Instant>, state: &State<T>) -> Patience {
        Patience::new(
            deadline,
            self.limit.saturating_add(self.limit / 2),
            state.progress,
        )
    }

    /// Records the error if it is the first, and ends all channels.
    pub(crate) fn fail(&self, channel: Option<u8>, error: ChannelError) {
        self.fail_and_tell(Failure { channel, error }, |_| {});
    }

    /// As [`Crew::fail`], and tells of the error when the channels are shut and before whoever waits
    /// for them can see it: what is known of it is known to all who act on it.
    fn fail_and_tell(&self, failure: Failure, tell: impl FnOnce(&Failure)) {
        let mut state = self.lock();
        if state.is_over() {
            return;
        }
        state.telling = true;
        drop(state);
        let told = Told(self, Some(failure));
        self.shut();
        if let Some(failure) = &told.1 {
            tell(failure);
        }
    }

    /// Records the owner's error, and returns the first one: a channel may have been faster, and then
    /// knows better what happened.
    pub(crate) fn give_up(&self, channel: Option<u8>, error: ChannelError) -> Failure {
        self.fail(channel, error.clone());
        let mut state = self.lock();
        let mut patience = self.patience(None, &state);
        let mut in_time = true;
        while state.telling && in_time {
            (state, in_time) = patience.wait(&self.for_owner, state, |s| s.progress);
        }
        state.failure().unwrap_or(Failure { channel, error })
    }

    /// The first error of the set, none if this side ended it. Waits at most [`REPORT`] for an error
    /// that is being told, and while `may_report` says that a channel may be about to fail.
    pub(crate) fn first_failure(&self, may_report: impl Fn(&T) -> bool) -> Option<Failure> {
        let mut state = self.lock();
        let deadline = Some(deadline_after(REPORT));
        let mut patience = self.patience(deadline, &state);
        let mut in_time = true;
        while in_time && state.failure.is_none() && (state.telling || may_report(&state.inner)) {
            (state, in_time) = patience.wait(&self.for_owner, state, |s| s.progress);
        }
        // That this side ended the set is no cause.
        let own = |failure: &Failure| matches!(failure.error, ChannelError::Closed);
        state.failure().filter(|failure| !own(failure))
    }

    /// Ends all channels; what they report from now on is of no interest.
    fn close(&self) {
        self.lock().closing = true;
        self.shut();
    }

    fn shut(&self) {
        // Relaxed: who sees it takes the lock to learn the reason.
        self.over.store(true, Ordering::Relaxed);
        for close in lock(&self.closers).iter() {
            close();
        }
        self.for_channels.notify_all();
        self.for_owner.notify_all();
    }
}

/// Lets an error be seen that was told, also if who was told panicked.
struct Told<'a, T>(&'a Crew<T>, Option<Failure>);

impl<T> Drop for Told<'_, T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.telling = false;
        state.failure = self.1.take();
        drop(state);
        self.0.for_channels.notify_all();
        self.0.for_owner.notify_all();
    }
}

impl<T> fmt::Debug for Crew<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew")
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

/// Ends a set of channels from any thread: for a cancelled migration, a failover, a yank.
#[derive(Clone)]
pub struct AbortHandle(Arc<dyn Abort>);

impl AbortHandle {
    pub(crate) fn new<T: Send + 'static>(crew: &Arc<Crew<T>>) -> Self {
        Self(Arc::clone(crew) as Arc<dyn Abort>)
    }

    /// Shuts all channels. Whoever waits for them gets [`ChannelError::Closed`], unless something
    /// else went wrong before. Calling it twice, or after the set is gone, does nothing.
    pub fn abort(&self) {
        self.0.abort();
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").finish_non_exhaustive()
    }
}

trait Abort: Send + Sync {
    fn abort(&self);
}

impl<T: Send> Abort for Crew<T> {
    fn abort(&self) {
        self.fail(None, ChannelError::Closed);
    }
}

/// The running threads of a set. Dropping it shuts the channels and waits for the threads.
#[derive(Debug)]
pub(crate) struct Threads<T> {
    crew: Arc<Crew<T>>,
    handles: Vec<(u8, JoinHandle<()>)>,
}

impl<T: Send + 'static> Threads<T> {
    pub(crate) fn new(crew: Arc<Crew<T>>) -> Self {
        Self {
            crew,
            handles: Vec::new(),
        }
    }

    /// Starts the thread of `channel`. What `run` returns as an error ends the set.
    pub(crate) fn spawn(
        &mut self,
        name: String,
        channel: u8,
        run: impl FnOnce() -> Result<(), ChannelError> + Send + 'static,
        on_failure: impl FnOnce(&Failure) + Send + 'static,
    ) -> Result<(), Failure> {
        self.crew.lock().running += 1;
        let mut presence = Presence {
            crew: Arc::clone(&self.crew),
            channel,
            on_failure: Some(on_failure),
        };
        let handle = thread::Builder::new()
            .name(name)
            .spawn(move || {
                if let Err(error) = run() {
                    presence.fail(error);
                }
            })
            .map_err(|e| Failure {
                channel: Some(channel),
                error: ChannelError::Spawn {
                    source: Arc::new(e),
                },
            })?;
        self.handles.push((channel, handle));
        Ok(())
    }
}

impl<T> Threads<T> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.handles.len()
    }

    /// Waits until all threads have ended by themselves, then shuts the channels; or until
    /// `deadline` (without one, until nothing moves any more), then shuts them all the same.
    pub(crate) fn drain(&self, deadline: Option<Instant>) -> Result<(), Failure> {
        let mut state = self.crew.lock();
        let mut patience = self.crew.patience(deadline, &state);
        while state.running > 0 {
            state.check()?;
            let in_time;
            (state, in_time) = patience.wait(&self.crew.for_owner, state, |s| s.progress);
            if !in_time {
                let error = ChannelError::Stalled {
                    what: "the channels to write what is queued",
                };
                return Err(Failure {
                    channel: None,
                    error,
                });
            }
        }
        state.check()
    }

    /// Shuts the channels and waits until the threads are gone.
    pub(crate) fn stop(&mut self) -> Result<(), Failure> {
        self.crew.close();
        let deadline = deadline_after(self.crew.limit);
        let mut state = self.crew.lock();
        let mut patience = self.crew.patience(Some(deadline), &state);
        let mut in_time = true;
        while state.running > 0 && in_time {
            (state, in_time) = patience.wait(&self.crew.for_owner, state, |s| s.progress);
        }
        let all_left = state.running == 0;
        drop(state);
        lock(&self.crew.closers).clear();
        let mut stuck = None;
        for (channel, handle) in self.handles.drain(..) {
            // A thread that has left has nothing more to do than to return.
            if all_left || handle.is_finished() {
                // A panic was recorded by the thread's own guard.
                let _ = handle.join();
            } else {
                stuck = Some(channel);
            }
        }
        match stuck {
            None => Ok(()),
            Some(channel) => Err(Failure {
                channel: Some(channel),
                error: ChannelError::Stuck {
                    limit: self.crew.limit,
                },
            }),
        }
    }
}

impl<T> Drop for Threads<T> {
    fn drop(&mut self) {
        // Nobody is left to hear of a thread that does not end.
        let _ = self.stop();
    }
}

/// A thread's being there: however it ends, the others learn of it.
struct Presence<T, F: FnOnce(&Failure)> {
    crew: Arc<Crew<T>>,
    channel: u8,
    on_failure: Option<F>,
}

impl<T, F: FnOnce(&Failure)> Presence<T, F> {
    fn fail(&mut self, error: ChannelError) {
        let failure = Failure {
            channel: Some(self.channel),
            error,
        };
        let on_failure = &mut self.on_failure;
        self.crew.fail_and_tell(failure, |failure| {
            if let Some(on_failure) = on_failure.take() {
                on_failure(failure);
            }
        });
    }
}

impl<T, F: FnOnce(&Failure)> Drop for Presence<T, F> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.fail(ChannelError::Panicked);
        }
        self.crew.lock().running -= 1;
        self.crew.for_owner.notify_all();
    }
}
