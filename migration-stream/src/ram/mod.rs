//! The RAM section: block list and page records (wire id `ram`, instance 0, version 4).

mod block;
mod error;
mod record;
mod setup;
mod transport;
mod zero;

pub use block::{BlockId, RamBlock, RamBlockError, RamBlockTable};
pub use error::RamError;
pub use record::{
    PageAddress, Record, RecordDecoder, RecordEncoder, encode_end_of_section, encode_multifd_flush,
};
pub(crate) use setup::find_announced;
pub(crate) use setup::is_setup_total;
pub(crate) use setup::put_total;
pub use setup::{SetupDecoder, SetupEntry, SetupFields, check_announced, encode_setup_list};
pub use transport::{InStream, NoMultifd, ZeroPageDetection};
pub use zero::{fetch_for_zero_check, zero_check};

/// The idstr of the RAM section.
pub const RAM_IDSTR: &str = "ram";
/// The only version of the RAM section's body.
pub const RAM_VERSION: u32 = 4;
