//! A queue of a driver that is not trusted, and the buffers in it.
//!
//! Everything is read from guest memory once and checked before it is used. A chain is at most
//! [`MAX_SEGMENTS`] long, so a loop ends; a driver that builds one that cannot be gets
//! DEVICE_NEEDS_RESET.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

/// The most descriptors of a chain.
pub const MAX_SEGMENTS: usize = 1024;

/// What a driver did that no driver may.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The rings do not fit together.
    #[error("the queue cannot be read: {0}")]
    Queue(virtio_queue::Error),
    /// A chain of descriptors loops, ends in nothing or is longer than it may be.
    #[error("the chain of descriptor {head} has no end")]
    Chain {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A descriptor of length 0.
    #[error("a descriptor of chain {head} is empty")]
    Empty {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A buffer to be read behind one to be written.
    #[error("in chain {head} a buffer to be read is behind one to be written")]
    Order {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A buffer that does not lie in guest memory.
    #[error("a buffer of chain {head} at {address:#x} of {len:#x} bytes is not guest memory")]
    Address {
        /// The chain's first descriptor.
        head: u16,
        /// Where it should be.
        address: u64,
        /// Its length, bytes.
        len: u32,
    },
    /// A chain has no room for what every request has.
    #[error("chain {head} is too short for a request")]
    Short {
        /// The chain's first descriptor.
        head: u16,
    },
    /// Guest memory could not be accessed.
    #[error("guest memory cannot be accessed")]
    Memory(#[from] GuestMemoryError),
}

/// Pieces of guest memory, one behind the other. Each was in memory when it was added.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    pieces: Vec<(GuestAddress, u32)>,
    len: u64,
}

impl Segments {
    /// Returns the length of all pieces, bytes. It is at most 4 GiB.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether there is no byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, address: GuestAddress, len: u32) {
        self.pieces.push((address, len));
        self.len = self.len.saturating_add(len.into());
    }

    /// Cuts off the bytes from `at` on, and returns them.
    #[must_use]
    pub fn split_off(&mut self, at: u64) -> Self {
        let mut rest = Self::default();
        let mut head = Self::default();
        let mut before = at;
        for (address, len) in self.pieces.drain(..) {
            // At most `len`, so it fits.
            let here = u32::try_from(before.min(len.into())).unwrap_or(len);
            before -= u64::from(here);
            if here > 0 {
                head.push(address, here);
            }
            if here < len {
                // Inside of a range that lies in memory.
                rest.push(address.unchecked_add(here.into()), len - here);
            }
        }
        *self = head;
        rest
    }

    /// Copies as many bytes from guest memory as `to` is long, or as there are. Returns how many.
    ///
    /// # Errors
    /// Guest memory has become smaller.
    pub fn read<M: GuestMemory>(&self, memory: &M, to: &mut [u8]) -> Result<usize, RingError> {
        let mut done = 0;
        for (address, len) in &self.pieces {
            let rest = &mut to[done..];
            let here = usize::try_from(*len).unwrap_or(usize::MAX).min(rest.len());
            memory.read_slice(&mut rest[..here], *address)?;
            done += here;
            if done == to.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Copies `from`, as far as there is room, into guest memory. Returns how many bytes.
    ///
    /// # Errors
    /// Guest memory has become smaller.
    pub fn write<M: GuestMemory>(&self, memory: &M, from: &[u8]) -> Result<usize, RingError> {
        let mut done = 0;
        for (address, len) in &self.pieces {
            let rest = &from[done..];
            let here = usize::try_from(*len).unwrap_or(usize::MAX).min(rest.len());
            memory.write_slice(&rest[..here], *address)?;
            done += here;
            if done == from.len() {
                break;
            }
        }
        Ok(done)
    }
}

/// The buffers of one request.
#[derive(Clone, Debug)]
pub struct Chain {
    /// The first descriptor, by which the driver knows the request.
    pub head: u16,
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
}

/// One queue in use.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    used: bool,
}

impl Ring {
    /// Takes a queue that [`QueueSetup::open`](crate::QueueSetup::open) has checked.
    #[must_use]
    pub const fn new(queue: Queue) -> Self {
        Self { queue, used: false }
    }

    /// Returns the number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Returns the positions in both rings: available, used.
    #[must_use]
    pub fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Returns the next request, checked. If there is none, the driver is to notify of the next.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub fn pop<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain>, RingError> {
        if let Some(chain) = self.pop_now(memory)? {
            return Ok(Some(chain));
        }
        // A request that came before the driver saw that it is to notify.
        if self.arm(memory)? {
            return self.pop_now(memory);
        }
        Ok(None)
    }

    /// Asks the driver to notify, and returns whether there is a request already.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub fn arm<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, RingError> {
        self.queue
            .enable_notification(memory)
            .map_err(RingError::Queue)
    }

    /// Tells the driver that the device looks at the queue by itself.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub fn disarm<M: GuestMemory>(&mut self, memory: &M) -> Result<(), RingError> {
        self.queue
            .disable_notification(memory)
            .map_err(RingError::Queue)
    }

    fn pop_now<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain>, RingError> {
        let mut available = self.queue.iter(memory).map_err(RingError::Queue)?;
        let Some(mut descriptors) = available.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let mut chain = Chain {
            head,
            readable: Segments::default(),
            writable: Segments::default(),
        };
        // A chain that ends while its last descriptor says that there is another is broken.
        let mut more = true;
        for (count, descriptor) in descriptors.by_ref().enumerate() {
            let (address, len) = (descriptor.addr(), descriptor.len());
            if count == MAX_SEGMENTS {
                return Err(RingError::Chain { head });
            }
            if len == 0 {
                return Err(RingError::Empty { head });
            }
            let (to, access) = if descriptor.is_write_only() {
                (&mut chain.writable, Permissions::Write)
            } else if chain.writable.is_empty() {
                (&mut chain.readable, Permissions::Read)
            } else {
                return Err(RingError::Order { head });
            };
            let size = usize::try_from(len).unwrap_or(usize::MAX);
            if !memory.check_range(address, size, access) {
                return Err(RingError::Address {
                    head,
                    address: address.raw_value(),
                    len,
                });
            }
            to.push(address, len);
            more = descriptor.has_next();
        }
        if more {
            return Err(RingError::Chain { head });
        }
        Ok(Some(chain))
    }

    /// Puts the request that was taken last back: it will be the next.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back to the driver, `written` bytes of its buffers written.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub fn push<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), RingError> {
        self.queue
            .add_used(memory, head, written)
            .map_err(RingError::Queue)?;
        self.used = true;
        Ok(())
    }

    /// Returns whether the driver wants an interrupt for what was given back since the last call.
    ///
    /// # Errors
    /// The driver has broken the queue.
    pub fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, RingError> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        self.queue
            .needs_notification(memory)
            .map_err(RingError::Queue)
    }
}
