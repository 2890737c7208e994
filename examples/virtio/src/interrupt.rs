//! The interrupt of a virtio-mmio device: two status bits and a line to the guest.

use std::fmt::Debug;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// The line that a device raises to interrupt the guest. A VMM gives an eventfd that it has
/// registered as an irqfd.
pub trait IrqLine: Debug + Send + Sync {
    /// Interrupts the guest once.
    ///
    /// # Errors
    /// The host's.
    fn trigger(&self) -> io::Result<()>;
}

impl IrqLine for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// The interrupt status register, and the line behind it. The guest reads and acknowledges it
/// without waiting for the device.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    line: Box<dyn IrqLine>,
}

impl Interrupt {
    /// All bits that the register has.
    pub const MASK: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;

    /// Returns an interrupt of which no bit is set.
    #[must_use]
    pub fn new(line: Box<dyn IrqLine>) -> Self {
        Self {
            status: AtomicU32::new(0),
            line,
        }
    }

    /// Returns the bits that the driver has not acknowledged.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Clears the bits that the driver acknowledges.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Tells the driver that a queue has used buffers.
    pub fn queue_used(&self) {
        self.signal(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration or the status has changed.
    pub fn config_changed(&self) {
        self.signal(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Sets the register, and leaves the line alone.
    pub(crate) fn set(&self, bits: u32) {
        self.status.store(bits & Self::MASK, Ordering::SeqCst);
    }

    /// Raises the line again for bits that a loaded device has set.
    pub(crate) fn raise_pending(&self) {
        if self.status() != 0 {
            self.trigger();
        }
    }

    fn signal(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.trigger();
    }

    fn trigger(&self) {
        if let Err(error) = self.line.trigger() {
            tracing::error!(%error, "the guest cannot be interrupted");
        }
    }
}
