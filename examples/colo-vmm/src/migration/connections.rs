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

    /// Ends the reading of all of them, because one is of no use any more. Whoever reads another sees
    /// only its end, and finds the reason here. The peer can still be told.
    pub fn stop_reading_for(&self, fault: String) {
        let mut list = self.lock();
        list.fault.get_or_insert(fault);
        for channel in &list.channels {
            channel.shutdown_reading();
        }
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
