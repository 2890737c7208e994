//! Device sections that stand before RAM.
//!
//! QEMU sends a few devices before the pages of RAM, because the destination needs their state to
//! receive pages (`early_setup` in `include/migration/vmstate.h`, QEMU 11.1: the first part of
//! virtio-mem). QEMU 11 sends them before RAM's START section, QEMU 10 behind it. A section
//! carries no length, and the description that says how long it is comes at the stream's end. A tool
//! that does not know the device therefore takes the section to end where its footer is followed by the
//! head of another section, and compares the length with the description when that has come.
//!
//! A guest that controls the content of such a section could place a footer and a head there. The
//! comparison then fails, and the guest stays at its source.

use bytes::BufMut;

use crate::error::{Cause, DecodeError};
use crate::raw::codec::Reader;
use crate::raw::command::Command;
use crate::raw::device_blob::DeviceSection;
use crate::raw::ram::{RAM_IDSTR, RAM_VERSION, is_setup_total};
use crate::raw::section::{Announcement, SectionError, SectionType, decode_footer, encode_footer};
use crate::raw::vmdesc::VmDescription;
use crate::{IdStr, InstanceId, SectionHeader, SectionId};

/// No device counts its versions this far.
const MAX_VERSION: u32 = 0xffff;

/// Device sections that stand before RAM, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlySections {
    sections: Vec<(SectionHeader, Vec<u8>)>,
    body_bytes: usize,
}

impl EarlySections {
    /// No sections: what most guests have.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            sections: Vec::new(),
            body_bytes: 0,
        }
    }

    /// Number of sections.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.sections.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    /// The sections.
    pub fn sections(&self) -> impl ExactSizeIterator<Item = DeviceSection<'_>> + '_ {
        self.sections.iter().map(|(header, body)| DeviceSection {
            header: header.clone(),
            body,
        })
    }

    /// Appends the sections as a source sends them that numbers them from `first` on.
    pub fn encode(&self, first: SectionId, out: &mut impl BufMut) {
        for (section, id) in self.sections().zip(first.0..) {
            let mut header = section.header;
            header.id = SectionId(id);
            DeviceSection { header, ..section }.encode(out);
        }
    }

    /// Reads sections that were [encoded](Self::encode) and belong to a stream with this description,
    /// which says how long they are.
    ///
    /// # Errors
    /// [`EarlyError`]: the bytes are not the first sections that the description names.
    pub fn decode(bytes: &[u8], description: &VmDescription) -> Result<Self, EarlyError> {
        let mut r = Reader::new(bytes, 0);
        let mut early = Self::new();
        for device in &description.devices {
            if r.rest().is_empty() {
                break;
            }
            let at = r.clone();
            let found = r.u8()?;
            if found != SectionType::Full.byte() {
                return Err(at.error(SectionError::UnexpectedType { found }).into());
            }
            let header = SectionHeader::decode(Announcement::Full, &mut r)?;
            let len = usize::try_from(device.body_len).unwrap_or(usize::MAX);
            let body = r.take(len)?.to_vec();
            decode_footer(header.id, &mut r)?;
            early.push(header, body);
        }
        if !r.rest().is_empty() {
            return Err(EarlyError::NotDescribed {
                len: r.rest().len(),
            });
        }
        early.check(description)?;
        Ok(early)
    }

    /// Checks that the description begins with these sections, as long as they are here.
    ///
    /// # Errors
    /// [`EarlyError::Differs`].
    pub fn check(&self, description: &VmDescription) -> Result<(), EarlyError> {
        for (i, (header, body)) in self.sections.iter().enumerate() {
            let device = description.devices.get(i).filter(|device| {
                device.idstr == header.idstr
                    && device.instance == header.instance
                    && device
                        .version
                        .is_none_or(|version| version == header.version)
            });
            let described = device.map(|device| device.body_len);
            if described != Some(body.len() as u64) {
                return Err(EarlyError::Differs {
                    idstr: header.idstr.clone(),
                    instance: header.instance,
                    taken: body.len(),
                    described,
                });
            }
        }
        Ok(())
    }

    /// The sections of the same source at a later moment, at the front of a COLO checkpoint's device
    /// state, and what stands behind them. They are as long as they were.
    ///
    /// # Errors
    /// [`EarlyError`]: the device state begins with something else.
    pub fn followed_by<'a>(&self, state: &'a [u8]) -> Result<(Self, &'a [u8]), EarlyError> {
        let mut r = Reader::new(state, 0);
        let mut early = Self::new();
        for (before, body) in &self.sections {
            let at = r.clone();
            let found = r.u8()?;
            if found != SectionType::Full.byte() {
                return Err(at.error(SectionError::UnexpectedType { found }).into());
            }
            let header = SectionHeader::decode(Announcement::Full, &mut r)?;
            if (&header.idstr, header.instance) != (&before.idstr, before.instance) {
                return Err(EarlyError::Missing {
                    idstr: before.idstr.clone(),
                    instance: before.instance,
                });
            }
            let body = r.take(body.len())?.to_vec();
            decode_footer(header.id, &mut r)?;
            early.push(header, body);
        }
        Ok((early, r.rest()))
    }

    /// Appends a section. Its id does not matter: [`EarlySections::encode`] numbers all of them.
    pub fn push(&mut self, header: SectionHeader, body: Vec<u8>) {
        self.body_bytes = self.body_bytes.saturating_add(body.len());
        self.sections.push((header, body));
    }

    /// Length of all bodies together, bytes.
    pub(crate) const fn body_bytes(&self) -> usize {
        self.body_bytes
    }
}

/// Looks for the end of the body with which `bytes` begins, of section `id`; there is none before
/// `from`. Returns the body's length. `ram` is RAM's section, once it is announced.
///
/// # Errors
/// The body does not end in `bytes`. The error is where the search goes on when more bytes have come, so
/// that all searches together pass over each byte once.
pub fn find_end(
    bytes: &[u8],
    id: SectionId,
    ram: Option<SectionId>,
    from: usize,
) -> Result<usize, usize> {
    let mut footer = Vec::new();
    encode_footer(id, &mut footer);
    let mut at = from.min(bytes.len());
    while let Some(rest) = bytes.get(at..)
        && let Some(skip) = rest
            .iter()
            .position(|byte| *byte == SectionType::Footer.byte())
    {
        at += skip;
        let rest = bytes.get(at..).unwrap_or_default();
        let there = rest.len().min(footer.len());
        if rest.get(..there) != footer.get(..there) {
            at += 1;
            continue;
        }
        match is_head(rest.get(footer.len()..).unwrap_or_default(), ram) {
            Ok(true) => return Ok(at),
            Ok(false) => at += 1,
            Err(Truncated) => return Err(at),
        }
    }
    Err(bytes.len())
}

/// More bytes are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Truncated;

/// Whether the front of `bytes` is such as follows a device section before the pages of RAM: the head of
/// another device, that of RAM with its size record, or once RAM is announced that of its pages or the
/// command before its last ones.
fn is_head(bytes: &[u8], ram: Option<SectionId>) -> Result<bool, Truncated> {
    let mut r = Reader::new(bytes, 0);
    match head(&mut r, ram) {
        Ok(is_head) => Ok(is_head),
        Err(e) if matches!(e.cause, Cause::Truncated { .. }) => Err(Truncated),
        Err(_) => Ok(false),
    }
}

fn head(r: &mut Reader<'_>, ram: Option<SectionId>) -> Result<bool, DecodeError> {
    let kind = match SectionType::from_byte(r.u8()?) {
        Some(SectionType::Start) => Announcement::Start,
        Some(SectionType::Full) => Announcement::Full,
        Some(SectionType::Part | SectionType::End) => {
            let id = SectionId(r.be32()?);
            return Ok(Some(id) == ram);
        }
        Some(SectionType::Command) => {
            let mut switchover = Vec::new();
            Command::SwitchoverStart.encode(&mut switchover);
            let payload = switchover.get(1..).unwrap_or_default();
            return Ok(ram.is_some() && r.take(payload.len())? == payload);
        }
        _ => return Ok(false),
    };
    let header = SectionHeader::decode(kind, r)?;
    let name = header.idstr.as_str();
    if !name.bytes().all(|byte| byte.is_ascii_graphic()) || header.version > MAX_VERSION {
        return Ok(false);
    }
    if name != RAM_IDSTR {
        return Ok(true);
    }
    Ok(kind == Announcement::Start
        && header.instance == InstanceId(0)
        && header.version == RAM_VERSION
        && is_setup_total(r.be64()?))
}

/// Why device sections that stand before RAM cannot be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EarlyError {
    /// The description says something else than was taken for a section.
    #[error(
        "device section '{idstr}' instance {instance}, which stands before ram, was taken to have \
         {taken} bytes, and the description {}",
        match .described {
            Some(len) => format!("says that it has {len}"),
            None => "does not have it in its place".to_owned(),
        }
    )]
    Differs {
        /// The device.
        idstr: IdStr,
        /// Which one of that idstr.
        instance: InstanceId,
        /// Length of the body as it was taken, bytes.
        taken: usize,
        /// Length of the body by the description, if it has the section in this place, bytes.
        described: Option<u64>,
    },
    /// A checkpoint's device state has another section in the place of one.
    #[error("no device section '{idstr}' instance {instance} at the front of the device state")]
    Missing {
        /// The device.
        idstr: IdStr,
        /// Which one of that idstr.
        instance: InstanceId,
    },
    /// The sections are more than the description names.
    #[error("{len} bytes behind the device sections that stand before ram are not described")]
    NotDescribed {
        /// How many there are.
        len: usize,
    },
    /// A section is cut off or none.
    #[error("a device section that stands before ram")]
    Frame(#[from] DecodeError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: Announcement, id: u32, idstr: &str, version: u32) -> Vec<u8> {
        let mut out = Vec::new();
        SectionHeader {
            kind,
            id: SectionId(id),
            idstr: IdStr::new(idstr).unwrap(),
            instance: InstanceId(0),
            version,
        }
        .encode(&mut out);
        out
    }

    fn ram() -> Vec<u8> {
        let total = 0x4000_0004_u64.to_be_bytes();
        [
            header(Announcement::Start, 1, "ram", RAM_VERSION).as_slice(),
            &total,
        ]
        .concat()
    }

    fn footer(id: u32) -> Vec<u8> {
        let mut out = Vec::new();
        encode_footer(SectionId(id), &mut out);
        out
    }

    const ID: SectionId = SectionId(0x25);

    #[test]
    fn a_body_ends_where_its_footer_and_another_head_are() {
        let body = [0, 0x7e, 0, 0, 0, 0x25, 4, 0, 0x7e, 0x7e, 0, 0, 0, 0x26];
        for next in [ram(), header(Announcement::Full, 0x27, "another", 1)] {
            let bytes = [&body[..], &footer(0x25), &next].concat();
            assert_eq!(find_end(&bytes, ID, None, 0), Ok(body.len()));
            // The same, byte by byte, each looked at once.
            let mut from = 0;
            for len in 0..bytes.len() {
                let found = find_end(&bytes[..len], ID, None, from);
                let Err(next) = found else {
                    panic!("found {found:?} in {len} bytes");
                };
                assert!(next >= from && next <= body.len().max(len));
                from = next;
            }
            assert_eq!(find_end(&bytes, ID, None, from), Ok(body.len()));
        }
    }

    #[test]
    fn a_footer_before_anything_else_is_part_of_the_body() {
        let mut old_ram = ram();
        let last = old_ram.len() - 9;
        old_ram[last] = 3;
        for next in [
            vec![0; 40],
            header(Announcement::Full, 1, "b\x1b[2J", 1),
            header(Announcement::Full, 1, "thing", 0x0100_0000),
            old_ram,
        ] {
            let bytes = [&footer(0x25)[..], &next, &[0; 300]].concat();
            assert!(find_end(&bytes, ID, None, 0).is_err(), "{next:x?}");
        }
        // Pages of RAM and the command before the last of them follow where RAM is announced.
        for next in [b"\x02\0\0\0\x01", b"\x03\0\0\0\x01", b"\x08\0\x0b\0\0"] {
            let bytes = [&footer(0x25)[..], next, &[0; 300]].concat();
            let ram = |id| find_end(&bytes, ID, id, 0);
            assert_eq!(ram(Some(SectionId(1))), Ok(0));
            assert!(ram(None).is_err());
            assert_eq!(ram(Some(SectionId(2))).is_ok(), next[0] == 8);
        }
    }

    fn description(len: u64, name: &str) -> VmDescription {
        let json = format!(
            r#"{{"page_size":4096,"devices":[{{"name":"{name}","instance_id":0,"version":1,
            "fields":[{{"name":"f","size":{len},"type":"buffer"}}]}}]}}"#
        );
        VmDescription::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn sections_read_back_and_are_those_of_the_description() {
        let mut early = EarlySections::new();
        let bytes = header(Announcement::Full, 9, "thing", 1);
        let header = SectionHeader::decode(Announcement::Full, &mut Reader::new(&bytes[1..], 1));
        early.push(header.unwrap(), vec![5; 44]);
        early.check(&description(44, "thing")).unwrap();
        for other in [description(43, "thing"), description(44, "other")] {
            let error = early.check(&other).unwrap_err().to_string();
            assert!(error.contains("'thing' instance 0"), "{error}");
        }
        let mut bytes = Vec::new();
        early.encode(SectionId(9), &mut bytes);
        assert_eq!(
            EarlySections::decode(&bytes, &description(44, "thing")).unwrap(),
            early
        );
        for wrong in [&bytes[..40], &[bytes.as_slice(), &[0]].concat()] {
            assert!(EarlySections::decode(wrong, &description(44, "thing")).is_err());
        }
        assert!(EarlySections::decode(&bytes, &description(u64::MAX, "thing")).is_err());

        let mut later = bytes.clone();
        later[20] ^= 1;
        later.extend_from_slice(b"\x04the rest");
        let (next, rest) = early.followed_by(&later).unwrap();
        assert_eq!(rest, b"\x04the rest");
        assert_eq!(next.len(), 1);
        for wrong in [&later[1..], &later[..30]] {
            assert!(early.followed_by(wrong).is_err());
        }
    }
}
