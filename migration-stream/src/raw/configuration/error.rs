//! What can be wrong with a configuration.

use crate::{Escaped, IdStr, PAGE_SIZE};

/// The longest name of a machine type, bytes.
pub(super) const MACHINE_NAME_MAX: usize = 256;
/// The most capabilities that a configuration lists.
pub(super) const MAX_CAPABILITIES: u32 = 64;

pub(super) const SUBSECTION_VERSION: u32 = 1;

/// What a page of so many address bits is called in an error.
fn page_size(bits: u32) -> String {
    match 1u64.checked_shl(bits) {
        Some(size) => format!("{size} bytes"),
        None => format!("2^{bits} bytes"),
    }
}

/// What is wrong with a configuration section, or does not match this side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigurationError {
    /// The section is not there.
    #[error("section type {found:#04x}, expected the configuration section (0x07)")]
    Missing {
        /// The byte in its place.
        found: u8,
    },
    /// The machine type's length is out of bounds; nothing was allocated for it.
    #[error("machine type of {len} bytes, expected 1 to {max}", max = MACHINE_NAME_MAX)]
    MachineNameLength {
        /// Its length, bytes.
        len: u32,
    },
    /// The machine type is not UTF-8 or contains NUL.
    #[error("machine type is not utf-8 without nul")]
    MachineNameText,
    /// The machine types differ.
    #[error("machine type '{}', expected '{}'", Escaped(.received), Escaped(.local))]
    Machine {
        /// The peer's.
        received: String,
        /// This side's.
        local: String,
    },
    /// A subsection that the configuration does not have.
    #[error("subsection '{name}' is not one of 'configuration'")]
    UnknownSubsection {
        /// Its name.
        name: IdStr,
    },
    /// A subsection is there twice.
    #[error("subsection '{name}' is there twice")]
    RepeatedSubsection {
        /// Its name.
        name: IdStr,
    },
    /// A subsection of another version.
    #[error("subsection '{name}' of version {version}, expected {SUBSECTION_VERSION}")]
    SubsectionVersion {
        /// Its name.
        name: IdStr,
        /// The version received.
        version: u32,
    },
    /// More capabilities than there are.
    #[error("{count} capabilities, at most {max} expected", max = MAX_CAPABILITIES)]
    CapabilityCount {
        /// How many.
        count: u32,
    },
    /// A capability is listed twice.
    #[error("capability '{name}' is there twice")]
    RepeatedCapability {
        /// Its name.
        name: IdStr,
    },
    /// The pages are of another size than x86 has.
    #[error(
        "the source's pages have {} (target page bits {bits}), expected {PAGE_SIZE} bytes",
        page_size(*.bits)
    )]
    PageBits {
        /// The binary logarithm of their size.
        bits: u32,
    },
    /// A capability is on at one side only.
    #[error(
        "capability '{name}' is {} at the source, {} here",
        on(*received),
        on(!*received)
    )]
    Capability {
        /// Its name.
        name: IdStr,
        /// Whether it is on at the source.
        received: bool,
    },
    /// The UUIDs differ.
    #[error("uuid {received:02x?}, expected {local:02x?}")]
    Uuid {
        /// The peer's.
        received: [u8; 16],
        /// This side's.
        local: [u8; 16],
    },
}

const fn on(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
