//! Capabilities and parameters together, as a VM holds them, with the rules between the two.

use crate::capability::{
    Capabilities, MigrationCapability, MigrationCapabilityStatus, ZERO_COPY_CONFLICT,
};
use crate::error::QmpError;
use crate::parameters::{MigrateSetParameters, MultiFdCompression, Parameters};

/// What a VMM can do. Asked for anything else it says so, instead of accepting `tls-creds` and
/// sending guest memory in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    /// Capabilities that can be switched on.
    pub capabilities: &'static [MigrationCapability],
    /// Names of the parameters that have an effect. The others can only be set to their defaults.
    pub parameters: &'static [&'static str],
    /// Values of `multifd-compression`.
    pub compression: &'static [MultiFdCompression],
}

impl Support {
    /// All that QEMU 11.1 knows.
    pub const ALL: Self = Self {
        capabilities: MigrationCapability::ALL,
        parameters: Parameters::NAMES,
        compression: MultiFdCompression::ALL,
    };
}

/// The capabilities and parameters of a VM. Whatever is in here goes together and is supported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    support: Support,
    capabilities: Capabilities,
    parameters: Parameters,
}

impl Settings {
    /// No capability on, and every parameter at its default.
    #[must_use]
    pub fn new(support: Support) -> Self {
        Self {
            support,
            capabilities: Capabilities::default(),
            parameters: Parameters::default(),
        }
    }

    /// The capabilities that are on.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether a capability is on.
    #[must_use]
    pub fn has(&self, capability: MigrationCapability) -> bool {
        self.capabilities.contains(capability)
    }

    /// The parameters.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// `migrate-set-capabilities`. When it fails nothing has changed.
    ///
    /// Whether a migration is on its way is for the caller to know.
    ///
    /// # Errors
    /// As for [`Capabilities::apply`], or a capability that does not go together with a parameter.
    pub fn set_capabilities(
        &mut self,
        changes: &[MigrationCapabilityStatus],
    ) -> Result<(), QmpError> {
        let new = self
            .capabilities
            .apply(changes, self.support.capabilities)?;
        check_together(new, &self.parameters)?;
        self.capabilities = new;
        Ok(())
    }

    /// `migrate-set-parameters`. When it fails nothing has changed.
    ///
    /// # Errors
    /// As for [`Parameters::apply`], a parameter or a compression that is not supported, or one
    /// that does not go together with a capability.
    pub fn set_parameters(&mut self, changes: &MigrateSetParameters) -> Result<(), QmpError> {
        let new = self.parameters.apply(changes)?;
        if !self.support.compression.contains(&new.multifd_compression) {
            return Err(QmpError::invalid_value(
                "multifd-compression",
                new.multifd_compression.name(),
            ));
        }
        let unsupported = new
            .differing(&Parameters::default())
            .into_iter()
            .find(|name| !self.support.parameters.contains(name));
        if let Some(name) = unsupported {
            return Err(QmpError::generic(format!(
                "Parameter '{name}' is not supported by this VMM"
            )));
        }
        check_together(self.capabilities, &new)?;
        self.parameters = new;
        Ok(())
    }
}

/// The rules between capabilities and parameters.
fn check_together(capabilities: Capabilities, parameters: &Parameters) -> Result<(), QmpError> {
    let touches_bytes = parameters.multifd_compression != MultiFdCompression::None
        || !parameters.tls_creds.0.is_empty();
    if touches_bytes && capabilities.contains(MigrationCapability::ZeroCopySend) {
        return Err(QmpError::generic(ZERO_COPY_CONFLICT));
    }
    if touches_bytes && capabilities.contains(MigrationCapability::MappedRam) {
        return Err(QmpError::generic(
            "Mapped-ram only available for non-compressed non-TLS multifd migration",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::StrOrNull;

    const COLO_ONLY: Support = Support {
        capabilities: &[MigrationCapability::XColo, MigrationCapability::ReturnPath],
        parameters: &["x-checkpoint-delay", "multifd-compression"],
        compression: &[MultiFdCompression::None, MultiFdCompression::Zstd],
    };

    fn on(capability: MigrationCapability) -> MigrationCapabilityStatus {
        MigrationCapabilityStatus {
            capability,
            state: true,
        }
    }

    #[test]
    fn a_parameter_without_effect_is_refused_unless_it_says_what_is_the_case_anyway() {
        let mut settings = Settings::new(COLO_ONLY);
        let mut changes = MigrateSetParameters {
            tls_creds: Some(StrOrNull("tls0".into())),
            x_checkpoint_delay: Some(100),
            ..Default::default()
        };
        assert_eq!(
            settings.set_parameters(&changes).unwrap_err().desc,
            "Parameter 'tls-creds' is not supported by this VMM"
        );
        assert_eq!(settings, Settings::new(COLO_ONLY));

        changes.tls_creds = Some(StrOrNull::default());
        settings.set_parameters(&changes).unwrap();
        assert_eq!(settings.parameters().x_checkpoint_delay, 100);
    }

    #[test]
    fn a_compression_that_is_not_built_is_no_value() {
        let changes = MigrateSetParameters {
            multifd_compression: Some(MultiFdCompression::Zlib),
            ..Default::default()
        };
        assert_eq!(
            Settings::new(COLO_ONLY)
                .set_parameters(&changes)
                .unwrap_err()
                .desc,
            "Parameter 'multifd-compression' does not accept value 'zlib'"
        );
    }

    #[test]
    fn zero_copy_and_compression_exclude_each_other_in_either_order() {
        let compress = MigrateSetParameters {
            multifd_compression: Some(MultiFdCompression::Zstd),
            ..Default::default()
        };
        let zero_copy = [
            on(MigrationCapability::ZeroCopySend),
            on(MigrationCapability::Multifd),
        ];
        let refused = Err(QmpError::generic(ZERO_COPY_CONFLICT));

        let mut settings = Settings::new(Support::ALL);
        settings.set_parameters(&compress).unwrap();
        assert_eq!(settings.set_capabilities(&zero_copy), refused);

        let mut settings = Settings::new(Support::ALL);
        settings.set_capabilities(&zero_copy).unwrap();
        assert_eq!(settings.set_parameters(&compress), refused);
    }

    #[test]
    fn every_range_is_checked_and_nothing_of_a_refused_change_stays() {
        for (json, text) in [
            (
                r#"{"throttle-trigger-threshold":0}"#,
                "Option throttle-trigger-threshold expects an integer in the range of 1 to 100",
            ),
            (
                r#"{"cpu-throttle-initial":0}"#,
                "Option cpu-throttle-initial expects an integer in the range of 1 to 99",
            ),
            (
                r#"{"cpu-throttle-increment":100}"#,
                "Option cpu-throttle-increment expects an integer in the range of 1 to 99",
            ),
            (
                r#"{"max-cpu-throttle":5}"#,
                "Option max-cpu-throttle expects an integer in the range of cpu-throttle-initial to 99",
            ),
            (
                r#"{"max-cpu-throttle":30,"cpu-throttle-initial":40}"#,
                "Option max-cpu-throttle expects an integer in the range of cpu-throttle-initial to 99",
            ),
            (
                r#"{"downtime-limit":2000001}"#,
                "Option downtime-limit expects an integer in the range of 0 to 2000000 ms",
            ),
            (
                r#"{"multifd-channels":0,"downtime-limit":5}"#,
                "Option multifd-channels expects a value between 1 and 255",
            ),
            (
                r#"{"multifd-zlib-level":10}"#,
                "Option multifd-zlib-level expects a value between 0 and 9",
            ),
            (
                r#"{"multifd-qatzip-level":0}"#,
                "Option multifd-qatzip-level expects a value between 1 and 9",
            ),
            (
                r#"{"multifd-zstd-level":21}"#,
                "Option multifd-zstd-level expects a value between 0 and 20",
            ),
            (
                r#"{"xbzrle-cache-size":4097}"#,
                "Option xbzrle-cache-size expects a power of two no less than the target page size",
            ),
            (
                r#"{"xbzrle-cache-size":2048}"#,
                "Option xbzrle-cache-size expects a power of two no less than the target page size",
            ),
            (
                r#"{"announce-initial":100001}"#,
                "Option announce-initial expects a value between 0 and 100000",
            ),
            (
                r#"{"announce-max":100001}"#,
                "Option announce-max expects a value between 0 and 100000",
            ),
            (
                r#"{"announce-rounds":1001}"#,
                "Option announce-rounds expects a value between 0 and 1000",
            ),
            (
                r#"{"announce-step":0}"#,
                "Option announce-step expects a value between 1 and 10000",
            ),
            (
                r#"{"x-vcpu-dirty-limit-period":0}"#,
                "Option x-vcpu-dirty-limit-period expects a value between 1 and 1000",
            ),
            (
                r#"{"vcpu-dirty-limit":0}"#,
                "Option vcpu-dirty-limit expects a value of at least 1 MB/s",
            ),
            (
                r#"{"x-rdma-chunk-size":2097153}"#,
                "Option x-rdma-chunk-size expects a power of 2 in the range 1MiB to 1024MiB",
            ),
        ] {
            let mut settings = Settings::new(Support::ALL);
            let changes = serde_json::from_str(json).unwrap();
            assert_eq!(
                settings.set_parameters(&changes),
                Err(QmpError::generic(text)),
                "{json}"
            );
            assert_eq!(settings, Settings::new(Support::ALL));
        }
    }
}
