//! A guest that nobody runs at the moment.

use std::sync::Arc;

use migration_stream::configuration::Configuration;
use migration_stream::opaque_tail::Tail;

use crate::machine::MachineVersion;
use crate::memory::Memory;

/// All that a stream says of a guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its memory.
    pub memory: Arc<Memory>,
    /// The source's configuration section.
    pub configuration: Configuration,
    /// Its devices, as they came.
    pub devices: Tail,
}

impl Guest {
    /// The version of its machine type: what the name says, or else `unnamed`, or else the current.
    #[must_use]
    pub fn machine_version(&self, unnamed: Option<MachineVersion>) -> MachineVersion {
        version(&self.configuration, unnamed)
    }
}

/// As [`Guest::machine_version`], while only the configuration is known.
pub(crate) fn version(
    configuration: &Configuration,
    unnamed: Option<MachineVersion>,
) -> MachineVersion {
    MachineVersion::of(&configuration.machine)
        .or(unnamed)
        .unwrap_or(MachineVersion::CURRENT)
}
