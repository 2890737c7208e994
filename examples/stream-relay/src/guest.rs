//! A guest that nobody runs at the moment.

use std::sync::Arc;

use migration_stream::configuration::Configuration;
use migration_stream::opaque_tail::Tail;

use crate::memory::Memory;
use migration_stream::machine::MachineVersion;

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

/// The version of a machine type: what the name says, or else `unnamed`, or else the current.
pub(crate) fn version(
    configuration: &Configuration,
    unnamed: Option<MachineVersion>,
) -> MachineVersion {
    MachineVersion::of(&configuration.machine)
        .or(unnamed)
        .unwrap_or(MachineVersion::CURRENT)
}
