//! Headers of sections, and the end of them, in bytes that are already here.

use super::error::TailError;
use crate::SectionHeader;
use crate::error::DecodeError;
use crate::raw::codec::Reader;
use crate::raw::section::{Announcement, SectionError, SectionType};
use crate::raw::vmdesc::DeviceDescription;

/// Type byte and section id.
pub(super) const FOOTER_LEN: usize = 5;

/// Footer, EOF, type byte and length of the description.
pub(super) const END_LEN: usize = FOOTER_LEN + 1 + 5;

/// The length of the description's text whose first byte is the last one of `window`, if a last footer,
/// EOF and the beginning of a description stand there and the text has no more than `max` bytes.
pub(super) fn end_at(window: &[u8], max: u32) -> Option<u32> {
    let &[footer, _, _, _, _, eof, kind, l3, l2, l1, l0, first] = window else {
        return None;
    };
    let len = u32::from_be_bytes([l3, l2, l1, l0]);
    let is_end = footer == SectionType::Footer.byte()
        && eof == SectionType::Eof.byte()
        && kind == SectionType::VmDescription.byte()
        && first == b'{'
        && len <= max;
    is_end.then_some(len)
}

/// The header of `device` at `pos`, and where its body begins.
pub(super) fn header_at(
    bytes: &[u8],
    pos: usize,
    device: &DeviceDescription,
) -> Result<(SectionHeader, usize), TailError> {
    let mut r = Reader::new(bytes.get(pos..).unwrap_or_default(), pos as u64);
    let is_full = r.u8()? == SectionType::Full.byte();
    let header = SectionHeader::decode(Announcement::Full, &mut r)?;
    if is_full
        && header.idstr == device.idstr
        && header.instance == device.instance
        && device.version.is_none_or(|v| v == header.version)
    {
        Ok((header, pos + r.consumed()))
    } else {
        Err(TailError::Header {
            idstr: device.idstr.clone(),
            instance: device.instance,
            offset: pos,
        })
    }
}

/// The header of whatever section is at `pos`, and where its body begins.
pub(super) fn any_header_at(
    bytes: &[u8],
    pos: usize,
) -> Result<(SectionHeader, usize), DecodeError> {
    let mut r = Reader::new(bytes.get(pos..).unwrap_or_default(), pos as u64);
    let at = r.clone();
    let found = r.u8()?;
    if found != SectionType::Full.byte() {
        return Err(at.error(SectionError::UnexpectedType { found }));
    }
    let header = SectionHeader::decode(Announcement::Full, &mut r)?;
    Ok((header, pos + r.consumed()))
}
