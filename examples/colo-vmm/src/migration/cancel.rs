//! How a migration that is on its way hears of an operator.

use std::io::{self, PipeReader, PipeWriter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::lock;

/// What an operator wants of a migration that is on its way.
pub(super) struct Cancel {
    requested: AtomicBool,
    /// The pause before the switch-over is to end.
    pub(super) go_on: AtomicBool,
    /// Wakes who waits for connections: dropped or written, it can be read.
    wake: Mutex<Option<PipeWriter>>,
    pub(super) woken: PipeReader,
}

impl Cancel {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let (woken, wake) = io::pipe()?;
        Ok(Arc::new(Self {
            requested: AtomicBool::new(false),
            go_on: AtomicBool::new(false),
            wake: Mutex::new(Some(wake)),
            woken,
        }))
    }

    pub(super) fn request(&self) {
        self.requested.store(true, Ordering::Release);
        drop(lock(&self.wake).take());
    }

    pub(super) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}
