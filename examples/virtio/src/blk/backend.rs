//! What a block device stores its sectors in.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Bytes of a sector, the unit of every address and length that a driver gives.
pub const SECTOR: u64 = 512;
/// What the memory of a [`Buffer`] is aligned to, bytes: enough for direct I/O on any disk.
pub const ALIGNMENT: usize = 4096;

/// Memory of the VMM's that a request's data passes through, zeroed at first, aligned to
/// [`ALIGNMENT`]. A driver cannot change what is in it.
#[derive(Debug)]
pub struct Buffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Returns a buffer of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let storage = vec![0; len.saturating_add(ALIGNMENT)];
        // Bytes of a vector can be aligned to anything.
        let start = storage.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self {
            storage,
            start,
            len,
        }
    }

    /// Returns the length, bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there is no byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len]
    }

    /// Returns the bytes, to be written.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }
}

/// By what a device knows a request that it has submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// One request. Offsets and lengths are bytes, whole sectors, and lie in the disk.
#[derive(Debug)]
#[non_exhaustive]
pub enum Operation {
    /// Fills the buffer.
    Read {
        /// Where it begins.
        offset: u64,
        /// What is filled. It comes back with the completion.
        buffer: Buffer,
    },
    /// Writes the buffer.
    Write {
        /// Where it begins.
        offset: u64,
        /// What is written. A backend of two disks writes these same bytes to both.
        data: Arc<Buffer>,
        /// Whether the data is on stable storage when the request completes.
        fua: bool,
    },
    /// Brings every write that has completed to stable storage.
    Flush,
    /// Gives room back. What the range then reads as is not defined.
    Discard {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        len: u64,
    },
    /// Makes a range read as zeroes.
    Zero {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// Whether its room may be given back.
        unmap: bool,
        /// Whether the zeroes are on stable storage when the request completes.
        fua: bool,
    },
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// Which.
    pub id: RequestId,
    /// The buffer of a read.
    pub buffer: Option<Buffer>,
    /// Whether it was done.
    pub result: io::Result<()>,
}

/// What a disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Its length, bytes. A last sector that is not whole is left out.
    pub length: u64,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// In which pieces it is accessed best, bytes: a power of two, at least [`SECTOR`].
    pub physical_block: u32,
}

/// A disk that many requests can be under way to. No call waits for one.
///
/// Every request that is submitted completes, once. Two that overlap have no order unless one was
/// submitted after the other's completion.
pub trait BlockBackend: Debug + Send {
    /// Returns what the disk is like.
    fn geometry(&self) -> Geometry;

    /// Begins a request.
    fn submit(&mut self, id: RequestId, operation: Operation);

    /// Returns a descriptor that can be read when a request has completed.
    fn event(&self) -> Arc<OwnedFd>;

    /// Appends the requests that have completed since the last call, and clears the event.
    fn completions(&mut self, done: &mut Vec<Completion>);
}
