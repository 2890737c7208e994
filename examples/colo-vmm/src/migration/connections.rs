//! Every connection of a migration in one place, so that somebody can cut them.

use std::sync::{Arc, Mutex, PoisonError};

use migration_stream::io::FdChannel;

/// The connections to the peer. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Mutex<List>>);

#[derive(Debug, Default)]
struct List {
    channels: Vec<FdChannel>,
    /// What was wrong with the one for which the others were cut.
    fault: Option<String>,
}

impl Connections {
    /// Takes note of a connection.
    pub fn add(&self, channel: &FdChannel) {
        self.lock().channels.push(channel.share());
    }

    /// Shuts both directions of all of them: whoever is blocked in one gets an error. QEMU's `yank`.
    pub fn shut(&self) {
        self.lock().shut();
    }

    /// As [`Connections::shut`], because one of them is of no use any more. Whoever waits for
    /// another sees only that it was cut, and finds the reason here.
    pub fn shut_for(&self, fault: String) {
        let mut list = self.lock();
        list.fault.get_or_insert(fault);
        list.shut();
    }

    /// Why they were cut, if it was for one of them.
    pub fn fault(&self) -> Option<String> {
        self.lock().fault.clone()
    }

    /// Forgets them.
    pub fn clear(&self) {
        *self.lock() = List::default();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, List> {
        // A list is whole at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl List {
    fn shut(&self) {
        for channel in &self.channels {
            channel.shutdown();
        }
    }
}
