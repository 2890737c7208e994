//! QEMU's migration stream (QEMU 11.1, machine types of x86), and precopy live migration on top of it.
//!
//! A VMM implements [`VmControl`] and [`DeviceState`], and gives its memory ([`GuestRam`] and [`PageStore`], which
//! [`GuestRamMmap`] is for plain mappings) and its dirty log ([`DirtyLog`]). [`precopy`] has the source and the
//! target, and an example of both.
//!
//! | where | what |
//! |---|---|
//! | [`precopy`] | source and target of a live migration |
//! | [`VmControl`], [`DeviceState`], [`Vm`] | what a VMM implements |
//! | [`GuestRam`], [`PageStore`], [`DirtyLog`] | guest memory, and which pages of it were written |
//! | [`ram`] | blocks of guest memory, and the transport of pages in the stream |
//! | [`mapped_ram`] | files in which every page has its place |
//! | [`io`] | channels: two traits, and their implementation over a file descriptor |
//! | [`Tail`] | the devices of a stream that nobody here knows |
//! | [`raw`] | the codecs, and what drivers take; not covered by semantic versioning |
//!
//! Everything received is hostile: a length is checked before memory is taken for it, and what is
//! wrong is a [`DecodeError`] that says what, where, and what was expected.
//!
//! # Features
//!
//! `fd` (default): `io::FdChannel`. `staged` (default): `StagedRam`, memory of a paused guest that is
//! sent while the guest runs on. `unchanged`: fingerprints of pages, from a crate that builds C
//! code; without it pages are always sent. `vmstate`: a tree of that crate's devices is a [`DeviceState`].
//! `kvm`: `KvmDirtyLog`.
#![deny(unsafe_code)]

mod dirty_log;
mod error;
pub mod io;
#[cfg(feature = "kvm")]
mod kvm;
pub mod mapped_ram;
mod memory;
mod mmap;
mod name;
pub mod precopy;
pub mod ram;
pub mod raw;
mod reader;
#[cfg(feature = "staged")]
mod staged;
mod text;
mod transport;
mod vm;
mod writer;

pub use dirty_log::{BitmapDirtyLog, BothLogs};
pub use error::{BoxError, Cause, DecodeError};
#[cfg(feature = "kvm")]
pub use kvm::KvmDirtyLog;
pub use memory::{DirtyLog, GuestRam, MemoryError, PageStore};
pub use mmap::{GuestRamMmap, GuestRamMmapError};
pub use name::{IdStr, IdStrError};
pub use raw::configuration::{Configuration, ConfigurationError, MachineName};
pub use raw::decoder::{ConfigurationRule, DecoderConfig};
pub use raw::machine::MachineVersion;
pub use raw::opaque_tail::{Tail, TailError, TailLimits};
pub use raw::section::{InstanceId, SectionHeader, SectionId};
pub use raw::unchanged::WhenToCompare;
pub use raw::xbzrle::{CacheSizeError, XbzrleCounters};
pub use reader::StreamReader;
#[cfg(feature = "staged")]
pub use staged::StagedRam;
pub use text::Escaped;
pub use transport::{PageTransport, TransportCounters, TransportError};
pub use vm::{DeviceSections, DeviceState, Parsed, Vm, VmControl};
pub use writer::StreamWriter;

/// The page size of the stream, bytes. x86 guests have no other.
pub const PAGE_SIZE: u64 = 4096;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
