//! Every connection of a migration in one place, so that somebody can cut them.

use std::sync::{Arc, Mutex, PoisonError};

use migration_stream::io::FdChannel;

/// The connections to the peer. Clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Mutex<Vec<FdChannel>>>);

impl Connections {
    /// Takes note of a connection.
    pub fn add(&self, channel: &FdChannel) {
        self.lock().push(channel.share());
    }

    /// Shuts both directions of all of them: whoever is blocked in one gets an error. QEMU's `yank`.
    pub fn shut(&self) {
        for channel in &*self.lock() {
            channel.shutdown();
        }
    }

    /// Forgets them.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<FdChannel>> {
        // A list is whole at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
