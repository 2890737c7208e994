//! What the command-line tools of this workspace share.
//!
//! | module | what |
//! |---|---|
//! | [`arguments`] | the command line, whose mistakes are told in plain text |
//! | [`output`] | standard output and standard error whose reader may have gone |
//! | [`errors`] | an error and its causes as one line of plain text |
//! | [`number`] | numbers and sizes on a command line |
//! | [`device_state`] | what is said of a guest with too much device state |
//! | [`input`] | a stream in a file, in a saved image of libvirt, in a pipe or on standard input |
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod arguments;
pub mod device_state;
pub mod errors;
pub mod input;
pub mod number;
pub mod output;

pub use migration_stream::Escaped;
