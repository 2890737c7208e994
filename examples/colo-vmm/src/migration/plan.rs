//! What is agreed for a migration, by QMP's settings and the command line.

use std::time::Duration;

use colo_core::MigrationPlan;
use migration_stream::BoxError;
use migration_stream::io::SendMode;
use migration_stream::precopy::{Limits, ThrottleConfig, ThrottleMeans};
use migration_stream::{Configuration, MachineName, ram};
use multifd::{ChannelCount, Compression, MultifdConfig, ZlibLevel, ZstdLevel};
use qmp_types::{
    MigrationCapability, MultiFdCompression, Parameters, QmpError, Settings, Support,
    ZeroPageDetection,
};
use uuid::Uuid;

use super::Migration;

/// The machine type in the stream. Its devices are this VMM's own, so it is no QEMU machine's name.
const MACHINE: &str = "colo-vmm-1";

/// What this VMM can do of what QMP knows.
pub(super) const SUPPORT: Support = Support {
    capabilities: &[
        MigrationCapability::Xbzrle,
        MigrationCapability::AutoConverge,
        MigrationCapability::Events,
        MigrationCapability::XColo,
        // Memory is released in postcopy only, as in QEMU.
        MigrationCapability::ReleaseRam,
        MigrationCapability::ReturnPath,
        MigrationCapability::PauseBeforeSwitchover,
        MigrationCapability::Multifd,
        MigrationCapability::ValidateUuid,
        MigrationCapability::ZeroCopySend,
    ],
    parameters: &[
        "max-bandwidth",
        "downtime-limit",
        "x-checkpoint-delay",
        "multifd-channels",
        "multifd-compression",
        "multifd-zlib-level",
        "multifd-zstd-level",
        "zero-page-detection",
        "xbzrle-cache-size",
        "throttle-trigger-threshold",
        "cpu-throttle-initial",
        "cpu-throttle-increment",
        "cpu-throttle-tailslow",
        "max-cpu-throttle",
    ],
    compression: &[
        MultiFdCompression::None,
        MultiFdCompression::Zlib,
        MultiFdCompression::Zstd,
    ],
};

impl Migration {
    /// What is agreed for a migration that begins now, frozen for its whole life.
    pub(super) fn plan(&self) -> Result<(MigrationPlan, Option<MultifdConfig>), QmpError> {
        let settings = self.settings();
        let parameters = settings.parameters();
        let capabilities = colo_core::Capabilities {
            x_colo: settings.has(MigrationCapability::XColo),
            return_path: settings.has(MigrationCapability::ReturnPath),
            multifd: settings.has(MigrationCapability::Multifd),
            xbzrle: settings.has(MigrationCapability::Xbzrle),
        };
        let plan = MigrationPlan::new(capabilities, parameters.multifd_channels)
            .map_err(|e| QmpError::generic(e.to_string()))?;
        let compression = match parameters.multifd_compression {
            MultiFdCompression::Zstd => match self.options.zstd_level {
                Some(range) => Compression::ZstdAdaptive(range),
                None => Compression::Zstd(
                    ZstdLevel::new(parameters.multifd_zstd_level).unwrap_or_default(),
                ),
            },
            MultiFdCompression::Zlib => {
                Compression::Zlib(ZlibLevel::new(parameters.multifd_zlib_level).unwrap_or_default())
            }
            _ => Compression::None,
        };
        let multifd = plan
            .multifd()
            .and_then(|n| ChannelCount::new(n.get()))
            .map(|channels| {
                MultifdConfig::new(channels)
                    .compression(compression)
                    .zero_pages(zero_pages(parameters))
                    .send_mode(match settings.has(MigrationCapability::ZeroCopySend) {
                        true => SendMode::ZeroCopy,
                        false => self.options.send_mode,
                    })
                    .uuid(self.options.uuid.map_or([0; 16], Uuid::into_bytes))
                    .stall_limit(self.options.io_limit)
            });
        Ok((plan, multifd))
    }

    /// The configuration section of this VM's streams. With its UUID as a target, which compares
    /// it with one that comes; as a source only where that is asked for.
    pub(super) fn configuration(&self, with_uuid: bool) -> Result<Configuration, BoxError> {
        Ok(Configuration {
            uuid: self
                .options
                .uuid
                .filter(|_| with_uuid)
                .map(Uuid::into_bytes),
            ..Configuration::new(MachineName::new(MACHINE)?)
        })
    }

    pub(super) fn checkpoint_delay(&self) -> Duration {
        Duration::from_millis(u64::from(self.settings().parameters().x_checkpoint_delay))
    }
}

pub(super) fn zero_pages(parameters: &Parameters) -> ram::ZeroPageDetection {
    match parameters.zero_page_detection {
        ZeroPageDetection::None => ram::ZeroPageDetection::None,
        ZeroPageDetection::Legacy => ram::ZeroPageDetection::Legacy,
        _ => ram::ZeroPageDetection::Multifd,
    }
}

/// How a guest is slowed down that writes too much, if it is to be.
pub(super) fn throttling(settings: &Settings) -> Option<ThrottleConfig> {
    let parameters = settings.parameters();
    settings
        .has(MigrationCapability::AutoConverge)
        .then_some(ThrottleConfig {
            trigger_threshold: parameters.throttle_trigger_threshold,
            means: ThrottleMeans::AutoConverge {
                initial: parameters.cpu_throttle_initial,
                increment: parameters.cpu_throttle_increment,
                max: parameters.max_cpu_throttle,
                tailslow: parameters.cpu_throttle_tailslow,
            },
        })
}

pub(super) fn limits(settings: &Settings) -> Limits {
    let parameters = settings.parameters();
    Limits::new(
        parameters.max_bandwidth,
        Duration::from_millis(parameters.downtime_limit),
    )
}
