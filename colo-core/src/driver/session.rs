//! The one way out of a driver.

use super::ColoControl;
use crate::{Cause, ColoExit, ColoVm};

/// A driver that runs. However it ends, the failover handle has left COLO afterwards and refuses
/// requests, and the peer's connections are shut.
pub(super) struct Session<'a> {
    control: &'a ColoControl,
    exited: bool,
}

impl<'a> Session<'a> {
    pub(super) const fn new(control: &'a ColoControl) -> Self {
        Self {
            control,
            exited: false,
        }
    }

    /// Reports the end of COLO.
    pub(super) fn exit<V: ColoVm>(&mut self, vm: &mut V, exit: &ColoExit) {
        self.exited = true;
        // First, so that whoever hears of the end and asks for the status finds it there.
        self.control.slot().exited(exit.reason());
        vm.colo_exit(exit);
    }

    /// Reports the end of COLO by a mistake of the driver's, unless it was reported.
    pub(super) fn mistake<V: ColoVm>(&mut self, vm: &mut V) {
        if !self.exited {
            let exit = ColoExit {
                role: self.control.role(),
                cause: Cause::Mistake,
            };
            self.exit(vm, &exit);
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // What a panic of the embedder's VM has left open: the peer must learn of the end.
        if !self.exited {
            self.control.disconnect();
        }
        self.control.slot().leave();
    }
}
