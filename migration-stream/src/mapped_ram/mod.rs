//! Files in which every page has its place (the capability `mapped-ram`, QEMU 9.0 on): a guest that
//! dirties a page again overwrites it, so that the file is never longer than memory and devices.
//!
//! The stream is that of a precopy whose block list has a [`MappedArea`](crate::raw::mapped_ram::MappedArea) behind each entry: a bitmap
//! of the pages that are there, and room for all of them. A page whose bit is clear is zero. Reading
//! one takes a [`StreamReader::from_file`](crate::StreamReader::from_file), and a [`FileReader`] as
//! the barrier of [`Target`](crate::precopy::Target); writing one a
//! [`StreamWriter::to_file`](crate::StreamWriter::to_file), and a [`FileWriter`] as the transport of
//! [`Source`](crate::precopy::Source). Both can have several threads (in QEMU the channels of
//! multifd), and move pages past the page cache.
//!
//! The source puts the capability into its configuration by itself. A target that compares configurations
//! expects it: [`Configuration::with`](crate::Configuration::with)`(`[`MAPPED_RAM`]`)`. The bandwidth
//! of [`Limits`](crate::precopy::Limits) holds for a file too. Who writes a file also makes it durable
//! (`File::sync_all`).
//!
//! [`MAPPED_RAM`]: crate::raw::configuration::MAPPED_RAM

mod error;
mod reader;
mod writer;

pub use error::MappedRamError;

pub use reader::FileReader;
pub use writer::FileWriter;
