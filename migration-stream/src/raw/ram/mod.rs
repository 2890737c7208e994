//! The RAM section: block list and page records (wire id `ram`, instance 0, version 4).

mod error;
mod record;
mod setup;
mod zero;

pub use error::RamError;
pub use record::{
    PageAddress, Record, RecordDecoder, RecordEncoder, encode_end_of_section, encode_multifd_flush,
};
pub use setup::{SetupDecoder, SetupEntry, SetupFields, check_announced, encode_setup_list};
pub(crate) use setup::{find_announced, is_setup_total, put_total};
pub use zero::{fetch_for_zero_check, zero_check};

/// The idstr of the RAM section.
pub const RAM_IDSTR: &str = "ram";
/// The only version of the RAM section's body.
pub const RAM_VERSION: u32 = 4;
