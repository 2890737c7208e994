//! The RAM section: block list and page records (wire id `ram`, instance 0, version 4).

mod block;

pub use block::{BlockId, RamBlock, RamBlockError, RamBlockTable};
