//! KVM's dirty log.
#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::ram::BlockId;
use crate::{DirtyLog, MemoryError};

/// KVM's dirty log: the kernel marks what vCPUs write. What the VMM itself writes to guest memory is not
/// in it; see [`BitmapDirtyLog`](crate::BitmapDirtyLog) and [`BothLogs`](crate::BothLogs).
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: Arc<VmFd>,
    slots: Vec<(BlockId, kvm_userspace_memory_region)>,
}

impl KvmDirtyLog {
    /// Returns the log of these memory slots, each with the RAM block that lies in it. Logging is
    /// switched on and off by giving each slot to KVM again.
    ///
    /// # Safety
    /// Each slot was given to `vm` by `KVM_SET_USER_MEMORY_REGION` with the same number, addresses and
    /// size, and its memory stays mapped for as long as the VM lives.
    #[must_use]
    pub unsafe fn new(vm: Arc<VmFd>, slots: Vec<(BlockId, kvm_userspace_memory_region)>) -> Self {
        Self { vm, slots }
    }

    fn set_logging(&self, on: bool) -> Result<(), kvm_ioctls::Error> {
        for (_, slot) in &self.slots {
            let mut slot = *slot;
            slot.flags &= !KVM_MEM_LOG_DIRTY_PAGES;
            if on {
                slot.flags |= KVM_MEM_LOG_DIRTY_PAGES;
            }
            // SAFETY: the caller of `new` promises that KVM knows this slot already, and that its
            // memory outlives the VM. Only a flag changes.
            unsafe { self.vm.set_user_memory_region(slot)? };
        }
        Ok(())
    }
}

fn backend(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MemoryError {
    move |source| MemoryError::Backend {
        what,
        source: source.into(),
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.set_logging(true)
            .map_err(backend("kvm does not start logging writes"))
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        for (block, slot) in &self.slots {
            let size = usize::try_from(slot.memory_size).unwrap_or(usize::MAX);
            let words = (self.vm.get_dirty_log(slot.slot, size))
                .map_err(backend("kvm does not give its dirty log"))?;
            crate::dirty_log::report(*block, &words, sink);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        self.set_logging(false)
            .map_err(backend("kvm does not stop logging writes"))
    }
}
