//! How a migration that is on its way hears of an operator.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration_stream::io::CancelToken;

use super::lock;
use super::uncertain::Reply;

/// How long a decision of the operator's may take to be carried out.
const CARRIED_OUT: Duration = Duration::from_secs(5);

/// What an operator wants of a migration that is on its way.
pub(super) struct Cancel {
    token: CancelToken,
    /// The process ends.
    ending: AtomicBool,
    /// The pause before the switch-over is to end.
    pub(super) go_on: AtomicBool,
    /// Whether the destination runs the guest cannot be known: the operator is asked.
    unknown: AtomicBool,
    decisions: Mutex<(Sender<Reply>, Receiver<Reply>)>,
}

impl Cancel {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            token: CancelToken::new()?,
            ending: AtomicBool::new(false),
            go_on: AtomicBool::new(false),
            unknown: AtomicBool::new(false),
            decisions: Mutex::new(channel()),
        }))
    }

    /// Ends every wait of the migration.
    pub(super) fn request(&self) {
        self.token.cancel();
    }

    /// What ends the waits.
    pub(super) const fn token(&self) -> &CancelToken {
        &self.token
    }

    /// The process ends: nobody decides anything any more.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Whether the operator has to decide who runs the guest.
    pub(super) fn is_unknown(&self) -> bool {
        self.unknown.load(Ordering::Acquire)
    }

    /// The operator is asked from now on.
    pub(super) fn ask(&self) {
        self.unknown.store(true, Ordering::Release);
    }

    /// There is nothing to decide any more.
    pub(super) fn known(&self) {
        self.unknown.store(false, Ordering::Release);
    }

    /// The operator has the guest run here: waits until it does.
    pub(super) fn run_here(&self) -> Result<(), String> {
        let (reply, done) = channel();
        // The other end lives as long as this.
        let _ = lock(&self.decisions).0.send(reply);
        done.recv_timeout(CARRIED_OUT)
            .unwrap_or_else(|_| Err("the migration has ended meanwhile".to_owned()))
    }

    /// Whom to tell when the guest runs here, if the operator wants it to.
    pub(super) fn asked_to_run(&self) -> Option<Reply> {
        lock(&self.decisions).1.try_recv().ok()
    }
}
