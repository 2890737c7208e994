//! Getting a vCPU's thread out of KVM_RUN without a race.
//!
//! KVM looks at `immediate_exit` in the page it shares with us when KVM_RUN begins, and at pending
//! signals while the guest runs. So: set the flag, then send the signal. A thread that is in the
//! guest leaves for the signal; one that was about to enter finds the flag. The signal's handler
//! has nothing to do.

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use libc::{c_int, siginfo_t};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::Vcpu;
use crate::machine::MachineError;

extern "C" fn wake(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Makes the kick's signal harmless for every thread of this process.
pub fn install_handler() -> Result<(), MachineError> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), wake))
        .map_err(MachineError::host("handle the signal that stops vcpus"))
}

pub fn signal(thread: &JoinHandle<()>) -> io::Result<()> {
    thread
        .kill(SIGRTMIN())
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// The `immediate_exit` byte of a vCPU's shared page.
#[derive(Debug)]
pub struct ImmediateExit {
    byte: *mut u8,
    // Keeps the page mapped.
    _vcpu: Arc<Vcpu>,
}

// SAFETY: the byte is only accessed atomically, and its mapping belongs to the `Vcpu` this value
// keeps alive, not to a thread.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub fn new(vcpu: Arc<Vcpu>) -> Result<Self, MachineError> {
        let byte = ptr::addr_of_mut!(vcpu.fd()?.get_kvm_run().immediate_exit);
        Ok(Self { byte, _vcpu: vcpu })
    }

    fn atomic(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the page that KVM shares with this process for as long as the
        // vCPU's file is open. Apart from us only the kernel accesses it, and only to read it.
        unsafe { AtomicU8::from_ptr(self.byte) }
    }

    pub fn set(&self) {
        self.atomic().store(1, Ordering::SeqCst);
    }

    pub fn clear(&self) {
        self.atomic().store(0, Ordering::SeqCst);
    }
}
