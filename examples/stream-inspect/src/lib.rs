//! Looks into migration streams of QEMU: out of a file, or while a source sends one.
//!
//! ```text
//! file, source ──> scan ──> Inspection ──> report (a table), state (JSON as QEMU's script prints it)
//!                    └────> extract (RAM blocks as files)
//! ```
//!
//! The stream is read once, page by page, and of its memory nothing is kept but counts. What of it is
//! held are its device sections and their description, which are bounded.
//!
//! | module | what |
//! |---|---|
//! | [`scan`] | from the first byte to the last |
//! | [`inspection`] | what was found |
//! | [`fields`], [`state`] | device sections along their description |
//! | [`report`] | for people |
//! | [`extract`] | RAM blocks and devices as files |
//! | [`incoming`] | a stream that comes over a socket |
//! | [`pages`] | sets of pages |
//! | [`cli`] | the program |
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod cli;
pub mod extract;
pub mod fields;
pub mod incoming;
pub mod inspection;
pub mod pages;
pub mod report;
pub mod scan;
pub mod state;
