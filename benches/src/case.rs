//! What is measured: a guest, and how its two sides are connected.

use std::fmt;

use ::tests::Result;
use ::tests::qmp::Qmp;
use colo_vmm::guest::WorkloadConfig;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::link::Link;
use crate::way::Way;

/// One guest and connection, the same for every pair that is measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// What joins the two sides.
    pub link: Link,
    /// How pages cross.
    pub way: Way,
    /// Pages the guest dirties in one pass over them.
    pub dirty_pages: u32,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Whether the guest has written to all of it before.
    pub is_filled: bool,
    /// Turns of an empty loop between two passes; 0: the guest dirties all the time.
    pub pass_delay: u32,
    /// From one checkpoint to the next, ms.
    pub interval_ms: u32,
}

impl Case {
    /// The guest.
    #[must_use]
    pub fn workload(&self) -> WorkloadConfig {
        WorkloadConfig {
            memory_mib: self.memory_mib.into(),
            dirty_pages: self.dirty_pages,
            pass_delay: self.pass_delay,
            fills_ram: self.is_filled,
            ..WorkloadConfig::default()
        }
    }

    /// Prepares one side. Only a primary asks for what is set by the last three.
    ///
    /// # Errors
    /// The side refuses it.
    pub fn configure(&self, qmp: &mut Qmp) -> Result<()> {
        qmp.enable(&["return-path", "x-colo", "events"])?;
        self.way.configure(qmp)?;
        qmp.set_parameters(json!({
            "x-checkpoint-delay": self.interval_ms,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        }))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            link,
            way,
            dirty_pages,
            memory_mib,
            interval_ms,
            ..
        } = self;
        write!(
            f,
            "{link} {way}, {dirty_pages} pages of {memory_mib} MiB every {interval_ms} ms"
        )?;
        for (is_so, text) in [
            (!self.is_filled, ", empty"),
            (self.pass_delay > 0, ", passes delayed"),
        ] {
            if is_so {
                f.write_str(text)?;
            }
        }
        Ok(())
    }
}
