//! How much memory a process takes, with what it has mapped twice counted once.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::Result;

/// The unit of `st_blocks`, bytes.
const BLOCK: u64 = 512;

/// Memory of a process, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Anonymous memory: `Pss_Anon` of `smaps_rollup`.
    pub anonymous: u64,
    /// Files in memory that it has open, mapped or not: their allocated blocks.
    pub files_in_memory: u64,
}

impl Resident {
    /// That of the process with this id.
    ///
    /// # Errors
    /// There is no such process, or `/proc` does not let it be read.
    pub fn of(process: u32) -> Result<Self> {
        let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
        let anonymous = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Pss_Anon:"))
            .and_then(|rest| rest.split_whitespace().next())
            .ok_or("smaps_rollup without Pss_Anon")?;
        let mut files_in_memory = 0;
        for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
            let path = entry?.path();
            // A descriptor may be gone by now.
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            if target.to_string_lossy().starts_with("/memfd:") {
                files_in_memory += fs::metadata(&path)?.blocks() * BLOCK;
            }
        }
        Ok(Self {
            anonymous: anonymous.parse::<u64>()? << 10,
            files_in_memory,
        })
    }

    /// All of it.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.anonymous + self.files_in_memory
    }
}
