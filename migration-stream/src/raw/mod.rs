//! What is on the wire, as codecs without I/O, and what drivers other than [`precopy`](crate::precopy)'s take.
//!
//! Everything here is complete and tested: the drivers of this workspace, its tools and its tests are written with
//! it. Semantic versioning does not cover it: names and signatures follow the wire and the drivers.
//!
//! ```
//! use migration_stream::raw::codec::Reader;
//! use migration_stream::raw::command::Command;
//! use migration_stream::raw::decoder::{Item, Step, StreamDecoder};
//! use migration_stream::{ConfigurationRule, DecoderConfig};
//!
//! # fn main() -> Result<(), migration_stream::DecodeError> {
//! let bytes = b"QEVM\0\0\0\x03\x08\0\x02\0\x04\0\0\0\x01\0";
//! let config = DecoderConfig::new(ConfigurationRule::Absent);
//! // Without blocks of its own the decoder takes those that the stream announces.
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
//! | [`codec`] | the reader that all codecs share |
//! | [`decoder`] | the main stream item by item, and the RAM of COLO checkpoints |
//! | [`header`], [`configuration`], [`section`], [`command`], [`return_path`] | one thing on the wire each |
//! | [`ram`] | the block list, page records, the search for zero pages |
//! | [`xbzrle`] | pages as differences to their last content |
//! | [`unchanged`] | pages that the receiver has already |
//! | [`device_blob`], [`early`], [`opaque_tail`], [`vmdesc`] | device sections: known, before RAM, unknown, described |
//! | [`dirty_bitmap`] | the sections of block devices' dirty bitmaps |
//! | [`postcopy`] | the order of its commands, packages, bitmaps, requests for pages |
//! | [`mapped_ram`] | where a page is in a file in which every page has its place |
//! | [`container`] | files that are no stream, and images of libvirt with a stream in them |
//! | [`transport`] | how pages cross, for those who implement it |
//! | [`checkpoint`] | RAM of a COLO checkpoint, sent and received |
//! | [`rate`] | the bandwidth limit that all connections share |

pub mod checkpoint;
pub mod codec;
pub mod command;
pub mod configuration;
pub mod container;
pub mod decoder;
pub mod device_blob;
pub mod dirty_bitmap;
pub mod early;
pub mod header;
pub mod machine;
pub mod mapped_ram;
pub mod opaque_tail;
pub mod postcopy;
pub mod ram;
pub mod rate;
pub mod return_path;
pub mod section;
pub mod transport;
pub mod unchanged;
pub mod vmdesc;
pub mod xbzrle;

pub use crate::memory::prepare_range;
