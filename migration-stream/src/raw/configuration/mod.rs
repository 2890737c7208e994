//! The configuration section: the machine type and what else both sides must agree on
//! (`migration/savevm.c`, QEMU 11.1).
//!
//! ```text
//! 0x07  be32 length  machine type name  { 0x05 counted name  be32 version  body }
//! ```
//!
//! It has neither id nor footer, and its end is only known from the byte that follows it.

mod error;
mod machine_name;

pub use self::error::ConfigurationError;
use self::error::{MAX_CAPABILITIES, SUBSECTION_VERSION};
pub use self::machine_name::MachineName;
use std::collections::BTreeSet;

use bytes::BufMut;

use crate::error::DecodeError;
use crate::name::put_counted;
use crate::raw::codec::Reader;
use crate::raw::section::SectionType;
use crate::{IdStr, PAGE_SIZE};

const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";
/// The capability that leaves shared blocks where they are.
pub const IGNORE_SHARED: &str = "x-ignore-shared";
/// The capability that gives every page its place in a file.
pub const MAPPED_RAM: &str = "mapped-ram";

/// A configuration section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The machine type.
    pub machine: MachineName,
    /// log2 of the target page size, where it is not the architecture's smallest (never on x86).
    pub page_bits: Option<u32>,
    /// Those migration capabilities that both sides must have on (of QEMU 11.1's, `mapped-ram` and
    /// `x-ignore-shared`). An absent list on the wire is the same as an empty one.
    pub capabilities: BTreeSet<IdStr>,
    /// The VM's UUID, when it is to be validated.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// More capabilities than QEMU knows; it bounds what a hostile peer can make us hold.
    pub const MAX_CAPABILITIES: u32 = MAX_CAPABILITIES;

    /// A configuration that consists of the machine type only, as QEMU's does by default.
    #[must_use]
    pub const fn new(machine: MachineName) -> Self {
        Self {
            machine,
            page_bits: None,
            capabilities: BTreeSet::new(),
            uuid: None,
        }
    }

    /// The same with `capability` on; one whose name is none changes nothing.
    #[must_use]
    pub fn with(mut self, capability: &str) -> Self {
        self.capabilities.extend(IdStr::new(capability));
        self
    }

    /// Whether `capability` is on.
    #[must_use]
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|c| c.as_str() == capability)
    }

    /// Appends the section, type byte included.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u8(SectionType::Configuration.byte());
        let name = self.machine.as_str();
        #[allow(clippy::cast_possible_truncation)] // at most MachineName::MAX_LEN
        out.put_u32(name.len() as u32);
        out.put_slice(name.as_bytes());
        if let Some(bits) = self.page_bits {
            subsection(PAGE_BITS, out);
            out.put_u32(bits);
        }
        if !self.capabilities.is_empty() {
            subsection(CAPABILITIES, out);
            #[allow(clippy::cast_possible_truncation)] // a count of names in memory
            out.put_u32(self.capabilities.len() as u32);
            for name in &self.capabilities {
                name.encode(out);
            }
        }
        if let Some(uuid) = &self.uuid {
            subsection(UUID, out);
            out.put_slice(uuid);
        }
    }

    /// Reads what follows the type byte, up to and without the byte after the section, which must
    /// be there: it tells that no subsection follows.
    ///
    /// # Errors
    /// [`ConfigurationError`], or the bytes end too early.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::decode_checked(r, |_| Ok(()))
    }

    /// As [`Configuration::decode`], and checks against what this side has as
    /// [`Configuration::check`] does; the machine type as soon as it is there.
    ///
    /// # Errors
    /// As for both.
    pub fn decode_matching(r: &mut Reader<'_>, local: &Self) -> Result<Self, DecodeError> {
        let at = r.clone();
        let received = Self::decode_checked(r, |machine| local.check_machine(machine))?;
        local.check(&received).map_err(|e| at.error(e))?;
        Ok(received)
    }

    fn decode_checked(
        r: &mut Reader<'_>,
        check_machine: impl Fn(&MachineName) -> Result<(), ConfigurationError>,
    ) -> Result<Self, DecodeError> {
        let at = r.clone();
        let len = r.be32()?;
        let len = usize::try_from(len)
            .ok()
            .filter(|len| (1..=MachineName::MAX_LEN).contains(len))
            .ok_or_else(|| at.error(ConfigurationError::MachineNameLength { len }))?;
        let machine = std::str::from_utf8(r.take(len)?)
            .map_err(|_| ConfigurationError::MachineNameText)
            .and_then(MachineName::new)
            .and_then(|machine| check_machine(&machine).map(|()| machine))
            .map_err(|e| at.error(e))?;
        let mut configuration = Self::new(machine);
        let mut seen = Seen::default();
        while r.clone().u8()? == SectionType::Subsection.byte() {
            configuration.decode_subsection(r, &mut seen)?;
        }
        Ok(configuration)
    }

    fn decode_subsection(
        &mut self,
        r: &mut Reader<'_>,
        seen: &mut Seen,
    ) -> Result<(), DecodeError> {
        let at = r.clone();
        r.u8()?;
        let name = r.idstr()?;
        let seen = match name.as_str() {
            PAGE_BITS => &mut seen.page_bits,
            CAPABILITIES => &mut seen.capabilities,
            UUID => &mut seen.uuid,
            _ => return Err(at.error(ConfigurationError::UnknownSubsection { name })),
        };
        if std::mem::replace(seen, true) {
            return Err(at.error(ConfigurationError::RepeatedSubsection { name }));
        }
        let version = r.be32()?;
        if version != SUBSECTION_VERSION {
            return Err(at.error(ConfigurationError::SubsectionVersion { name, version }));
        }
        match name.as_str() {
            PAGE_BITS => {
                let at = r.clone();
                let bits = r.be32()?;
                check_page_bits(Some(bits)).map_err(|e| at.error(e))?;
                self.page_bits = Some(bits);
            }
            CAPABILITIES => {
                let at = r.clone();
                let count = r.be32()?;
                if count > Self::MAX_CAPABILITIES {
                    return Err(at.error(ConfigurationError::CapabilityCount { count }));
                }
                for _ in 0..count {
                    let at = r.clone();
                    let name = r.idstr()?;
                    if !self.capabilities.insert(name.clone()) {
                        return Err(at.error(ConfigurationError::RepeatedCapability { name }));
                    }
                }
            }
            _ => self.uuid = Some(r.array()?),
        }
        Ok(())
    }

    /// Whether a stream with the configuration `received` can be loaded by a VM with this one.
    ///
    /// Machine types are compared as a whole (QEMU takes any prefix of its own), capabilities as
    /// sets. A UUID is compared when both sides have one.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, received: &Self) -> Result<(), ConfigurationError> {
        self.check_machine(&received.machine)?;
        self.check_page_size()?;
        received.check_page_size()?;
        if let Some(name) = self
            .capabilities
            .symmetric_difference(&received.capabilities)
            .next()
        {
            return Err(ConfigurationError::Capability {
                received: received.capabilities.contains(name),
                name: name.clone(),
            });
        }
        match (self.uuid, received.uuid) {
            (Some(local), Some(received)) if local != received => {
                Err(ConfigurationError::Uuid { received, local })
            }
            _ => Ok(()),
        }
    }

    /// Whether the pages are of the one size that there is here, [`PAGE_SIZE`].
    ///
    /// # Errors
    /// [`ConfigurationError::PageBits`].
    pub const fn check_page_size(&self) -> Result<(), ConfigurationError> {
        check_page_bits(self.page_bits)
    }

    fn check_machine(&self, received: &MachineName) -> Result<(), ConfigurationError> {
        if *received == self.machine {
            Ok(())
        } else {
            Err(ConfigurationError::Machine {
                received: received.as_str().into(),
                local: self.machine.as_str().into(),
            })
        }
    }
}

const fn check_page_bits(bits: Option<u32>) -> Result<(), ConfigurationError> {
    match bits {
        None => Ok(()),
        Some(bits) if bits == PAGE_SIZE.trailing_zeros() => Ok(()),
        Some(bits) => Err(ConfigurationError::PageBits { bits }),
    }
}

/// Which subsections were there.
#[derive(Default)]
struct Seen {
    page_bits: bool,
    capabilities: bool,
    uuid: bool,
}

fn subsection(name: &str, out: &mut impl BufMut) {
    out.put_u8(SectionType::Subsection.byte());
    put_counted(out, name);
    out.put_u32(SUBSECTION_VERSION);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;

    fn q35() -> Configuration {
        Configuration::new(MachineName::new("pc-q35-11.1").unwrap())
    }

    fn encoded(c: &Configuration) -> Vec<u8> {
        let mut out = Vec::new();
        c.encode(&mut out);
        out
    }

    /// The cause for which a section is refused, without its type byte.
    fn refused(bytes: &[u8]) -> Cause {
        Configuration::decode(&mut Reader::new(bytes, 9))
            .unwrap_err()
            .cause
    }

    #[test]
    fn the_subsections_are_the_bytes_that_qemu_sends() {
        let mut c = q35();
        c.capabilities
            .insert(IdStr::new("x-ignore-shared").unwrap());
        c.uuid = Some([
            0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee,
            0xff,
        ]);
        let bytes = [
            b"\x07\0\0\0\x0bpc-q35-11.1".as_slice(),
            b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared",
            b"\x05\x12configuration/uuid\0\0\0\x01",
            b"\0\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
        ]
        .concat();
        assert_eq!(encoded(&c), bytes);
        let mut followed = bytes;
        followed.push(1);
        let mut r = Reader::new(&followed[1..], 9);
        assert_eq!(Configuration::decode(&mut r).unwrap(), c);
        assert_eq!(r.rest(), [1]);
    }

    #[test]
    fn c4_a_prefix_of_the_machine_type_is_refused_and_so_is_an_extension() {
        for name in ["pc-q35", "pc-q35-11.1x", "pc-q35-11.2"] {
            let bytes = encoded(&Configuration::new(MachineName::new(name).unwrap()));
            // The byte after the section is not there yet: the name alone decides.
            let e = Configuration::decode_matching(&mut Reader::new(&bytes[1..], 9), &q35())
                .unwrap_err();
            assert_eq!(
                e.to_string(),
                format!("byte 0x9 of the stream: machine type '{name}', expected 'pc-q35-11.1'")
            );
        }
    }

    #[test]
    fn c19_a_machine_type_of_4_gib_is_refused_by_its_length_alone() {
        for len in [u32::MAX, 257, 0] {
            assert_eq!(
                refused(&len.to_be_bytes()),
                ConfigurationError::MachineNameLength { len }.into()
            );
        }
    }

    #[test]
    fn c19_a_capability_count_from_the_wire_is_bounded() {
        let bytes = b"\0\0\0\x01q\x05\x1aconfiguration/capabilities\0\0\0\x01\xff\xff\xff\xff";
        assert_eq!(
            refused(bytes),
            ConfigurationError::CapabilityCount { count: u32::MAX }.into()
        );
    }

    #[test]
    fn a_subsection_that_does_not_exist_is_refused() {
        assert!(matches!(
            refused(b"\0\0\0\x01q\x05\x0fconfiguration/x\0\0\0\x01"),
            Cause::Configuration(ConfigurationError::UnknownSubsection { .. })
        ));
    }

    #[test]
    fn pages_of_another_size_are_refused_with_both_sizes() {
        for (bits, size) in [
            (10, "1024"),
            (13, "8192"),
            (16, "65536"),
            (64, "2^64"),
            (u32::MAX, "2^4294967295"),
        ] {
            let mut other = q35();
            other.page_bits = Some(bits);
            let bytes = encoded(&other);
            let error = Configuration::decode(&mut Reader::new(&bytes[1..], 9)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(&format!("pages have {size} bytes")), "{text}");
            assert!(text.contains("expected 4096 bytes"), "{text}");
        }
    }

    #[test]
    fn what_differs_is_named() {
        let local = q35();
        let with = |change: fn(&mut Configuration)| {
            let mut other = q35();
            change(&mut other);
            local.check(&other)
        };
        assert_eq!(with(|_| ()), Ok(()));
        assert_eq!(with(|c| c.uuid = Some([1; 16])), Ok(()));
        assert_eq!(
            with(|c| c.page_bits = Some(14)),
            Err(ConfigurationError::PageBits { bits: 14 })
        );
        assert_eq!(with(|c| c.page_bits = Some(12)), Ok(()));
        let e = with(|c| {
            c.capabilities.insert(IdStr::new("mapped-ram").unwrap());
        })
        .unwrap_err();
        assert_eq!(
            e.to_string(),
            "capability 'mapped-ram' is on at the source, off here"
        );
        let mut validated = q35();
        validated.uuid = Some([2; 16]);
        let mut other = q35();
        other.uuid = Some([1; 16]);
        assert!(matches!(
            validated.check(&other),
            Err(ConfigurationError::Uuid { .. })
        ));
    }
}
