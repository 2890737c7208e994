//! The seam between whoever steers the VM and the VM: commands in, events out.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crossbeam_channel::{Receiver, Sender, unbounded};
use qmp_types::{Command, CommandResult, Event, Timestamp};

/// Who carries out an operator's commands.
pub trait Operator: Send + Sync {
    /// Carries out a command. Commands that may be given out of band (see
    /// [`qmp_types::CommandKind`]) do not wait for anything.
    ///
    /// # Errors
    /// What the operator is told.
    fn execute(&self, command: Command) -> CommandResult;
}

/// Events on their way to every operator that listens.
#[derive(Debug, Default)]
pub struct EventBus {
    listeners: Mutex<Vec<Sender<(Event, Timestamp)>>>,
}

impl EventBus {
    /// A bus nobody listens to.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything that is published from now on.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<(Event, Timestamp)> {
        let (sender, receiver) = unbounded();
        self.lock().push(sender);
        receiver
    }

    /// Tells every listener. Listeners that are gone are forgotten.
    pub fn publish(&self, event: &Event) {
        let timestamp = Timestamp::from(SystemTime::now());
        self.lock()
            .retain(|listener| listener.send((event.clone(), timestamp)).is_ok());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Sender<(Event, Timestamp)>>> {
        // A list of senders is whole at every moment.
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
