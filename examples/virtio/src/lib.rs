//! virtio devices over virtio-mmio for a VMM: entropy, block, network. They know nothing of KVM.
//!
//! ```
//! use std::num::NonZeroUsize;
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use colo_virtio::blk::{Blk, DiskFile, DiskOptions, Serial, ThreadPool};
//! use colo_virtio::{Device, MmioDevice, register};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//! use vmm_sys_util::eventfd::EventFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
//! # let image = tempfile::NamedTempFile::new()?;
//! # image.as_file().set_len(1 << 20)?;
//! # let path = image.path();
//! let disk = DiskFile::open(path, DiskOptions::default())?;
//! let threads = ThreadPool::new(Arc::new(disk), NonZeroUsize::new(4).unwrap())?;
//! let blk = Blk::new(Box::new(threads), Serial::new("disk0").unwrap());
//! // The VMM registers this event as an irqfd, and the device's queue events as ioeventfds.
//! let line = EventFd::new(libc::EFD_NONBLOCK)?;
//! let device = Device::new(blk, Arc::new(memory), Box::new(line))?;
//! device.resume();
//!
//! // A vCPU's MMIO exit, by its offset in the device's region.
//! let mut id = [0; 4];
//! device.read(register::DEVICE_ID, &mut id);
//! assert_eq!(u32::from_le_bytes(id), 2);
//!
//! // The vCPUs rest: no request is in flight, and the state can be saved.
//! device.pause(Duration::from_secs(10))?;
//! # Ok(())
//! # }
//! ```
//!
//! | module | |
//! |---|---|
//! | [`transport`] | the registers, a state machine without I/O |
//! | [`ring`] | queues of a driver that is not trusted |
//! | [`device`] | a device in a VM: its thread, pause and resume, its state |
//! | [`rng`], [`blk`], [`net`] | the kinds of devices |
//!
//! # Features
//! * `io-uring`: block requests through the kernel's io_uring.
#![deny(unsafe_code)]

pub mod blk;
pub mod device;
mod interrupt;
pub mod net;
pub mod ring;
pub mod rng;
mod state;
pub mod transport;

pub use device::{Device, MmioDevice, Model, PauseError};
pub use interrupt::{Interrupt, IrqLine};
pub use state::{QueueSetup, StateError, TransportState};
pub use transport::{Action, Identity, Transport, register};

/// Compiles and runs the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
