//! What a machine type says about its stream (`hw/i386/pc_piix.c`, `pc_q35.c` and `hw/core/machine.c`,
//! QEMU 7.2 to 11.1).

use std::str::FromStr;

use crate::MachineName;

/// The version of a machine type: that of the QEMU whose stream it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MachineVersion {
    major: u32,
    minor: u32,
}

impl MachineVersion {
    /// That of the newest QEMU that this workspace is tested against.
    pub const CURRENT: Self = Self::new(11, 1);

    /// Version `major.minor`.
    #[must_use]
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// The version in a machine type's name (`pc-q35-9.2`); `None` for one that has none
    /// (`microvm`).
    #[must_use]
    pub fn of(machine: &MachineName) -> Option<Self> {
        machine.as_str().rsplit_once('-')?.1.parse().ok()
    }

    /// Whether multifd channels are synchronised with every section.
    #[must_use]
    pub fn flushes_each_section(self) -> bool {
        self < Self::new(8, 1)
    }

    /// Whether the switch-over is announced.
    #[must_use]
    pub fn sends_switchover_start(self) -> bool {
        self >= Self::new(10, 0)
    }
}

impl FromStr for MachineVersion {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        s.split_once('.')
            .and_then(|(major, minor)| Some(Self::new(major.parse().ok()?, minor.parse().ok()?)))
            .ok_or_else(|| format!("'{s}' is no version like 11.1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_type_says_its_version_or_none() {
        let of = |name: &str| MachineVersion::of(&MachineName::new(name).unwrap());
        assert_eq!(of("pc-q35-11.1"), Some(MachineVersion::new(11, 1)));
        assert_eq!(of("pc-i440fx-7.2"), Some(MachineVersion::new(7, 2)));
        assert_eq!(of("microvm"), None);
        assert_eq!(of("x-remote"), None);
    }

    #[test]
    fn versions_are_ordered_by_number() {
        let version = |s: &str| s.parse::<MachineVersion>().unwrap();
        assert!(version("8.0").flushes_each_section());
        assert!(!version("8.1").flushes_each_section());
        assert!(!version("9.2").sends_switchover_start());
        assert!(version("10.0").sends_switchover_start());
    }
}
