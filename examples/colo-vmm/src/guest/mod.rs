//! The built-in guest: a boot sector that dirties memory, checks it, and counts.

mod workload;

pub use workload::{
    BOOT_SECTOR_ADDRESS, BOOT_SECTOR_BYTES, Region, WorkloadConfig, WorkloadError, workload,
};
