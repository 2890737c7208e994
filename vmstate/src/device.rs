//! A device of a VMM, as far as its state is concerned.

use std::error::Error;
use std::sync::{Arc, Mutex};

use crate::VmState;

/// Whatever went wrong in a device, as the device words it. It stays the source of the
/// [`TreeError`](crate::TreeError) and can be downcast there.
pub type DeviceError = Box<dyn Error + Send + Sync>;

/// A device that can be saved, reset, and given another state.
///
/// State is a value of its own, apart from the running device: a snapshot is taken from the device
/// at once, and a received state is parsed and checked without touching it. Every method is called
/// while the VM is stopped.
pub trait Device: Send {
    /// The state that travels.
    type State: VmState + Send + 'static;

    /// Whether the device has a section in the stream at all. If not, nothing of it is saved, and
    /// a stream that has none for it leaves it as it is after a reset.
    fn is_needed(&self) -> bool {
        true
    }

    /// Takes a snapshot.
    ///
    /// # Errors
    /// The device's own.
    fn save(&mut self) -> Result<Self::State, DeviceError>;

    /// Whether `state` could be installed here: what the state's description cannot know, such as
    /// the number of queues that this device was built with. Nothing has been changed when this
    /// is called, and nothing is if it fails.
    ///
    /// # Errors
    /// Why not.
    fn check(&self, state: &Self::State) -> Result<(), DeviceError> {
        let _ = state;
        Ok(())
    }

    /// Puts the device into its state at power-on, whatever it was doing.
    ///
    /// # Errors
    /// The device's own.
    fn reset(&mut self) -> Result<(), DeviceError>;

    /// Takes on `state`. The device, and every other one, has been reset before.
    ///
    /// # Errors
    /// The device's own. The VM must not run after that.
    fn install(&mut self, state: Self::State) -> Result<(), DeviceError>;
}

/// A device that the VMM's other threads use as well. It is locked for each call; a lock that a
/// panic has poisoned is an error.
impl<D: Device> Device for Arc<Mutex<D>> {
    type State = D::State;

    /// A device whose lock is poisoned is needed: saving it then says what is wrong.
    fn is_needed(&self) -> bool {
        self.lock().map_or(true, |device| device.is_needed())
    }

    fn save(&mut self) -> Result<Self::State, DeviceError> {
        self.lock().map_err(|_| PoisonedLock)?.save()
    }

    fn check(&self, state: &Self::State) -> Result<(), DeviceError> {
        self.lock().map_err(|_| PoisonedLock)?.check(state)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.lock().map_err(|_| PoisonedLock)?.reset()
    }

    fn install(&mut self, state: Self::State) -> Result<(), DeviceError> {
        self.lock().map_err(|_| PoisonedLock)?.install(state)
    }
}

/// A thread panicked while it held the device's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device's lock is poisoned: a thread panicked while it held it")]
pub struct PoisonedLock;
