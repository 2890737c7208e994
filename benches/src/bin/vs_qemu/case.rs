//! What is measured: a guest, and how its two sides are connected.

use std::fmt;
use std::path::Path;

use ::tests::Result;
use ::tests::qmp::Qmp;
use clap::ValueEnum;
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
        if self.way.channels() > 0 {
            qmp.enable(&["multifd"])?;
            qmp.set_parameters(json!({
                "multifd-channels": self.way.channels(),
                "multifd-compression": if self.way == Way::Zstd2 { "zstd" } else { "none" },
            }))?;
        }
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

/// How the two sides are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A unix socket.
    Unix,
    /// TCP over the loopback interface.
    Tcp,
}

impl Transport {
    /// Where a secondary is to listen.
    pub fn uri(self, dir: &Path) -> String {
        match self {
            Self::Unix => format!("unix:{}", dir.join("colo").display()),
            Self::Tcp => "tcp:127.0.0.1:0".to_owned(),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        name(*self, f)
    }
}

/// How pages cross.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// On the main stream.
    Plain,
    /// By one channel.
    #[serde(rename = "multifd-1")]
    #[value(name = "multifd-1")]
    Multifd1,
    /// By two.
    #[serde(rename = "multifd-2")]
    #[value(name = "multifd-2")]
    Multifd2,
    /// By four.
    #[serde(rename = "multifd-4")]
    #[value(name = "multifd-4")]
    Multifd4,
    /// By two that compress.
    #[serde(rename = "zstd-2")]
    #[value(name = "zstd-2")]
    Zstd2,
}

impl Way {
    const fn channels(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Multifd1 => 1,
            Self::Multifd2 | Self::Zstd2 => 2,
            Self::Multifd4 => 4,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        name(*self, f)
    }
}

/// The name that the command line has for it.
fn name(value: impl ValueEnum, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let name = value.to_possible_value();
    f.pad(name.as_ref().map_or("", |name| name.get_name()))
}
