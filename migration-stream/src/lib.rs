//! QEMU's migration stream (QEMU 11.1, machine types of x86): what is on the wire as codecs without
//! I/O, and precopy live migration on top of them.
//!
//! A VMM gives its memory ([`GuestRam`] and [`PageStore`], which [`GuestRamMmap`] is for plain mappings) and
//! its dirty log ([`DirtyLog`]) and gets [`precopy`]'s source and target. A tool that looks into a stream takes the [`decoder`]:
//!
//! ```
//! use migration_stream::codec::Reader;
//! use migration_stream::command::Command;
//! use migration_stream::decoder::{ConfigurationRule, DecoderConfig, Item, Step, StreamDecoder};
//!
//! # fn main() -> Result<(), migration_stream::DecodeError> {
//! let bytes = b"QEVM\0\0\0\x03\x08\0\x02\0\x04\0\0\0\x01\0";
//! let config = DecoderConfig::new(ConfigurationRule::Absent);
//! // None: no memory to fill, the RAM blocks are those that the stream announces.
//! let mut decoder = StreamDecoder::new(config, None);
//! let mut r = Reader::new(bytes, 0);
//! assert_eq!(decoder.next(&mut r)?, Step::Item(Item::Header));
//! assert_eq!(decoder.next(&mut r)?, Step::Item(Item::Command(Command::Ping(1))));
//! assert_eq!(decoder.next(&mut r)?, Step::Item(Item::Eof));
//! assert_eq!(decoder.next(&mut r)?, Step::NeedMore { at_least: 1 });
//! # Ok(())
//! # }
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`precopy`] | source and target of a live migration, and of a COLO checkpoint's RAM |
//! | [`decoder`] | the main stream item by item, and the RAM of COLO checkpoints |
//! | [`header`], [`configuration`], [`section`], [`command`], [`return_path`] | one thing on the wire each |
//! | [`machine`] | what the machine type says about the stream |
//! | [`dirty_bitmap`] | the sections of block devices' dirty bitmaps |
//! | [`postcopy`] | the order of its commands, packages, bitmaps, requests for pages |
//! | [`ram`] | blocks, the block list, page records, the transport of pages in the stream |
//! | [`container`] | what a file is that is no stream, and images of libvirt with a stream in them |
//! | [`device_blob`], [`opaque_tail`], [`vmdesc`] | device sections: known, unknown, described |
//! | [`mapped_ram`] | files in which every page has its place |
//! | [`xbzrle`] | pages as differences to what was sent before |
//! | [`unchanged`] | pages that need not be sent, because the receiver has their content |
//! | [`io`] | channels: two traits, and their implementation over a file descriptor |
//! | [`codec`] | the reader and the names that the others share |
//!
//! Everything received is hostile: a length is checked before memory is taken for it, and what is
//! wrong is a [`DecodeError`] that says what, where, and what was expected.
//!
//! # Features
//!
//! `fd` (default): `io::FdChannel`. `staged` (default): `StagedRam`, memory of a stopped guest that is
//! sent while the guest runs on. `unchanged` (default): fingerprints of pages, from a crate that builds C
//! code; without it pages are always sent. `vmstate`: a tree of that crate's devices is a [`DeviceState`].
//! `kvm`: `KvmDirtyLog`.
#![deny(unsafe_code)]

pub mod codec;
pub mod command;
pub mod configuration;
pub mod container;
pub mod decoder;
pub mod device_blob;
pub mod dirty_bitmap;
mod dirty_log;
pub mod early;
mod error;
pub mod header;
pub mod io;
#[cfg(feature = "kvm")]
mod kvm;
pub mod machine;
pub mod mapped_ram;
mod memory;
mod mmap;
pub mod opaque_tail;
pub mod postcopy;
pub mod precopy;
pub mod ram;
mod rate;
mod reader;
pub mod return_path;
pub mod section;
#[cfg(feature = "staged")]
mod staged;
mod text;
mod transport;
pub mod unchanged;
mod vm;
pub mod vmdesc;
mod writer;
pub mod xbzrle;

pub use dirty_log::{BitmapDirtyLog, BothLogs};
pub use error::{Cause, DecodeError};
#[cfg(feature = "kvm")]
pub use kvm::KvmDirtyLog;
pub use memory::{DirtyLog, GuestRam, MemoryError, PageStore, prepare_range};
pub use mmap::{GuestRamMmap, GuestRamMmapError};
pub use rate::{RateLimiter, TokenBucket, Work};
pub use reader::StreamReader;
#[cfg(feature = "staged")]
pub use staged::StagedRam;
pub use text::Escaped;
pub use transport::{
    HeldChannels, PageBarrier, PageTransport, PagesBeside, TransportCounters, TransportError,
};
pub use vm::{BoxError, DeviceSections, DeviceState, Parsed, Vm, VmControl};
pub use writer::StreamWriter;

/// The page size of the stream, bytes. x86 guests have no other.
pub const PAGE_SIZE: u64 = 4096;
