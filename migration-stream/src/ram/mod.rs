//! Guest memory as blocks, and pages as records of the main stream.

mod block;
mod in_stream;

pub use block::{BlockId, RamBlock, RamBlockError, RamBlockTable};
pub use in_stream::{InStream, NoMultifd, ZeroPageDetection};
