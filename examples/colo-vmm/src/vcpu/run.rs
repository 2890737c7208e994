//! The run loop: into the guest, out with a reason, and again.

use std::sync::PoisonError;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Vcpu;
use super::failure::UnemulatedInstruction;
use super::kick::ImmediateExit;
use crate::devices::PortBus;
use crate::machine::{GuestExit, RunControl};

/// Runs the guest until it is to pause (`None`) or has ended. On return no port or memory access
/// of the guest's is half done, so that its registers may be saved.
pub fn until_paused(
    vcpu: &Vcpu,
    bus: &PortBus,
    control: &RunControl,
    immediate_exit: &ImmediateExit,
) -> Option<GuestExit> {
    let mut fd = vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let ended = match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => bus.write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.read(port, data);
                None
            }
            // Nothing of ours is behind an address: an empty bus reads all ones.
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(0xff);
                None
            }
            Ok(VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => None,
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => Some(GuestExit::Shutdown),
            Ok(VcpuExit::InternalError) => Some(GuestExit::Unemulated(
                UnemulatedInstruction::at_rip(vcpu.index, &fd, vcpu.slots.memory()),
            )),
            Ok(other) => {
                let reason = format!("kvm exit {other:?}");
                Some(GuestExit::Unhandled {
                    vcpu: vcpu.index,
                    reason,
                })
            }
            // The kernel reports EINTR only after it has completed the last exit's access.
            Err(error) if error.errno() == libc::EINTR => {
                control.rest();
                // Who rests was kicked as well. A pause that comes after the flag was cleared is seen
                // here, one that comes later sets it again.
                immediate_exit.clear();
                if control.pausing() {
                    return None;
                }
                None
            }
            Err(error) if error.errno() == libc::EAGAIN => None,
            Err(error) => Some(GuestExit::Unhandled {
                vcpu: vcpu.index,
                reason: format!("KVM_RUN failed: {error}"),
            }),
        };
        if ended.is_some() {
            complete_access(&mut fd, immediate_exit);
            return ended;
        }
    }
}

/// The kernel finishes an exit's port or memory access (moves the data, steps over the
/// instruction) at the beginning of the next KVM_RUN: this is one that goes no further.
fn complete_access(fd: &mut VcpuFd, immediate_exit: &ImmediateExit) {
    immediate_exit.set();
    // Any outcome will do: EINTR is the expected one.
    let _ = fd.run();
}
