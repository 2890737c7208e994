//! QEMU's migration (savevm) command stream.
#![deny(unsafe_code)]

pub mod codec;
pub mod command;
pub mod configuration;
pub mod decoder;
pub mod device_blob;
mod error;
pub mod header;
pub mod io;
mod memory;
pub mod opaque_tail;
pub mod precopy;
pub mod ram;
mod reader;
pub mod return_path;
pub mod section;
mod transport;
pub mod vmdesc;
mod writer;

pub use error::{Cause, DecodeError};
pub use memory::{DirtyLog, GuestRam, MemoryError, PageStore};
pub use reader::StreamReader;
pub use transport::{PageBarrier, PageTransport, TransportCounters, TransportError};
pub use writer::StreamWriter;

/// The page size of the stream, bytes. x86 guests have no other.
pub const PAGE_SIZE: u64 = 4096;
