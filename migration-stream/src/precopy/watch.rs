//! Steps of a source that may wait for the peer, beside a VMM that goes on being asked.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use std::{panic, thread};

use super::error::SourceError;
use super::ram::RamSender;
use super::source::{Control, Progress, Source, SourceObserver};
use crate::{DirtyLog, PAGE_SIZE, PageTransport, StreamWriter};

/// How often the VMM is told of progress while a step lasts, at least.
pub(super) const WATCH: Duration = Duration::from_millis(40);

impl<T: PageTransport, D: DirtyLog> Source<T, D> {
    /// Does `step` in a thread of its own. The calling thread tells `observer` of progress meanwhile, and ends the step's
    /// waits when it is cancelled.
    ///
    /// # Errors
    /// [`SourceError::Cancelled`] if it was cancelled, whatever that has made of the step; those of `step`.
    pub(super) fn watched<R: Send>(
        &mut self,
        observer: &mut dyn SourceObserver,
        step: impl FnOnce(&mut RamSender<T, D>, &mut StreamWriter) -> Result<R, SourceError> + Send,
    ) -> Result<R, SourceError> {
        let result = self.beside(observer, step);
        if self.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        result
    }

    /// As [`Source::watched`], where a cancel does not undo what the step has done.
    ///
    /// # Errors
    /// Those of `step`; that of starting a thread, before `step` is called.
    pub(super) fn beside<R: Send>(
        &mut self,
        observer: &mut dyn SourceObserver,
        step: impl FnOnce(&mut RamSender<T, D>, &mut StreamWriter) -> Result<R, SourceError> + Send,
    ) -> Result<R, SourceError> {
        let mut progress = self.progress();
        let (ram, out) = (&mut self.ram, &mut self.out);
        let live = ram.watch(out);
        let (done, finished) = mpsc::channel::<()>();
        let result = thread::scope(|scope| {
            let worker = thread::Builder::new()
                .name("migration-source".to_owned())
                .spawn_scoped(scope, move || {
                    // Its end is seen however it comes.
                    let _done = done;
                    step(ram, out)
                })?;
            while finished.recv_timeout(WATCH) == Err(RecvTimeoutError::Timeout) {
                let figures = live.get();
                progress = Progress {
                    remaining: figures.pending_pages * PAGE_SIZE,
                    transferred: figures.bytes,
                    counters: figures.counters,
                    elapsed: self.begun.elapsed(),
                    ..progress
                };
                match observer.progress(&progress) {
                    Control::Continue => {}
                    Control::SwitchOver => {
                        self.asked = true;
                        // What is on its way need not wait for the limit any more.
                        if self.acks.is_none() {
                            self.limits.limiter().lift(true);
                        }
                    }
                    Control::Cancel => self.cancel.cancel(),
                }
            }
            // A panic in memory, log or transport that was plugged in is its owner's.
            worker.join().unwrap_or_else(|e| panic::resume_unwind(e))
        });
        self.ram.unwatch();
        result
    }
}
