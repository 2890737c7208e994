//! The `globalstate` section: what the guest was doing at the source when it was stopped.

use std::sync::{Arc, Mutex, PoisonError};

use qmp_types::RunState;
use vmstate::{Device, DeviceError, Unused, VmState};

/// Length of the run state's name on the wire, bytes, zero padded.
const NAME_LEN: usize = 32;

/// QEMU's `globalstate`, version 1.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "globalstate", version = 1, validate = GlobalStateBody::check)]
pub struct GlobalStateBody {
    /// Length of the name, the NUL behind it included.
    size: u32,
    run_state: [u8; NAME_LEN],
    has_was_suspended: bool,
    was_suspended: bool,
    reserved: Unused<66>,
}

impl GlobalStateBody {
    fn new(state: RunState) -> Self {
        let name = state.name().as_bytes();
        let mut run_state = [0; NAME_LEN];
        for (to, from) in run_state.iter_mut().zip(name) {
            *to = *from;
        }
        let size = u32::try_from(name.len() + 1).unwrap_or(0);
        Self {
            size,
            run_state,
            has_was_suspended: false,
            was_suspended: false,
            reserved: Unused,
        }
    }

    fn state(&self) -> Option<RunState> {
        let len = self.run_state.iter().position(|b| *b == 0)?;
        RunState::from_name(std::str::from_utf8(&self.run_state[..len]).ok()?)
    }

    fn check(&self) -> Result<(), String> {
        self.state()
            .map(drop)
            .ok_or_else(|| format!("no run state: {:?}", self.run_state))
    }
}

/// The device. Clones are the same one.
#[derive(Clone, Debug)]
pub struct GlobalState(Arc<Mutex<RunState>>);

impl GlobalState {
    /// A guest that is to run.
    #[must_use]
    pub fn running() -> Self {
        Self(Arc::new(Mutex::new(RunState::Running)))
    }

    /// What the guest was doing, or is to do after the load.
    #[must_use]
    pub fn get(&self) -> RunState {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the guest is doing.
    pub fn set(&self, state: RunState) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

impl Device for GlobalState {
    type State = GlobalStateBody;

    fn save(&mut self) -> Result<GlobalStateBody, DeviceError> {
        Ok(GlobalStateBody::new(self.get()))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.set(RunState::Running);
        Ok(())
    }

    fn install(&mut self, state: GlobalStateBody) -> Result<(), DeviceError> {
        self.set(state.state().ok_or("no run state")?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_qemus_104_bytes() {
        let bytes = vmstate::to_bytes(&GlobalStateBody::new(RunState::Running)).unwrap();
        assert_eq!(bytes.len(), 104);
        assert_eq!(&bytes[..13], b"\0\0\0\x08running\0\0");
        let back: GlobalStateBody = vmstate::from_bytes(&bytes, 1).unwrap();
        assert_eq!(back.state(), Some(RunState::Running));
    }

    #[test]
    fn a_name_that_is_no_run_state_is_refused() {
        let mut bytes = vmstate::to_bytes(&GlobalStateBody::new(RunState::Paused)).unwrap();
        bytes[4] = b'X';
        assert!(vmstate::from_bytes::<GlobalStateBody>(&bytes, 1).is_err());
    }
}
