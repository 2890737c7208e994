//! The frame around a section's body: type byte, identity, footer (`migration/savevm.c`, QEMU 11.1).
//!
//! ```text
//! START, FULL   type  be32 section id  counted idstr  be32 instance id  be32 version  body  footer
//! PART, END     type  be32 section id  body  footer
//! footer        0x7e  be32 section id
//! EOF           0x00
//! VMDESCRIPTION 0x06  be32 length  JSON text
//! ```

mod error;
mod id;

pub use self::error::SectionError;
pub use self::id::{InstanceId, SectionId};
use bytes::BufMut;

use crate::IdStr;
use crate::error::DecodeError;
use crate::raw::codec::Reader;

/// The byte with which everything in the section loop begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SectionType {
    /// End of the section loop.
    Eof = 0x00,
    /// First section of an iterable handler: announces its id.
    Start = 0x01,
    /// A further section of an iterable handler.
    Part = 0x02,
    /// The last section of an iterable handler; COLO sends one in every checkpoint.
    End = 0x03,
    /// The only section of a device.
    Full = 0x04,
    /// An optional part of a device's state; stands only inside a body.
    Subsection = 0x05,
    /// The description of the device sections, after EOF.
    VmDescription = 0x06,
    /// Machine type and what goes with it, after the header.
    Configuration = 0x07,
    /// A command.
    Command = 0x08,
    /// Closes a section.
    Footer = 0x7e,
}

impl SectionType {
    /// The type with this byte.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0x00 => Self::Eof,
            0x01 => Self::Start,
            0x02 => Self::Part,
            0x03 => Self::End,
            0x04 => Self::Full,
            0x05 => Self::Subsection,
            0x06 => Self::VmDescription,
            0x07 => Self::Configuration,
            0x08 => Self::Command,
            0x7e => Self::Footer,
            _ => return None,
        })
    }

    /// The byte on the wire.
    #[must_use]
    pub const fn byte(self) -> u8 {
        self as u8
    }
}

/// The two kinds of section that announce an id. A receiver treats them alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Announcement {
    /// Parts of the same id follow.
    Start,
    /// This is all there is of it.
    Full,
}

/// The two kinds of section that continue an announced id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuation {
    /// More follow.
    Part,
    /// The last one of this round. It does not retire the id: COLO's checkpoints send further ones.
    End,
}

/// The head of a START or FULL section.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SectionHeader {
    /// Which of the two.
    pub kind: Announcement,
    /// The id announced.
    pub id: SectionId,
    /// Which device: `"<path>/<name>"` or just the name.
    pub idstr: IdStr,
    /// Which one of that idstr.
    pub instance: InstanceId,
    /// The version of the body.
    pub version: u32,
}

impl SectionHeader {
    /// Appends the header, type byte included.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u8(
            match self.kind {
                Announcement::Start => SectionType::Start,
                Announcement::Full => SectionType::Full,
            }
            .byte(),
        );
        out.put_u32(self.id.0);
        self.idstr.encode(out);
        out.put_u32(self.instance.0);
        out.put_u32(self.version);
    }

    /// Reads what follows the type byte.
    ///
    /// # Errors
    /// The idstr is not one, or the bytes end before the header does.
    pub fn decode(kind: Announcement, r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            kind,
            id: SectionId(r.be32()?),
            idstr: r.idstr()?,
            instance: InstanceId(r.be32()?),
            version: r.be32()?,
        })
    }
}

/// Appends the head of a PART or END section.
pub fn encode_continuation(kind: Continuation, id: SectionId, out: &mut impl BufMut) {
    out.put_u8(
        match kind {
            Continuation::Part => SectionType::Part,
            Continuation::End => SectionType::End,
        }
        .byte(),
    );
    out.put_u32(id.0);
}

/// Appends a section's footer.
pub fn encode_footer(id: SectionId, out: &mut impl BufMut) {
    out.put_u8(SectionType::Footer.byte());
    out.put_u32(id.0);
}

/// Reads the footer of section `id`.
///
/// # Errors
/// It is no footer, or that of another section; or the bytes end before it does.
pub fn decode_footer(id: SectionId, r: &mut Reader<'_>) -> Result<(), DecodeError> {
    let at = r.clone();
    let found = r.u8()?;
    if found != SectionType::Footer.byte() {
        return Err(at.error(SectionError::FooterMissing { id, found }));
    }
    match SectionId(r.be32()?) {
        found if found == id => Ok(()),
        found => Err(at.error(SectionError::FooterMismatch { id, found })),
    }
}

/// Appends the end of the section loop.
pub fn encode_eof(out: &mut impl BufMut) {
    out.put_u8(SectionType::Eof.byte());
}

/// Appends the head of the description that follows EOF: `len` bytes of JSON come after it.
pub fn encode_vm_description(len: u32, out: &mut impl BufMut) {
    out.put_u8(SectionType::VmDescription.byte());
    out.put_u32(len);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back() {
        let header = SectionHeader {
            kind: Announcement::Start,
            id: SectionId(1),
            idstr: IdStr::new("ram").unwrap(),
            instance: InstanceId(0),
            version: 4,
        };
        let mut out = Vec::new();
        header.encode(&mut out);
        assert_eq!(
            out,
            [1, 0, 0, 0, 1, 3, b'r', b'a', b'm', 0, 0, 0, 0, 0, 0, 0, 4]
        );
        let mut r = Reader::new(&out[1..], 1);
        assert_eq!(
            SectionHeader::decode(Announcement::Start, &mut r).unwrap(),
            header
        );
        assert!(r.rest().is_empty());
    }

    #[test]
    fn a_footer_closes_only_its_own_section() {
        let mut out = Vec::new();
        encode_footer(SectionId(7), &mut out);
        decode_footer(SectionId(7), &mut Reader::new(&out, 0)).unwrap();
        let cause = |id, bytes: &[u8]| {
            decode_footer(SectionId(id), &mut Reader::new(bytes, 0))
                .unwrap_err()
                .cause
        };
        assert_eq!(
            cause(8, &out),
            SectionError::FooterMismatch {
                id: SectionId(8),
                found: SectionId(7)
            }
            .into()
        );
        assert_eq!(
            cause(7, &[0x04]),
            SectionError::FooterMissing {
                id: SectionId(7),
                found: 4
            }
            .into()
        );
    }

    #[test]
    fn an_empty_idstr_is_refused() {
        let e =
            SectionHeader::decode(Announcement::Full, &mut Reader::new(&[0; 16], 1)).unwrap_err();
        assert_eq!(e.offset, 5);
    }
}
