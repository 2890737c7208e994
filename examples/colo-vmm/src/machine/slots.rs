//! RAM as KVM sees it: one memory slot for each block.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use migration_stream::KvmDirtyLog;
use migration_stream::ram::BlockId;
use vm_memory::Address;

use crate::memory::Memory;

/// The memory slots of a VM. They keep RAM mapped for as long as the VM may touch it.
#[derive(Debug)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    /// RAM was written by this process, anywhere in it.
    rewritten: AtomicBool,
}

impl MemorySlots {
    /// Gives `memory` to `vm`.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vm: Arc<VmFd>, memory: Arc<Memory>) -> Result<Self, kvm_ioctls::Error> {
        let slots = Self {
            vm,
            memory,
            rewritten: AtomicBool::new(false),
        };
        for (_, region) in slots.regions() {
            // SAFETY: the address and size are those of a mapping which `slots.memory` keeps, and
            // `slots.vm`, which could reach it, is dropped first (field order); a vCPU holds the
            // slots it runs on. The regions of a `Memory` do not overlap.
            unsafe { slots.vm.set_user_memory_region(region)? };
        }
        Ok(slots)
    }

    /// KVM's dirty log of all RAM. Whoever has it keeps these slots.
    #[must_use]
    pub(crate) fn dirty_log(&self) -> KvmDirtyLog {
        // SAFETY: `new` has given these slots to the VM. Their mappings live as long as the slots, which
        // whoever uses the VM holds.
        unsafe { KvmDirtyLog::new(Arc::clone(&self.vm), self.regions().collect()) }
    }

    /// The blocks of RAM as KVM's memory slots, which go by their index.
    fn regions(&self) -> impl Iterator<Item = (BlockId, kvm_userspace_memory_region)> {
        (0u32..).zip(self.memory.regions()).map(|(slot, region)| {
            let kvm = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.base.raw_value(),
                memory_size: region.mapping.size() as u64,
                userspace_addr: region.mapping.as_ptr() as u64,
            };
            (region.block, kvm)
        })
    }

    /// This process has written RAM, as only a reset makes it do: every page counts as dirty once.
    pub fn note_rewritten(&self) {
        self.rewritten.store(true, Ordering::Release);
    }

    /// Whether [`MemorySlots::note_rewritten`] was called since the last time.
    pub fn take_rewritten(&self) -> bool {
        self.rewritten.swap(false, Ordering::AcqRel)
    }

    /// The RAM in the slots.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }
}
