//! The state of the VM, and what it is.

use serde::{Deserialize, Serialize};

qapi_enum! {
    /// What the VM is doing (`RunState`).
    pub enum RunState {
        /// A debugger has stopped it.
        Debug = "debug",
        /// Waiting for an incoming migration.
        InMigrate = "inmigrate",
        /// Stopped by an error of the hypervisor.
        InternalError = "internal-error",
        /// Stopped by an error of a device.
        IoError = "io-error",
        /// Stopped by `stop`.
        Paused = "paused",
        /// Stopped because it has been migrated away.
        PostMigrate = "postmigrate",
        /// Not started yet.
        PreLaunch = "prelaunch",
        /// Stopped for the last part of a migration.
        FinishMigrate = "finish-migrate",
        /// Stopped to load a snapshot.
        RestoreVm = "restore-vm",
        /// Running.
        Running = "running",
        /// Stopped to save a snapshot.
        SaveVm = "save-vm",
        /// The guest has shut down.
        Shutdown = "shutdown",
        /// The guest sleeps.
        Suspended = "suspended",
        /// The guest's watchdog has fired.
        Watchdog = "watchdog",
        /// The guest has panicked.
        GuestPanicked = "guest-panicked",
        /// Stopped for a COLO checkpoint or failover.
        Colo = "colo",
    }
}

/// The answer to `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// What the VM is doing.
    pub status: RunState,
    /// Whether its vCPUs run.
    pub running: bool,
}

impl From<RunState> for StatusInfo {
    fn from(status: RunState) -> Self {
        Self {
            status,
            running: status == RunState::Running,
        }
    }
}

/// The three numbers of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// First.
    pub major: u64,
    /// Second.
    pub minor: u64,
    /// Third.
    pub micro: u64,
}

/// The answer to `query-version`, and part of the greeting.
///
/// The schema's only version is `qemu`: management software concludes from it what is there, so a
/// VMM gives the version of QEMU whose commands it has, and its own name and version as `package`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Version of the protocol's commands.
    pub qemu: QemuVersion,
    /// The program.
    pub package: String,
}

impl VersionInfo {
    /// A version.
    #[must_use]
    pub fn new(major: u64, minor: u64, micro: u64, package: impl Into<String>) -> Self {
        Self {
            qemu: QemuVersion {
                major,
                minor,
                micro,
            },
            package: package.into(),
        }
    }
}
