//! Files in which every page has its place (the capability `mapped-ram`, QEMU 9.0 on): a guest that
//! dirties a page again overwrites it, so that the file is never longer than memory and devices.
//!
//! The stream is that of a precopy whose block list has a [`MappedArea`] behind each entry: a bitmap
//! of the pages that are there, and room for all of them. A page whose bit is clear is zero. Reading
//! one takes a [`StreamReader::from_file`](crate::StreamReader::from_file), and a [`FileReader`] as
//! the barrier of [`Target`](crate::precopy::Target).

mod layout;
mod reader;

pub use layout::{HEADER_LEN, LayoutError, MappedArea};
pub use reader::{FileReader, MappedPages, MappedRamError};
