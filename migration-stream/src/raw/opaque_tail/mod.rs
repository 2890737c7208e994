//! The end of a stream whose devices nobody here knows: FULL sections, EOF and description, taken
//! as they are and split afterwards.
//!
//! Sections carry no length, so where they end is only known once the description has come, and
//! the description is only found by looking for it: the last footer, EOF, the description's type
//! byte and length, and JSON of that length that accounts for every byte before it.
//!
//! This is for tools that hand a stream on or look into it. A guest that controls the contents of
//! a device's buffer could place such an end there; a VMM knows its devices and reads their
//! sections with their handlers instead.

mod at_end;
mod ends;
mod error;
mod frame;

use std::collections::HashMap;
use std::ops::Range;

use bytes::BufMut;

use crate::raw::codec::Reader;
use crate::raw::decoder::MAX_SECTIONS;
use crate::raw::device_blob::{DeviceSection, encode_device_blob};
use crate::raw::section::{Announcement, SectionError, SectionType, decode_footer};
use crate::raw::vmdesc::{DeviceDescription, VmDescription};
use crate::{DecoderConfig, SectionHeader, SectionId};

pub use self::at_end::tail_at_end;
use self::ends::{Ends, Next};
pub use self::error::TailError;
use self::frame::{END_LEN, FOOTER_LEN, any_header_at, end_at, header_at};

/// How many descriptions of one tail may be followed by a search for the ends of bodies, each of which
/// passes over all of it once. Only a description that begins with the tail's own first section gets
/// that far.
const MAX_SEARCHES: usize = 4;

/// How much of a tail is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailLimits {
    /// The longest tail, description included, bytes.
    pub len: usize,
    /// The longest description, bytes.
    pub description: u32,
    /// How many things that look like its end but are none may be in it. Each may cost as much as
    /// reading a description.
    pub false_ends: usize,
}

impl Default for TailLimits {
    /// 64 MiB: an empty q35 of QEMU 11.1 has 76 KiB.
    fn default() -> Self {
        Self {
            len: 64 << 20,
            description: DecoderConfig::DEFAULT_MAX_DESCRIPTION,
            false_ends: 64,
        }
    }
}

/// Collects a tail. Feed it until it is complete.
#[derive(Debug)]
pub struct OpaqueTail {
    bytes: Vec<u8>,
    limits: TailLimits,
    /// No end begins before this.
    searched: usize,
    /// Where descriptions may be whose last byte has not come.
    candidates: Vec<Range<usize>>,
    rejected: Option<TailError>,
    false_ends: usize,
    /// How many descriptions needed a search for the ends of bodies.
    searches: usize,
    /// How many sections came before RAM.
    early: usize,
}

/// What came of feeding.
#[derive(Debug)]
pub enum Fed {
    /// The tail goes on; everything was taken.
    NeedMore,
    /// The tail is complete. What was fed beyond `consumed` bytes belongs to whoever comes next.
    Complete {
        /// How much of the last piece belongs to the tail, bytes.
        consumed: usize,
        /// The tail.
        tail: Tail,
    },
}

impl OpaqueTail {
    /// A tail that begins with the FULL section of this header, which has been read already (a
    /// decoder has reported it). Its body is fed first.
    #[must_use]
    pub fn beginning_with(header: &SectionHeader, limits: TailLimits) -> Self {
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        Self {
            searched: bytes.len(),
            bytes,
            limits,
            candidates: Vec::new(),
            rejected: None,
            false_ends: 0,
            searches: 0,
            early: 0,
        }
    }

    /// The description names `count` sections before those of the tail: they came before RAM, because
    /// the destination needs their state first (`early_setup` in `include/migration/vmstate.h`).
    #[must_use]
    pub const fn after_early(mut self, count: usize) -> Self {
        self.early = count;
        self
    }

    /// Takes what has arrived. Whether more is to come cannot be told from the bytes: a connection
    /// may stay open, and what follows the tail may come along with its last byte.
    ///
    /// # Errors
    /// A limit is exceeded.
    pub fn feed(&mut self, piece: &[u8]) -> Result<Fed, TailError> {
        let before = self.bytes.len();
        self.bytes.extend_from_slice(piece);
        self.find_ends()?;
        // The earliest end first: what is behind it is not ours.
        while let Some(json) = self.take_candidate() {
            let (start, end) = (json.start, json.end);
            match self.split(json) {
                Ok((sections, description)) => {
                    let mut bytes = std::mem::take(&mut self.bytes);
                    bytes.truncate(end);
                    return Ok(Fed::Complete {
                        consumed: end.saturating_sub(before),
                        tail: Tail {
                            bytes,
                            sections,
                            json: start,
                            description,
                            early: self.early,
                        },
                    });
                }
                Err(e) if self.searches > MAX_SEARCHES => return Err(e),
                Err(e) => self.rejected = Some(e),
            }
        }
        if self.bytes.len() > self.limits.len {
            return Err(TailError::TooLong {
                max: self.limits.len,
                rejected: self.rejected.take().map(Box::new),
            });
        }
        Ok(Fed::NeedMore)
    }

    /// Why the last thing that looked like the tail's end was none; to explain a tail that does not
    /// end.
    #[must_use]
    pub const fn rejected(&self) -> Option<&TailError> {
        self.rejected.as_ref()
    }

    fn find_ends(&mut self) -> Result<(), TailError> {
        while let Some(window) = self.bytes.get(self.searched..self.searched + END_LEN + 1) {
            let json = self.searched + END_LEN;
            self.searched += 1;
            let Some(len) = end_at(window, self.limits.description) else {
                continue;
            };
            self.false_ends += 1;
            if self.false_ends > self.limits.false_ends {
                return Err(TailError::FalseEnds {
                    max: self.limits.false_ends,
                });
            }
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let end = json.saturating_add(len);
            if end <= self.limits.len {
                self.candidates.push(json..end);
            }
        }
        Ok(())
    }

    /// The complete candidate that ends first.
    fn take_candidate(&mut self) -> Option<Range<usize>> {
        let (index, _) = self
            .candidates
            .iter()
            .enumerate()
            .filter(|(_, json)| json.end <= self.bytes.len())
            .min_by_key(|(_, json)| json.end)?;
        Some(self.candidates.swap_remove(index))
    }

    fn split(&mut self, json: Range<usize>) -> Result<(Vec<RawSection>, VmDescription), TailError> {
        // The sections end where EOF is: 6 bytes before the JSON.
        let sections = self.bytes.get(..json.start - 6).unwrap_or_default();
        let json = self.bytes.get(json).unwrap_or_default();
        let description = VmDescription::parse(json)?;
        let devices = description.devices.get(self.early..).unwrap_or_default();
        let searches = &mut self.searches;
        let sections = split(sections, devices, || {
            *searches += 1;
            if *searches > MAX_SEARCHES {
                return Err(TailError::TooManySearches { max: MAX_SEARCHES });
            }
            Ends::of(sections, |_| false)
        })?;
        Ok((sections, description))
    }
}

/// A complete tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    bytes: Vec<u8>,
    sections: Vec<RawSection>,
    /// Where the description's text begins.
    json: usize,
    description: VmDescription,
    /// How many sections, which came before RAM, the description names before those of the tail.
    early: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct RawSection {
    header: SectionHeader,
    body: Range<usize>,
}

impl Tail {
    /// Reads a tail that was kept ([`Tail::as_bytes`]).
    ///
    /// # Errors
    /// It is none, or not all of it is.
    pub fn decode(bytes: &[u8], limits: TailLimits) -> Result<Self, TailError> {
        Self::decode_after_early(bytes, 0, limits)
    }

    /// As [`Tail::decode`], of a tail whose description names `early` sections before its own.
    ///
    /// # Errors
    /// As there.
    pub fn decode_after_early(
        bytes: &[u8],
        early: usize,
        limits: TailLimits,
    ) -> Result<Self, TailError> {
        let mut r = Reader::new(bytes, 0);
        let at = r.clone();
        let found = r.u8()?;
        if found != SectionType::Full.byte() {
            return Err(at.error(SectionError::UnexpectedType { found }).into());
        }
        let header = SectionHeader::decode(Announcement::Full, &mut r)?;
        let mut tail = OpaqueTail::beginning_with(&header, limits).after_early(early);
        match tail.feed(r.rest())? {
            Fed::Complete { consumed, tail } if consumed == r.rest().len() => Ok(tail),
            Fed::Complete { consumed, .. } => Err(TailError::NotDescribed {
                offset: r.consumed() + consumed,
                len: r.rest().len() - consumed,
            }),
            Fed::NeedMore => Err(tail
                .rejected
                .take()
                .unwrap_or(TailError::Incomplete { len: bytes.len() })),
        }
    }

    /// Appends the device sections and EOF as a source sends them that numbers its sections from
    /// `first` on.
    pub fn encode_sections(&self, first: SectionId, out: &mut impl BufMut) {
        let sections = self.sections().zip(first.0..).map(|(section, id)| {
            let mut header = section.header;
            header.id = SectionId(id);
            DeviceSection { header, ..section }
        });
        encode_device_blob(sections, out);
    }

    /// The description as it was sent.
    #[must_use]
    pub fn description_text(&self) -> &str {
        let json = self.bytes.get(self.json..).unwrap_or_default();
        // It was parsed as JSON, which is nothing but UTF-8.
        std::str::from_utf8(json).unwrap_or_default()
    }

    /// All of it, from the first section's type byte to the description's last byte.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The tail of the same source at a later moment, of which only the sections and EOF were sent:
    /// COLO's checkpoints have no description. A body may have become longer or shorter, and a
    /// section may have come or gone.
    ///
    /// The new tail has the old description where that is still true, and otherwise one that has the
    /// sections and their lengths but no fields.
    ///
    /// # Errors
    /// The bytes are no sections and EOF, or where a body ends cannot be told.
    pub fn followed_by(&self, blob: &[u8]) -> Result<Self, TailError> {
        let Some((&last, bytes)) = blob.split_last() else {
            return Err(TailError::Incomplete { len: 0 });
        };
        if last != SectionType::Eof.byte() {
            return Err(TailError::Incomplete { len: blob.len() });
        }
        let sections = self.split_later(bytes)?;
        let is_as_before = sections.len() == self.sections.len()
            && sections.iter().zip(&self.sections).all(|(now, before)| {
                now.header == before.header && now.body.len() == before.body.len()
            });
        let (description, text) = if is_as_before {
            let text = self.description_text().to_owned();
            (self.description.clone(), text)
        } else {
            let early = self.description.devices.get(..self.early);
            let early = early.unwrap_or_default();
            plain_description(self.description.page_size, early, &sections)
        };
        let mut bytes = blob.to_vec();
        bytes.put_u8(SectionType::VmDescription.byte());
        // At most a few hundred bytes for each of a bounded number of sections, or what came.
        bytes.put_u32(u32::try_from(text.len()).unwrap_or(u32::MAX));
        let json = bytes.len();
        bytes.put_slice(text.as_bytes());
        Ok(Self {
            bytes,
            sections,
            json,
            description,
            early: self.early,
        })
    }

    /// Splits sections that are not described into those that this tail has, as far as it has them.
    fn split_later(&self, bytes: &[u8]) -> Result<Vec<RawSection>, TailError> {
        let known: HashMap<_, _> = self
            .sections
            .iter()
            .map(|s| (&s.header, s.body.len()))
            .collect();
        let mut ends = None;
        let mut sections = Vec::new();
        let mut pos = 0;
        while pos < bytes.len() {
            if sections.len() == MAX_SECTIONS {
                return Err(TailError::TooManySections {
                    count: MAX_SECTIONS + 1,
                });
            }
            let (header, start) = any_header_at(bytes, pos)?;
            let before = known.get(&header).copied();
            let len = before.unwrap_or(0);
            let expected = start + len;
            let end = if before.is_some() && is_end(bytes, expected, header.id) {
                Some(expected)
            } else {
                let ends = match &mut ends {
                    Some(ends) => ends,
                    none => none.insert(Ends::of(bytes, |next| known.contains_key(next))?),
                };
                [Next::Known, Next::Any]
                    .into_iter()
                    .find_map(|next| ends.only(start, header.id, next))
            };
            let end = end.ok_or_else(|| TailError::Body {
                idstr: header.idstr.clone(),
                instance: header.instance,
                offset: start,
                described: len as u64,
            })?;
            sections.push(RawSection {
                header,
                body: start..end,
            });
            pos = end + FOOTER_LEN;
        }
        Ok(sections)
    }

    /// The device sections, in their order.
    pub fn sections(&self) -> impl ExactSizeIterator<Item = DeviceSection<'_>> + '_ {
        self.sections.iter().map(|s| DeviceSection {
            header: s.header.clone(),
            body: self.bytes.get(s.body.clone()).unwrap_or_default(),
        })
    }

    /// What the description says.
    #[must_use]
    pub const fn description(&self) -> &VmDescription {
        &self.description
    }
}

/// Splits `bytes` into exactly the sections described. `search` finds the ends of bodies; it is called
/// once, and only if a body is not as long as described.
fn split(
    bytes: &[u8],
    devices: &[DeviceDescription],
    search: impl FnOnce() -> Result<Ends, TailError>,
) -> Result<Vec<RawSection>, TailError> {
    let mut search = Some(search);
    let mut ends = None;
    if devices.len() > MAX_SECTIONS {
        return Err(TailError::TooManySections {
            count: devices.len(),
        });
    }
    let mut sections = Vec::with_capacity(devices.len());
    let mut pos = 0;
    for (i, device) in devices.iter().enumerate() {
        let (header, start) = header_at(bytes, pos, device)?;
        let next = devices.get(i + 1);
        let is_end = |end: usize| ends_before(bytes, end, header.id, next);
        let described = usize::try_from(device.body_len)
            .ok()
            .and_then(|len| start.checked_add(len))
            .filter(|end| is_end(*end));
        let end = match described {
            Some(end) => end,
            None => {
                if let Some(search) = search.take() {
                    ends = Some(search()?);
                }
                let next = next.map_or(Next::End, |next| {
                    Next::Section(next.idstr.clone(), next.instance, next.version)
                });
                ends.as_ref()
                    .and_then(|ends| ends.only(start, header.id, next))
                    .ok_or_else(|| TailError::Body {
                        idstr: device.idstr.clone(),
                        instance: device.instance,
                        offset: start,
                        described: device.body_len,
                    })?
            }
        };
        sections.push(RawSection {
            header,
            body: start..end,
        });
        pos = end + FOOTER_LEN;
    }
    if pos == bytes.len() {
        Ok(sections)
    } else {
        Err(TailError::NotDescribed {
            offset: pos,
            len: bytes.len() - pos,
        })
    }
}

/// A description that says of each section no more than its length, as QEMU describes handlers that
/// have no fields.
fn plain_description(
    page_size: u64,
    early: &[DeviceDescription],
    sections: &[RawSection],
) -> (VmDescription, String) {
    let sections = sections.iter().map(|section| DeviceDescription {
        idstr: section.header.idstr.clone(),
        instance: section.header.instance,
        version: Some(section.header.version),
        body_len: section.body.len() as u64,
    });
    let devices: Vec<_> = early.iter().cloned().chain(sections).collect();
    let json = devices.iter().map(|device| {
        serde_json::json!({
            "name": device.idstr.as_str(),
            "instance_id": device.instance.0,
            "version": device.version,
            "size": device.body_len,
            "fields": [{"name": "data", "size": device.body_len, "type": "buffer"}],
        })
    });
    let json: Vec<_> = json.collect();
    let text = serde_json::json!({"page_size": page_size, "devices": json}).to_string();
    (VmDescription { page_size, devices }, text)
}

/// Whether the body of section `id` can end at `end`: with its footer, and behind that the next
/// section or the end.
fn ends_before(bytes: &[u8], end: usize, id: SectionId, next: Option<&DeviceDescription>) -> bool {
    let mut r = Reader::new(bytes.get(end..).unwrap_or_default(), end as u64);
    decode_footer(id, &mut r).is_ok()
        && match next {
            Some(device) => header_at(bytes, end + r.consumed(), device).is_ok(),
            None => r.rest().is_empty(),
        }
}

/// Whether the body of section `id` can end at `end`, whichever section follows.
fn is_end(bytes: &[u8], end: usize, id: SectionId) -> bool {
    let mut r = Reader::new(bytes.get(end..).unwrap_or_default(), end as u64);
    decode_footer(id, &mut r).is_ok()
        && (r.rest().is_empty() || any_header_at(bytes, end + r.consumed()).is_ok())
}
