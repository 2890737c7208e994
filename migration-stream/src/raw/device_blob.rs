//! Device state as a blob: FULL sections one after the other, and EOF. COLO sends one in every
//! checkpoint, without header, configuration and description (`migration/colo.c`, QEMU 11.1).

use bytes::BufMut;

use crate::error::DecodeError;
use crate::raw::codec::Reader;
use crate::raw::decoder::MAX_SECTIONS;
use crate::raw::section::{
    Announcement, SectionError, SectionType, decode_footer, encode_eof, encode_footer,
};
use crate::{BoxError, IdStr, InstanceId, SectionHeader};

/// One device's section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection<'a> {
    /// Which device.
    pub header: SectionHeader,
    /// Its state, in a form that only the device knows.
    pub body: &'a [u8],
}

impl DeviceSection<'_> {
    /// Appends header, body and footer.
    pub fn encode(&self, out: &mut impl BufMut) {
        self.header.encode(out);
        out.put_slice(self.body);
        encode_footer(self.header.id, out);
    }
}

/// Appends a blob of these sections.
pub fn encode_device_blob<'a>(
    sections: impl IntoIterator<Item = DeviceSection<'a>>,
    out: &mut impl BufMut,
) {
    for section in sections {
        section.encode(out);
    }
    encode_eof(out);
}

/// Takes a blob apart. Sections carry no length: `body_len` says how many bytes the body of the
/// section with that header has, given all bytes from its beginning to the blob's end.
///
/// # Errors
/// [`DeviceBlobError`]; offsets in it count from the blob's first byte.
pub fn decode_device_blob<'a, E: Into<BoxError>>(
    blob: &'a [u8],
    mut body_len: impl FnMut(&SectionHeader, &'a [u8]) -> Result<usize, E>,
) -> Result<Vec<DeviceSection<'a>>, DeviceBlobError> {
    let mut r = Reader::new(blob, 0);
    let mut sections = Vec::new();
    loop {
        let at = r.clone();
        match r.u8()? {
            byte if byte == SectionType::Eof.byte() => break,
            byte if byte == SectionType::Full.byte() => {}
            found => return Err(at.error(SectionError::UnexpectedType { found }).into()),
        }
        if sections.len() == MAX_SECTIONS {
            return Err(at.error(SectionError::TooMany { max: MAX_SECTIONS }).into());
        }
        let header = SectionHeader::decode(Announcement::Full, &mut r)?;
        let offset = r.offset();
        let device = |source: E| DeviceBlobError::Device {
            idstr: header.idstr.clone(),
            instance: header.instance,
            offset,
            source: source.into(),
        };
        let len = body_len(&header, r.rest()).map_err(device)?;
        let body = r.take(len)?;
        decode_footer(header.id, &mut r)?;
        sections.push(DeviceSection { header, body });
    }
    if r.rest().is_empty() {
        Ok(sections)
    } else {
        Err(DeviceBlobError::Trailing {
            offset: r.offset(),
            len: r.rest().len(),
        })
    }
}

/// Why a blob could not be taken apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceBlobError {
    /// The frame of a section is wrong, or the blob too short.
    #[error("device blob")]
    Frame(#[from] DecodeError),
    /// A device refused its section.
    #[error("device blob: section '{idstr}' instance {instance} at byte {offset:#x}")]
    Device {
        /// The device.
        idstr: IdStr,
        /// Which one of that idstr.
        instance: InstanceId,
        /// Where its body begins.
        offset: u64,
        /// Why.
        source: BoxError,
    },
    /// Bytes after EOF.
    #[error("device blob: {len} bytes after its end at byte {offset:#x}")]
    Trailing {
        /// Where the blob ended.
        offset: u64,
        /// How many there are.
        len: usize,
    },
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::num::ParseIntError;

    use super::*;
    use crate::SectionId;
    use crate::error::Cause;

    fn section(id: u32, name: &str, body: &'static [u8]) -> DeviceSection<'static> {
        DeviceSection {
            header: SectionHeader {
                kind: Announcement::Full,
                id: SectionId(id),
                idstr: IdStr::new(name).unwrap(),
                instance: InstanceId(0),
                version: 1,
            },
            body,
        }
    }

    fn blob() -> (Vec<DeviceSection<'static>>, Vec<u8>) {
        let sections = vec![
            section(3, "timer", &[3, b'a', b'b', b'c']),
            section(4, "uart", &[0]),
        ];
        let mut out = Vec::new();
        encode_device_blob(sections.clone(), &mut out);
        (sections, out)
    }

    /// The bodies of these tests begin with the number of bytes that follow.
    #[allow(clippy::unnecessary_wraps)] // the shape that the decoder asks for
    fn body_len(_: &SectionHeader, rest: &[u8]) -> Result<usize, Infallible> {
        Ok(1 + usize::from(rest[0]))
    }

    #[test]
    fn a_blob_reads_back() {
        let (sections, bytes) = blob();
        assert_eq!(decode_device_blob(&bytes, body_len).unwrap(), sections);
    }

    #[test]
    fn a_body_longer_than_the_blob_is_refused() {
        let (_, mut bytes) = blob();
        bytes[19] = 200;
        assert!(matches!(
            decode_device_blob(&bytes, body_len),
            Err(DeviceBlobError::Frame(DecodeError {
                cause: Cause::Truncated { .. },
                ..
            }))
        ));
    }

    #[test]
    fn a_body_of_another_length_misses_its_footer() {
        let (_, mut bytes) = blob();
        bytes[19] = 2;
        assert!(matches!(
            decode_device_blob(&bytes, body_len),
            Err(DeviceBlobError::Frame(DecodeError {
                cause: Cause::Section(SectionError::FooterMissing { found: b'c', .. }),
                ..
            }))
        ));
    }

    #[test]
    fn a_blob_ends_with_eof_and_nothing_after_it() {
        let (_, mut bytes) = blob();
        bytes.push(9);
        assert!(matches!(
            decode_device_blob(&bytes, body_len),
            Err(DeviceBlobError::Trailing { len: 1, .. })
        ));
        bytes.truncate(bytes.len() - 2);
        assert!(decode_device_blob(&bytes, body_len).is_err());
    }

    #[test]
    fn what_a_device_says_is_told_with_its_name() {
        let (_, bytes) = blob();
        let e = decode_device_blob(&bytes, |header, _| match header.idstr.as_str() {
            "uart" => "x".parse::<usize>(),
            _ => Ok::<_, ParseIntError>(4),
        })
        .unwrap_err();
        assert!(e.to_string().contains("section 'uart' instance 0"));
    }
}
