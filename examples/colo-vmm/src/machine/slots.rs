//! RAM as KVM sees it: one memory slot for each block.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use migration_stream::PAGE_SIZE;
use migration_stream::ram::BlockId;
use vm_memory::Address;

use crate::memory::{Memory, Region};

/// The memory slots of a VM. They keep RAM mapped for as long as the VM may touch it.
#[derive(Debug)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    /// RAM was written by this process, anywhere in it.
    rewritten: AtomicBool,
}

/// One slot: the region of guest RAM that goes by its index.
#[derive(Debug)]
pub struct Slot<'a> {
    vm: &'a VmFd,
    index: u32,
    region: &'a Region,
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
        slots.set_logging(false)?;
        Ok(slots)
    }

    /// Switches KVM's dirty log on or off, for all of RAM.
    ///
    /// # Errors
    /// KVM's.
    pub fn set_logging(&self, on: bool) -> Result<(), kvm_ioctls::Error> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for slot in self.iter() {
            let region = kvm_userspace_memory_region {
                slot: slot.index,
                flags,
                guest_phys_addr: slot.region.base.raw_value(),
                memory_size: slot.region.mapping.size() as u64,
                userspace_addr: slot.region.mapping.as_ptr() as u64,
            };
            // SAFETY: the address and size are those of a mapping which `self.memory` keeps, and
            // `self.vm`, which could reach it, is dropped first (field order); a vCPU holds the
            // slots it runs on. The regions of a `Memory` do not overlap.
            unsafe { self.vm.set_user_memory_region(region)? };
        }
        Ok(())
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

    /// The slots, in the order of RAM's blocks.
    pub fn iter(&self) -> impl Iterator<Item = Slot<'_>> {
        (0u32..)
            .zip(self.memory.regions())
            .map(|(index, region)| Slot {
                vm: &self.vm,
                index,
                region,
            })
    }
}

impl Slot<'_> {
    /// The block that lies in this slot.
    #[must_use]
    pub const fn block(&self) -> BlockId {
        self.region.block
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.region.mapping.size() as u64 / PAGE_SIZE
    }

    /// The pages written since the last call, 64 a word; clears KVM's record of them.
    ///
    /// # Errors
    /// KVM's; `ENOENT` while it does not log.
    pub fn take_dirty(&self) -> Result<Vec<u64>, kvm_ioctls::Error> {
        self.vm
            .get_dirty_log(self.index, self.region.mapping.size())
    }
}
