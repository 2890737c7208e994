//! How threads help one that does not wait for them to come.
//!
//! Whoever has the work opens it, begins at once, and closes it when nothing is left to begin. A helper that
//! comes while it is open is given a handle to it and counted, and closing waits for those. One that comes
//! later, however late, finds it closed and leaves: nobody has waited for it, and it has held nothing.

use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};

/// Work that helpers may begin with. Dropped, it is closed: that waits for the helpers that are inside, and
/// afterwards none of them has a handle.
///
/// `W` is the handle to the work, such as an `Arc`.
pub(crate) struct Open<W>(Arc<Work<W>>);

/// What a helper is sent, and may find when the work is long over.
pub(crate) struct Helper<W>(Arc<Work<W>>);

struct Work<W> {
    state: Mutex<State<W>>,
    /// The last helper inside has left.
    left: Condvar,
}

struct State<W> {
    /// `None` when the work is closed.
    handle: Option<W>,
    /// Helpers that have been given the handle, and may still have it.
    inside: usize,
}

impl<W: Clone> Open<W> {
    pub(crate) fn new(handle: W) -> Self {
        Self(Arc::new(Work {
            state: Mutex::new(State {
                handle: Some(handle),
                inside: 0,
            }),
            left: Condvar::new(),
        }))
    }

    pub(crate) fn helper(&self) -> Helper<W> {
        Helper(Arc::clone(&self.0))
    }
}

impl<W> Drop for Open<W> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.handle = None;
        while state.inside > 0 {
            state = (self.0.left.wait(state)).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<W: Clone> Helper<W> {
    /// Calls `part` with the handle, if the work is still open. `part` must not keep it.
    pub(crate) fn help(self, part: impl FnOnce(W)) {
        let Some(handle) = self.0.enter() else {
            return;
        };
        // Dropped when `part` is over, or has panicked: the handle is gone by then.
        let _inside = Inside(&self.0);
        part(handle);
    }
}

impl<W: Clone> Work<W> {
    fn enter(&self) -> Option<W> {
        let mut state = self.lock();
        let handle = state.handle.clone()?;
        state.inside += 1;
        Some(handle)
    }
}

impl<W> Work<W> {
    // Handle and number are each changed in one step: a panic cannot have left them half changed.
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A helper that was counted in.
struct Inside<'a, W>(&'a Work<W>);

impl<W> Drop for Inside<'_, W> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        if state.inside == 0 {
            self.0.left.notify_one();
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn a_helper_that_comes_late_is_not_waited_for_and_finds_nothing() {
        let work = Arc::new(());
        let open = Open::new(Arc::clone(&work));
        let late = open.helper();
        drop(open);
        assert_eq!(Arc::strong_count(&work), 1);
        late.help(|_| panic!("the work is over"));
    }

    #[test]
    fn a_helper_that_is_inside_is_waited_for() {
        let work = Arc::new(());
        let open = Open::new(Arc::clone(&work));
        let helper = open.helper();
        let (begun, has_begun) = mpsc::channel();
        let (end, may_end) = mpsc::channel::<()>();
        let (closed, is_closed) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                helper.help(|_work| {
                    begun.send(()).unwrap();
                    may_end.recv().unwrap();
                });
            });
            has_begun.recv().unwrap();
            scope.spawn(move || {
                drop(open);
                closed.send(()).unwrap();
            });
            thread::yield_now();
            assert_eq!(is_closed.try_recv(), Err(mpsc::TryRecvError::Empty));
            end.send(()).unwrap();
            is_closed.recv().unwrap();
            assert_eq!(Arc::strong_count(&work), 1);
        });
    }

    #[test]
    fn a_helper_that_panics_has_left() {
        let work = Arc::new(());
        let open = Open::new(Arc::clone(&work));
        let helper = open.helper();
        let helped = AssertUnwindSafe(|| helper.help(|_work| panic!("helper")));
        assert!(catch_unwind(helped).is_err());
        drop(open);
        assert_eq!(Arc::strong_count(&work), 1);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p colo-ram-cache --lib loom`.
#[cfg(test)]
#[cfg(loom)]
mod loom_tests {
    use std::sync::Arc as PlainArc;

    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    use super::Open;

    /// Shares as a flush has them.
    #[derive(Default)]
    struct Shares {
        next: AtomicUsize,
        /// How often each was done.
        done: [AtomicUsize; 2],
    }

    impl Shares {
        fn take(&self) {
            while let Some(share) = self.done.get(self.next.fetch_add(1, Ordering::Relaxed)) {
                share.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn loom_closed_work_is_done_once_and_seen_whether_the_helper_came_or_not() {
        loom::model(|| {
            let shares = Arc::new(Shares::default());
            let open = Open::new(Arc::clone(&shares));
            let helper = open.helper();
            let helper = thread::spawn(move || helper.help(|shares| shares.take()));
            shares.take();
            drop(open);
            // The helper has it no more, and cannot get it.
            let Ok(shares) = Arc::try_unwrap(shares) else {
                panic!("the helper has the work");
            };
            for share in shares.done {
                assert_eq!(share.load(Ordering::Relaxed), 1);
            }
            helper.join().unwrap();
        });
    }

    #[test]
    fn loom_closing_waits_for_all_helpers_inside_and_shuts_out_the_others() {
        loom::model(|| {
            // Of an `Arc` that loom does not look into: with one that it does there are too many orders.
            let helped = PlainArc::new(AtomicUsize::new(0));
            let open = Open::new(PlainArc::clone(&helped));
            let helpers = [(), ()].map(|()| {
                let helper = open.helper();
                thread::spawn(move || {
                    helper.help(|helped| {
                        helped.fetch_add(1, Ordering::Relaxed);
                    });
                })
            });
            drop(open);
            assert_eq!(PlainArc::strong_count(&helped), 1);
            let before = helped.load(Ordering::Relaxed);
            for helper in helpers {
                helper.join().unwrap();
            }
            assert_eq!(helped.load(Ordering::Relaxed), before);
        });
    }
}
