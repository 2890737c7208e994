//! Migration capabilities: what a migration is to do, switched on or off one by one on both sides.

use serde::{Deserialize, Serialize};

use crate::error::QmpError;

qapi_enum! {
    /// A migration capability (`MigrationCapability`), in the order of QEMU 11.1.
    pub enum MigrationCapability {
        /// Pages as differences to what was sent before.
        Xbzrle = "xbzrle",
        /// RDMA with all memory pinned.
        RdmaPinAll = "rdma-pin-all",
        /// Slow the guest down until the migration converges.
        AutoConverge = "auto-converge",
        /// MIGRATION and MIGRATION_PASS events.
        Events = "events",
        /// Fetch pages after the guest has moved.
        PostcopyRam = "postcopy-ram",
        /// Do not end the migration, go on with checkpoints (COLO).
        XColo = "x-colo",
        /// Free RAM on the source as it is sent.
        ReleaseRam = "release-ram",
        /// Messages from the destination back to the source.
        ReturnPath = "return-path",
        /// Wait for `migrate-continue` before the hand-over.
        PauseBeforeSwitchover = "pause-before-switchover",
        /// Pages over several channels in addition to the main one.
        Multifd = "multifd",
        /// Dirty bitmaps of block devices.
        DirtyBitmaps = "dirty-bitmaps",
        /// Measure how long postcopy keeps vCPUs waiting.
        PostcopyBlocktime = "postcopy-blocktime",
        /// Take block devices over only when the guest starts.
        LateBlockActivate = "late-block-activate",
        /// Leave out RAM that both sides share.
        XIgnoreShared = "x-ignore-shared",
        /// Compare the UUIDs of both VMs.
        ValidateUuid = "validate-uuid",
        /// A snapshot of one moment, taken while the guest runs.
        BackgroundSnapshot = "background-snapshot",
        /// `MSG_ZEROCOPY` on the source.
        ZeroCopySend = "zero-copy-send",
        /// A channel of its own for pages a vCPU waits for.
        PostcopyPreempt = "postcopy-preempt",
        /// The destination says when it is ready for the hand-over.
        SwitchoverAck = "switchover-ack",
        /// Slow down only vCPUs that dirty memory.
        DirtyLimit = "dirty-limit",
        /// Pages at fixed offsets of a file.
        MappedRam = "mapped-ram",
    }
}

/// A capability and whether it is on: an element of `migrate-set-capabilities`' argument and of
/// `query-migrate-capabilities`' answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapabilityStatus {
    /// Which.
    pub capability: MigrationCapability,
    /// On or off.
    pub state: bool,
}

from_qapi_struct!(MigrationCapabilityStatus {
    capability = "capability",
    state = "state",
});

/// What cannot go together with `background-snapshot`, in the order in which QEMU looks.
const BACKGROUND_SNAPSHOT_CONFLICTS: [MigrationCapability; 14] = [
    MigrationCapability::PostcopyRam,
    MigrationCapability::DirtyBitmaps,
    MigrationCapability::PostcopyBlocktime,
    MigrationCapability::LateBlockActivate,
    MigrationCapability::ReturnPath,
    MigrationCapability::Multifd,
    MigrationCapability::PauseBeforeSwitchover,
    MigrationCapability::AutoConverge,
    MigrationCapability::ReleaseRam,
    MigrationCapability::RdmaPinAll,
    MigrationCapability::Xbzrle,
    MigrationCapability::XColo,
    MigrationCapability::ValidateUuid,
    MigrationCapability::ZeroCopySend,
];

/// The capabilities that are on. All of a value's capabilities go together: the only way to one is
/// [`Capabilities::apply`], which checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u32);

impl Capabilities {
    const fn bit(capability: MigrationCapability) -> u32 {
        1 << capability as u32
    }

    /// Whether a capability is on.
    #[must_use]
    pub const fn contains(self, capability: MigrationCapability) -> bool {
        self.0 & Self::bit(capability) != 0
    }

    /// The capabilities after a list of changes, of which the last for a capability counts. Either
    /// all of them hold or none.
    ///
    /// `supported` is what the VMM can do: switching anything else on is refused, switching it off
    /// is not.
    ///
    /// # Errors
    /// A capability that is not supported, or one that does not go together with another, in
    /// QEMU's words where QEMU refuses it too. QEMU accepts `xbzrle` together with `x-colo` and
    /// then corrupts the secondary's memory; here it is refused.
    pub fn apply(
        self,
        changes: &[MigrationCapabilityStatus],
        supported: &[MigrationCapability],
    ) -> Result<Self, QmpError> {
        let mut new = self;
        for change in changes {
            let bit = Self::bit(change.capability);
            if !change.state {
                new.0 &= !bit;
            } else if supported.contains(&change.capability) {
                new.0 |= bit;
            } else {
                return Err(QmpError::generic(not_supported(change.capability)));
            }
        }
        new.check()?;
        Ok(new)
    }

    /// Every capability with its state, in the schema's order: the answer to
    /// `query-migrate-capabilities`.
    #[must_use]
    pub fn to_list(self) -> Vec<MigrationCapabilityStatus> {
        MigrationCapability::ALL
            .iter()
            .map(|&capability| MigrationCapabilityStatus {
                capability,
                state: self.contains(capability),
            })
            .collect()
    }

    fn check(self) -> Result<(), QmpError> {
        use MigrationCapability as C;
        let has = |capability| self.contains(capability);
        let refuse = |text: &str| Err(QmpError::generic(text));
        let requires = |capability: C, other: C| {
            Err(QmpError::generic(format!(
                "Capability '{capability}' requires capability '{other}'"
            )))
        };

        if has(C::PostcopyRam) && has(C::XIgnoreShared) {
            return refuse("Postcopy is not compatible with ignore-shared");
        }
        if has(C::BackgroundSnapshot)
            && let Some(other) = BACKGROUND_SNAPSHOT_CONFLICTS.iter().find(|&&c| has(c))
        {
            return refuse(&format!(
                "Background-snapshot is not compatible with {other}"
            ));
        }
        if has(C::ZeroCopySend) && (!has(C::Multifd) || has(C::Xbzrle)) {
            return refuse(ZERO_COPY_CONFLICT);
        }
        if has(C::PostcopyPreempt) && !has(C::PostcopyRam) {
            return refuse("Postcopy preempt requires postcopy-ram");
        }
        if has(C::SwitchoverAck) && !has(C::ReturnPath) {
            return requires(C::SwitchoverAck, C::ReturnPath);
        }
        if has(C::DirtyLimit) && has(C::AutoConverge) {
            return refuse(
                "dirty-limit conflicts with auto-converge either of then available currently",
            );
        }
        if has(C::Multifd) && has(C::Xbzrle) {
            return refuse("Multifd is not compatible with xbzrle");
        }
        if has(C::MappedRam) && has(C::Xbzrle) {
            return refuse("Mapped-ram migration is incompatible with xbzrle");
        }
        if has(C::MappedRam) && has(C::PostcopyRam) {
            return refuse("Mapped-ram migration is incompatible with postcopy");
        }
        if has(C::XColo) && !has(C::ReturnPath) {
            return requires(C::XColo, C::ReturnPath);
        }
        if has(C::XColo) && has(C::Xbzrle) {
            return refuse("Capability 'x-colo' is not compatible with capability 'xbzrle'");
        }
        Ok(())
    }
}

/// QEMU's text where it may lack the capability, else ours.
fn not_supported(capability: MigrationCapability) -> String {
    match capability {
        MigrationCapability::BackgroundSnapshot => {
            "Background-snapshot is not supported by host kernel".to_owned()
        }
        MigrationCapability::DirtyLimit => {
            "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set".to_owned()
        }
        MigrationCapability::PostcopyRam => "Postcopy is not supported: not by this VMM".to_owned(),
        other => format!("Capability '{other}' is not supported by this VMM"),
    }
}

/// QEMU's text for `zero-copy-send` with anything that touches the bytes of a page.
pub(crate) const ZERO_COPY_CONFLICT: &str =
    "Zero copy only available for non-compressed non-TLS multifd migration";

#[cfg(test)]
mod tests {
    use MigrationCapability as C;

    use super::*;

    fn on(capabilities: &[C]) -> Vec<MigrationCapabilityStatus> {
        capabilities
            .iter()
            .map(|&capability| MigrationCapabilityStatus {
                capability,
                state: true,
            })
            .collect()
    }

    #[test]
    fn what_does_not_go_together_is_refused_in_qemus_words() {
        for (capabilities, text) in [
            (
                &[C::XColo][..],
                "Capability 'x-colo' requires capability 'return-path'",
            ),
            (
                &[C::SwitchoverAck],
                "Capability 'switchover-ack' requires capability 'return-path'",
            ),
            (
                &[C::PostcopyPreempt],
                "Postcopy preempt requires postcopy-ram",
            ),
            (&[C::ZeroCopySend], ZERO_COPY_CONFLICT),
            (
                &[C::ZeroCopySend, C::Multifd, C::Xbzrle],
                ZERO_COPY_CONFLICT,
            ),
            (
                &[C::Multifd, C::Xbzrle],
                "Multifd is not compatible with xbzrle",
            ),
            (
                &[C::MappedRam, C::Xbzrle],
                "Mapped-ram migration is incompatible with xbzrle",
            ),
            (
                &[C::MappedRam, C::PostcopyRam],
                "Mapped-ram migration is incompatible with postcopy",
            ),
            (
                &[C::PostcopyRam, C::XIgnoreShared],
                "Postcopy is not compatible with ignore-shared",
            ),
            (
                &[C::BackgroundSnapshot, C::XColo, C::ReturnPath],
                "Background-snapshot is not compatible with return-path",
            ),
            (
                &[C::DirtyLimit, C::AutoConverge],
                "dirty-limit conflicts with auto-converge either of then available currently",
            ),
        ] {
            assert_eq!(
                Capabilities::default().apply(&on(capabilities), C::ALL),
                Err(QmpError::generic(text))
            );
        }
    }

    #[test]
    fn colo_with_xbzrle_is_refused_although_qemu_accepts_it() {
        assert_eq!(
            Capabilities::default()
                .apply(&on(&[C::XColo, C::ReturnPath, C::Xbzrle]), C::ALL)
                .unwrap_err()
                .desc,
            "Capability 'x-colo' is not compatible with capability 'xbzrle'"
        );
    }

    #[test]
    fn a_requirement_cannot_be_taken_away_afterwards() {
        let colo = Capabilities::default()
            .apply(&on(&[C::XColo, C::ReturnPath]), C::ALL)
            .unwrap();
        let without = [MigrationCapabilityStatus {
            capability: C::ReturnPath,
            state: false,
        }];
        assert!(colo.apply(&without, C::ALL).is_err());
        assert!(colo.contains(C::XColo) && colo.contains(C::ReturnPath));
    }

    #[test]
    fn what_the_vmm_cannot_do_can_be_switched_off_but_not_on() {
        let supported = [C::XColo, C::ReturnPath];
        let mut changes = on(&[C::PostcopyRam]);
        assert_eq!(
            Capabilities::default()
                .apply(&changes, &supported)
                .unwrap_err()
                .desc,
            "Postcopy is not supported: not by this VMM"
        );
        changes[0].state = false;
        assert_eq!(
            Capabilities::default().apply(&changes, &supported),
            Ok(Capabilities::default())
        );
    }

    #[test]
    fn the_list_has_every_capability_in_the_schemas_order() {
        let list = Capabilities::default()
            .apply(&on(&[C::MappedRam]), C::ALL)
            .unwrap()
            .to_list();
        assert_eq!(list.len(), 21);
        assert_eq!(list[0].capability, C::Xbzrle);
        assert_eq!(
            list.iter()
                .filter(|s| s.state)
                .map(|s| s.capability)
                .collect::<Vec<_>>(),
            [C::MappedRam]
        );
    }
}
