//! What the fuzz targets share: a bound on memory, guest memory, and a stream that is in memory.

mod memory_limit;
mod store;
mod stream;

pub use store::Store;
pub use stream::{Bytes, load};

/// Takes the first byte of an input, which says how the rest is to be used.
#[must_use]
pub fn choice(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(c, rest)| (*c, rest))
}
