//! The built-in guests, each a boot sector: one that dirties memory, checks it and counts, and one
//! that answers.

mod answers;
mod sector;
mod workload;

pub use answers::{ANSWER_PAGES, ASK, answers, digest};
pub use sector::{BOOT_SECTOR_ADDRESS, BOOT_SECTOR_BYTES, SectorError};
pub use workload::{Region, WorkloadConfig, WorkloadError, workload};
