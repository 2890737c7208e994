//! The state of registers and queues as it travels, and what it is checked against.

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemory;
use vmstate::VmState;

use crate::transport::{MAX_QUEUES, status};

/// What a driver has written about one queue, and how far the device is in it. It is untrusted:
/// [`QueueSetup::open`] checks it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "virtio-queue", version = 1)]
pub struct QueueSetup {
    /// The largest size, descriptors.
    pub max_size: u16,
    /// The size that the driver chose; 0 for one that no queue has.
    pub size: u16,
    /// Whether the driver has finished with the set-up.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the ring of available buffers.
    pub avail_ring: u64,
    /// Guest address of the ring of used buffers.
    pub used_ring: u64,
    /// Index of the next available buffer.
    pub next_avail: u16,
    /// Index of the next used buffer.
    pub next_used: u16,
}

impl QueueSetup {
    /// Returns a queue after a reset.
    #[must_use]
    pub const fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// Returns the queue that this describes, checked: its size is one that a queue can have, and
    /// its three parts are aligned and lie in `memory`.
    ///
    /// # Errors
    /// It is not.
    pub fn open<M: GuestMemory>(&self, features: u64, memory: &M) -> Result<Queue, StateError> {
        let state = QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        let queue = Queue::try_from(state).map_err(StateError::Queue)?;
        // The queue takes an available ring at address 0 for one that was never set.
        if self.avail_ring == 0 || !queue.is_valid(memory) {
            return Err(StateError::OutsideMemory);
        }
        Ok(queue)
    }
}

/// The registers of a device, and its queues. It is untrusted:
/// [`Transport::check`](crate::Transport::check) and [`TransportState::queues_lie_in`] check it.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "virtio-mmio", version = 1)]
pub struct TransportState {
    /// The virtio device id.
    pub device_id: u32,
    /// The status register.
    pub status: u32,
    /// Features that the driver has written.
    pub driver_features: u64,
    /// Which half of the device's features is read.
    pub device_features_sel: u32,
    /// Which half of the driver's features is written.
    pub driver_features_sel: u32,
    /// Which queue the queue registers are of.
    pub queue_sel: u32,
    /// Interrupts that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration has changed.
    pub config_generation: u32,
    /// The number of queues.
    pub queue_count: u16,
    /// The queues.
    #[vmstate(nested, len = "queue_count", max = MAX_QUEUES)]
    pub queues: Vec<QueueSetup>,
}

impl TransportState {
    /// Checks the queues of a live device: each that is ready lies in `memory`, and no buffer of it
    /// was in use when it was saved.
    ///
    /// # Errors
    /// One does not.
    pub fn queues_lie_in<M: GuestMemory>(&self, memory: &M) -> Result<(), StateError> {
        let given_up = status::FAILED | status::NEEDS_RESET;
        if self.status & (status::DRIVER_OK | given_up) != status::DRIVER_OK {
            return Ok(());
        }
        for queue in self.queues.iter().filter(|queue| queue.ready) {
            queue.open(self.driver_features, memory)?;
            if queue.next_avail != queue.next_used {
                return Err(StateError::InUse {
                    next_avail: queue.next_avail,
                    next_used: queue.next_used,
                });
            }
        }
        Ok(())
    }
}

/// Why a state, or what a driver has set up, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A field has a value that it cannot have here.
    #[error("{field} is {value:#x}, which it cannot be here")]
    Value {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Features that do not go together, or that this device does not offer.
    #[error("features {features:#x} cannot be used: {missing:#x} of them are not offered here")]
    Features {
        /// Those of the state.
        features: u64,
        /// Those of them that are not offered.
        missing: u64,
    },
    /// A queue cannot be as it is described.
    #[error("a queue cannot be used: {0}")]
    Queue(virtio_queue::Error),
    /// A queue does not lie in guest memory.
    #[error("a queue does not lie in guest memory")]
    OutsideMemory,
    /// Buffers were in use.
    #[error("a queue was saved with buffers in use: available {next_avail}, used {next_used}")]
    InUse {
        /// Index of the next available buffer.
        next_avail: u16,
        /// Index of the next used buffer.
        next_used: u16,
    },
    /// The device is not paused.
    #[error("the device is not paused")]
    NotPaused,
}
