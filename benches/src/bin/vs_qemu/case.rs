//! What is measured: a guest, and how its two sides are connected.

use std::fmt;

use ::tests::Result;
use ::tests::qmp::Qmp;
use benches::connection::{Transport, Way};
use colo_vmm::guest::WorkloadConfig;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// One guest and connection, the same for everybody who is measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// How the two sides are connected.
    pub transport: Transport,
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
    pub delay_ms: u32,
    /// Whether each side has half of the CPUs for itself.
    pub is_pinned: bool,
}

impl Case {
    /// The guest.
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
    pub fn configure(&self, qmp: &mut Qmp) -> Result<()> {
        qmp.enable(&["return-path", "x-colo", "events"])?;
        self.way.configure(qmp)?;
        qmp.set_parameters(json!({
            "x-checkpoint-delay": self.delay_ms,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        }))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} pages of {} MiB",
            self.transport, self.way, self.dirty_pages, self.memory_mib
        )?;
        for (is_so, text) in [
            (!self.is_filled, ", empty"),
            (self.is_pinned, ", pinned"),
            (self.pass_delay > 0, ", passes delayed"),
        ] {
            if is_so {
                f.write_str(text)?;
            }
        }
        Ok(())
    }
}
