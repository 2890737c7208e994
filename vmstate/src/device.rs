//! A device of a VMM, as far as its state is concerned.

use std::error::Error;
use std::sync::{Arc, Mutex};

use crate::VmState;

/// An error of a device's own. It stays the source of the [`TreeError`](crate::TreeError) and can be downcast there.
pub type DeviceError = Box<dyn Error + Send + Sync>;

/// A device that can be saved, reset, and given another state.
///
/// State is a value apart from the running device: a snapshot is taken in one call, and a received state is parsed
/// and checked without changing the device. Every method is called while the VM is paused.
pub trait Device: Send {
    /// The state that travels.
    type State: VmState + Send + 'static;

    /// Returns whether the device has a section in the stream. If not, nothing of it is saved, and a stream without
    /// its section leaves it as it is after a reset.
    fn is_needed(&self) -> bool {
        true
    }

    /// Takes a snapshot.
    ///
    /// # Errors
    /// An error of the device's own.
    fn save(&mut self) -> Result<Self::State, DeviceError>;

    /// Checks whether `state` can be installed here, by facts that the state's description does not have, such as the
    /// number of queues of this device. No device has changed yet, and none changes after an error.
    ///
    /// # Errors
    /// `state` cannot be installed.
    fn check(&self, state: &Self::State) -> Result<(), DeviceError> {
        let _ = state;
        Ok(())
    }

    /// Brings the device to its state at power-on.
    ///
    /// # Errors
    /// The device's own.
    fn reset(&mut self) -> Result<(), DeviceError>;

    /// Gives the device `state`. All devices have been reset before.
    ///
    /// # Errors
    /// An error of the device's own. The VM must not run.
    fn install(&mut self, state: Self::State) -> Result<(), DeviceError>;
}

/// A device that other threads of the VMM use too. It is locked for each call. A poisoned lock is an error.
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
