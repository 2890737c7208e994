//! How pages cross from one side to the other.

use std::fmt;

use ::tests::Result;
use ::tests::qmp::Qmp;
use clap::ValueEnum;
use multifd::{ChannelCount, Compression, MultifdConfig, ZstdLevel};
use serde::{Deserialize, Serialize};
use serde_json::json;

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
    /// How many channels there are beside the main stream.
    #[must_use]
    pub const fn channels(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Multifd1 => 1,
            Self::Multifd2 | Self::Zstd2 => 2,
            Self::Multifd4 => 4,
        }
    }

    /// What the channels do to pages, in QEMU's words.
    #[must_use]
    pub const fn compression(self) -> &'static str {
        match self {
            Self::Zstd2 => "zstd",
            _ => "none",
        }
    }

    /// The configuration of ours.
    #[must_use]
    pub fn multifd(self) -> Option<MultifdConfig> {
        Some(
            MultifdConfig::new(ChannelCount::new(self.channels())?).compression(
                if self == Self::Zstd2 {
                    Compression::Zstd(ZstdLevel::default())
                } else {
                    Compression::None
                },
            ),
        )
    }

    /// The configuration of a side that is told by QMP.
    ///
    /// # Errors
    /// The side refuses it.
    pub fn configure(self, qmp: &mut Qmp) -> Result<()> {
        if self.channels() > 0 {
            qmp.enable(&["multifd"])?;
            qmp.set_parameters(json!({
                "multifd-channels": self.channels(),
                "multifd-compression": self.compression(),
            }))?;
        }
        Ok(())
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&name(*self))
    }
}

/// The name that the command line has for a value.
#[must_use]
pub fn name(value: impl ValueEnum) -> String {
    let name = value.to_possible_value();
    name.map_or_else(String::new, |name| name.get_name().to_owned())
}
