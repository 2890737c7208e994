//! The capabilities of a migration.

use std::num::NonZeroU8;

/// The capabilities a management layer has set, as far as COLO depends on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `x-colo`.
    pub x_colo: bool,
    /// `return-path`.
    pub return_path: bool,
    /// `multifd`.
    pub multifd: bool,
    /// `xbzrle`.
    pub xbzrle: bool,
}

/// A set of capabilities that can work together, frozen when the migration starts and the same
/// until it ends: through precopy, every checkpoint and failover.
///
/// A VMM's QMP settings may change when the migration is over. Code within the migration asks the plan, and always
/// gets the same answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationPlan {
    colo: bool,
    return_path: bool,
    multifd: Option<NonZeroU8>,
    xbzrle: bool,
}

impl MigrationPlan {
    /// Checks that the capabilities go together. `multifd_channels` is the parameter
    /// `multifd-channels`, looked at only with `multifd`.
    ///
    /// # Errors
    /// The first conflict, in the words QEMU has for it where it has any.
    pub fn new(capabilities: Capabilities, multifd_channels: u8) -> Result<Self, PlanError> {
        let Capabilities {
            x_colo,
            return_path,
            multifd,
            xbzrle,
        } = capabilities;
        if x_colo && !return_path {
            return Err(PlanError::ColoWithoutReturnPath);
        }
        if x_colo && xbzrle {
            return Err(PlanError::ColoWithXbzrle);
        }
        if multifd && xbzrle {
            return Err(PlanError::MultifdWithXbzrle);
        }
        let multifd = match (multifd, NonZeroU8::new(multifd_channels)) {
            (false, _) => None,
            (true, Some(channels)) => Some(channels),
            (true, None) => return Err(PlanError::NoMultifdChannels),
        };
        Ok(Self {
            colo: x_colo,
            return_path,
            multifd,
            xbzrle,
        })
    }

    /// Returns whether this migration goes over into COLO.
    ///
    /// Both sides ask this from the first byte on: it decides whether the destination makes a RAM cache and refuses
    /// RAM discard, whether block devices stay active at the switchover, and whether the end of precopy is the end.
    /// (QEMU before 11.0 tells its destination by a command in the stream.)
    #[must_use]
    pub const fn migrate_colo(&self) -> bool {
        self.colo
    }

    /// Returns whether the return path is used. Always with COLO.
    #[must_use]
    pub const fn return_path(&self) -> bool {
        self.return_path
    }

    /// Returns how many multifd channels carry the pages; `None`: the main channel does.
    #[must_use]
    pub const fn multifd(&self) -> Option<NonZeroU8> {
        self.multifd
    }

    /// Returns whether pages may be sent as XBZRLE deltas. Never with COLO or multifd.
    #[must_use]
    pub const fn xbzrle(&self) -> bool {
        self.xbzrle
    }
}

/// Capabilities that do not go together. The texts are those of QMP replies, hence not in this
/// crate's usual style.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The secondary answers on the return path.
    #[error("Capability 'x-colo' requires capability 'return-path'")]
    ColoWithoutReturnPath,
    /// The final precopy pass leaves the sender's XBZRLE cache behind the destination's memory, so
    /// that deltas of the first checkpoint would silently corrupt it. QEMU accepts the pair.
    #[error("Capability 'x-colo' is not compatible with capability 'xbzrle'")]
    ColoWithXbzrle,
    /// Deltas need the order of the main channel.
    #[error("Multifd is not compatible with xbzrle")]
    MultifdWithXbzrle,
    /// Multifd without a channel.
    #[error("Option multifd-channels expects a value between 1 and 255")]
    NoMultifdChannels,
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLO: Capabilities = Capabilities {
        x_colo: true,
        return_path: true,
        multifd: false,
        xbzrle: false,
    };

    #[test]
    fn colo_needs_the_return_path_and_says_so_in_qemus_words() {
        let error = MigrationPlan::new(
            Capabilities {
                return_path: false,
                ..COLO
            },
            2,
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "Capability 'x-colo' requires capability 'return-path'"
        );
    }

    #[test]
    fn xbzrle_is_refused_with_colo_and_with_multifd() {
        let with_colo = Capabilities {
            xbzrle: true,
            ..COLO
        };
        assert_eq!(
            MigrationPlan::new(with_colo, 2),
            Err(PlanError::ColoWithXbzrle)
        );
        let with_multifd = Capabilities {
            multifd: true,
            xbzrle: true,
            ..Capabilities::default()
        };
        assert_eq!(
            MigrationPlan::new(with_multifd, 2),
            Err(PlanError::MultifdWithXbzrle)
        );
    }

    #[test]
    fn channels_count_only_with_multifd() {
        let plain = MigrationPlan::new(COLO, 0).unwrap();
        assert!(plain.migrate_colo());
        assert_eq!(plain.multifd(), None);
        let multifd = Capabilities {
            multifd: true,
            ..COLO
        };
        assert_eq!(
            MigrationPlan::new(multifd, 2).unwrap().multifd(),
            NonZeroU8::new(2)
        );
        assert_eq!(
            MigrationPlan::new(multifd, 0),
            Err(PlanError::NoMultifdChannels)
        );
    }
}
