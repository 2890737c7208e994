//! Starting and stopping the threads of a guest, all together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{GuestExit, MachineError, RunState};

/// How long a thread may take to come out of the guest. It takes microseconds, unless it is
/// blocked in the serial sink.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// What a thread is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Run the guest until told to pause, then call [`RunControl::paused`].
    Run,
    /// End the thread.
    Quit,
}

/// The threads of a guest and whoever controls them meet here.
///
/// Each resume begins a new *round*. Every thread takes part in every round exactly once, if only
/// to see that it is over already: so the count of running threads is the barrier.
#[derive(Debug)]
pub struct RunControl {
    round: Mutex<Round>,
    started: Condvar,
    drained: Condvar,
    pausing: AtomicBool,
    /// The threads are to rest, see [`RunControl::rest_for`].
    resting: AtomicBool,
    threads: usize,
    exit_event: EventFd,
}

#[derive(Debug, Default)]
struct Round {
    number: u64,
    quit: bool,
    running: usize,
    exit: Option<GuestExit>,
    rest_until: Option<Instant>,
}

impl RunControl {
    pub fn new(threads: usize, exit_event: EventFd) -> Self {
        Self {
            round: Mutex::default(),
            started: Condvar::new(),
            drained: Condvar::new(),
            pausing: AtomicBool::new(true),
            resting: AtomicBool::new(false),
            threads,
            exit_event,
        }
    }

    // A thread that panicked leaves plain data behind: nothing in `Round` can be half changed.
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub const fn exit_event(&self) -> &EventFd {
        &self.exit_event
    }

    pub fn state(&self) -> RunState {
        let round = self.lock();
        if round.exit.is_some() {
            RunState::Ended
        } else if self.pausing() && round.running == 0 {
            RunState::Stopped
        } else {
            RunState::Running
        }
    }

    /// Whether the round was ended by [`RunControl::stop`]. A guest that ended by itself is not
    /// drained: its last thread has gone, but nobody has stopped the rest of the machine.
    pub fn is_drained(&self) -> bool {
        self.pausing() && self.lock().running == 0
    }

    /// Begins a round, and says when its threads were resumed. The caller has made sure that the
    /// machine is stopped.
    pub fn resume(&self) -> Result<Instant, MachineError> {
        let mut round = self.lock();
        if round.exit.is_some() {
            return Err(MachineError::Ended);
        }
        round.number += 1;
        round.running = self.threads;
        self.pausing.store(false, Ordering::Release);
        drop(round);
        // Before: the threads may be given the processor that this one is on.
        let resumed = Instant::now();
        self.started.notify_all();
        Ok(resumed)
    }

    /// Ends the round and returns when every thread is out of the guest. `kick` makes those
    /// in the guest leave it; the flag is set before it is called.
    pub fn stop(&self, kick: impl FnOnce()) -> Result<(), MachineError> {
        let deadline = Instant::now() + STOP_LIMIT;
        let mut round = self.lock();
        self.pausing.store(true, Ordering::Release);
        if round.running > 0 {
            kick();
        }
        while round.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(MachineError::StopTimeout {
                    running: round.running,
                    seconds: STOP_LIMIT.as_secs(),
                });
            }
            round = self
                .drained
                .wait_timeout(round, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    pub fn take_exit(&self) -> Option<GuestExit> {
        let exit = self.lock().exit.take();
        if exit.is_some() {
            // It is non-blocking: that nothing is left to read is no error.
            let _ = self.exit_event.read();
        }
        exit
    }

    /// Tells the threads to end; they are paused or about to be.
    pub fn quit(&self) {
        self.lock().quit = true;
        self.started.notify_all();
    }

    /// For a thread: waits for the round after `last`. `begin` is called before anyone can ask
    /// for a pause of that round.
    pub fn next_round(&self, last: &mut u64, begin: impl FnOnce()) -> Order {
        let mut round = self.lock();
        loop {
            if round.quit {
                return Order::Quit;
            }
            if round.number != *last {
                break;
            }
            round = self
                .started
                .wait(round)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *last = round.number;
        if !self.pausing() {
            begin();
        }
        Order::Run
    }

    /// For a thread: whether to leave the guest.
    pub fn pausing(&self) -> bool {
        self.pausing.load(Ordering::Acquire)
    }

    /// For a thread: sleeps for `duration`, or until the machine is to pause.
    pub fn sleep(&self, duration: Duration) {
        let begun = Instant::now();
        let mut round = self.lock();
        while !self.pausing() {
            let left = duration.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return;
            }
            round = self
                .started
                .wait_timeout(round, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Has every thread that calls [`RunControl::rest`] rest for `duration` from now on. Zero ends it.
    pub fn rest_for(&self, duration: Duration) {
        let mut round = self.lock();
        round.rest_until = (!duration.is_zero())
            .then(|| Instant::now().checked_add(duration))
            .flatten();
        self.resting
            .store(round.rest_until.is_some(), Ordering::Release);
        drop(round);
        self.started.notify_all();
    }

    /// For a thread: rests for as long as it is to, or until the machine is to pause.
    pub fn rest(&self) {
        if !self.resting.load(Ordering::Acquire) {
            return;
        }
        let mut round = self.lock();
        while let Some(until) = round.rest_until
            && !self.pausing()
        {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            round = self
                .started
                .wait_timeout(round, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Wakes threads in [`RunControl::sleep`] or [`RunControl::rest`], as (part of) the kick of
    /// [`RunControl::stop`].
    pub fn wake(&self) {
        self.started.notify_all();
    }

    /// For a thread: it is out of the guest; with `exit`, because the guest has ended.
    pub fn paused(&self, exit: Option<GuestExit>) {
        let mut round = self.lock();
        round.running = round.running.saturating_sub(1);
        if let Some(exit) = exit
            && round.exit.is_none()
        {
            round.exit = Some(exit);
            if let Err(error) = self.exit_event.write(1) {
                tracing::error!(%error, "the end of the guest cannot be reported");
            }
        }
        drop(round);
        self.drained.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    use super::*;

    #[test]
    fn every_thread_is_out_when_stop_returns() {
        let control = Arc::new(RunControl::new(
            3,
            EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        ));
        let inside = Arc::new(AtomicU32::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (control, inside) = (Arc::clone(&control), Arc::clone(&inside));
                thread::spawn(move || {
                    let mut last = 0;
                    while control.next_round(&mut last, || ()) == Order::Run {
                        inside.fetch_add(1, Ordering::SeqCst);
                        while !control.pausing() {
                            thread::yield_now();
                        }
                        inside.fetch_sub(1, Ordering::SeqCst);
                        control.paused(None);
                    }
                })
            })
            .collect();
        for _ in 0..200 {
            control.resume().unwrap();
            control.stop(|| ()).unwrap();
            assert_eq!(inside.load(Ordering::SeqCst), 0);
            assert_eq!(control.state(), RunState::Stopped);
        }
        control.quit();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_rest_ends_when_it_is_taken_back_or_the_machine_is_to_pause() {
        let control = Arc::new(RunControl::new(
            1,
            EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        ));
        let rests = Arc::new(AtomicU32::new(0));
        let thread = {
            let (control, rests) = (Arc::clone(&control), Arc::clone(&rests));
            thread::spawn(move || {
                let mut last = 0;
                while control.next_round(&mut last, || ()) == Order::Run {
                    while !control.pausing() {
                        control.rest();
                        rests.fetch_add(1, Ordering::Relaxed);
                        thread::yield_now();
                    }
                    control.paused(None);
                }
            })
        };
        control.resume().unwrap();
        // Without one nobody rests.
        while rests.load(Ordering::Relaxed) < 10 {
            thread::yield_now();
        }
        let hour = Duration::from_secs(3600);
        control.rest_for(hour);
        thread::sleep(Duration::from_millis(20));
        let before = rests.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(rests.load(Ordering::Relaxed), before);
        control.rest_for(Duration::ZERO);
        while rests.load(Ordering::Relaxed) < before + 10 {
            thread::yield_now();
        }
        control.rest_for(hour);
        thread::sleep(Duration::from_millis(20));
        control.stop(|| control.wake()).unwrap();
        control.quit();
        thread.join().unwrap();
    }

    #[test]
    fn a_guest_that_ended_does_not_resume_before_someone_took_notice() {
        let control = RunControl::new(1, EventFd::new(libc::EFD_NONBLOCK).unwrap());
        control.resume().unwrap();
        control.paused(Some(GuestExit::DebugExit(3)));
        assert_eq!(control.exit_event().read().unwrap(), 1);
        assert_eq!(control.state(), RunState::Ended);
        assert!(matches!(control.resume(), Err(MachineError::Ended)));
        assert_eq!(control.take_exit(), Some(GuestExit::DebugExit(3)));
        control.stop(|| ()).unwrap();
        assert_eq!(control.state(), RunState::Stopped);
        control.resume().unwrap();
    }
}
