//! What the script, the channels and the VM have together.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use colo_core::driver::ColoControl;

use super::script::Ask;

/// Everything around a driver.
#[derive(Default)]
pub struct World {
    closed: AtomicBool,
    /// The secondary's guest has run: pages on channels are those of checkpoints.
    begun: AtomicBool,
    control: Mutex<Option<ColoControl>>,
    /// What the main channel has delivered.
    pub delivered: Mutex<Vec<u8>>,
    /// How many checkpoints were promised to be carried on.
    pub promised: AtomicU64,
    /// For channels that wait for their end.
    lock: Mutex<()>,
    ended: Condvar,
}

impl World {
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Every connection ends.
    pub fn close(&self) {
        let _lock = lock(&self.lock);
        self.closed.store(true, Ordering::Release);
        self.ended.notify_all();
    }

    pub fn begin(&self) {
        let _lock = lock(&self.lock);
        self.begun.store(true, Ordering::Release);
        self.ended.notify_all();
    }

    pub fn wait_until_closed(&self) {
        self.wait_until(|| false);
    }

    pub fn wait_until_begun(&self) {
        self.wait_until(|| self.begun.load(Ordering::Acquire));
    }

    fn wait_until(&self, holds: impl Fn() -> bool) {
        let mut guard = lock(&self.lock);
        while !self.is_closed() && !holds() {
            guard = self
                .ended
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn set_control(&self, control: Option<ColoControl>) {
        *lock(&self.control) = control;
    }

    /// Somebody asks for something. True if the driver is woken by it.
    pub fn ask(&self, ask: Ask) -> bool {
        let Some(control) = lock(&self.control).clone() else {
            return false;
        };
        match ask {
            Ask::Failover => return control.failover().request().is_ok(),
            Ask::Quit => control.quit(),
            Ask::Demand => control.demand_checkpoint(),
            Ask::Stop => {
                let refused = control.failover().request();
                control.failover().stop_for_good();
                return refused.is_ok();
            }
        }
        true
    }

    /// Nobody would decide, so this does.
    pub fn decide(&self, ask: Ask) {
        let decided = match ask {
            Ask::Failover => self.ask(ask),
            _ => false,
        };
        if !decided {
            self.ask(if ask == Ask::Stop { ask } else { Ask::Quit });
            self.ask(Ask::Quit);
        }
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub type Shared = Arc<World>;
