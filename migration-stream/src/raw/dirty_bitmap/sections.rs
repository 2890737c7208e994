//! The sections of a stream, kept as they are.

use bytes::BufMut;

use super::{
    Chunk, DIRTY_BITMAP_IDSTR, DIRTY_BITMAP_VERSION, DirtyBitmapDecoder, DirtyBitmapError,
    MigratedBitmap,
};
use crate::error::DecodeError;
use crate::raw::codec::Reader;
use crate::raw::section::{
    Announcement, Continuation, SectionError, SectionType, decode_footer, encode_continuation,
    encode_footer,
};
use crate::{IdStr, InstanceId, SectionHeader, SectionId};

/// Which section of a stream a body was in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Start,
    Part,
    End,
}

/// The `dirty-bitmap` sections of a stream, to be sent on as they are.
#[derive(Clone, Debug, Default)]
pub struct BitmapSections {
    bodies: Vec<(Kind, Vec<u8>)>,
    len: usize,
    decoder: DirtyBitmapDecoder,
}

impl BitmapSections {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            bodies: Vec::new(),
            len: 0,
            decoder: DirtyBitmapDecoder::new(),
        }
    }

    /// Reads what [`BitmapSections::encode_sections`] has written under the id 0, all of it; the caller
    /// has bounded it.
    ///
    /// # Errors
    /// It is something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut sections = Self::new();
        let mut r = Reader::new(bytes, 0);
        while !r.rest().is_empty() {
            let at = r.clone();
            let found = r.u8()?;
            let kind = match SectionType::from_byte(found) {
                Some(SectionType::Start) if sections.is_empty() => {
                    let found = SectionHeader::decode(Announcement::Start, &mut r)?;
                    if found != header(SectionId(0)) {
                        let SectionHeader { id, idstr, .. } = found;
                        return Err(at.error(SectionError::AnnouncedTwice { id, idstr }));
                    }
                    None
                }
                Some(SectionType::Part) => Some(Continuation::Part),
                Some(SectionType::End) => Some(Continuation::End),
                _ => return Err(at.error(SectionError::UnexpectedType { found })),
            };
            if kind.is_some() {
                r.be32()?;
            }
            sections.begin(kind);
            while !sections.next(&mut r, bytes.len())?.is_last {}
            decode_footer(SectionId(0), &mut r)?;
        }
        Ok(sections)
    }

    /// The bitmaps in them.
    #[must_use]
    pub fn bitmaps(&self) -> &[MigratedBitmap] {
        self.decoder.bitmaps()
    }

    /// Bytes of all bodies.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no section.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bodies.is_empty()
    }

    /// A section begins: START for `None`.
    pub(crate) fn begin(&mut self, kind: Option<Continuation>) {
        let kind = match kind {
            None => Kind::Start,
            Some(Continuation::Part) => Kind::Part,
            Some(Continuation::End) => Kind::End,
        };
        self.bodies.push((kind, Vec::new()));
    }

    /// Reads a chunk of the section that began last, and keeps it; at most `max` bytes in all.
    pub(crate) fn next(&mut self, r: &mut Reader<'_>, max: usize) -> Result<Chunk, DecodeError> {
        let at = r.clone();
        let chunk = self.decoder.next(r)?;
        let taken = at.rest().len() - r.rest().len();
        self.len += taken;
        if self.len > max {
            return Err(at.error(DirtyBitmapError::SectionsTooLong { max }));
        }
        if let Some((_, body)) = self.bodies.last_mut() {
            body.extend_from_slice(at.rest().get(..taken).unwrap_or_default());
        }
        Ok(chunk)
    }

    /// Reads a chunk without keeping it.
    pub(crate) fn pass(&mut self, r: &mut Reader<'_>) -> Result<Chunk, DecodeError> {
        self.decoder.next(r)
    }

    /// The bitmap that the last chunk was of.
    pub(crate) fn current(&self) -> Option<&MigratedBitmap> {
        self.decoder.current()
    }

    /// Appends the sections, with footers, under the id `id`: where a source's device sections begin
    /// they may be put before these (QEMU takes them anywhere between RAM's START and EOF).
    pub fn encode_sections(&self, id: SectionId, out: &mut impl BufMut) {
        for (kind, body) in &self.bodies {
            match kind {
                Kind::Start => header(id).encode(out),
                Kind::Part => encode_continuation(Continuation::Part, id, out),
                Kind::End => encode_continuation(Continuation::End, id, out),
            }
            out.put_slice(body);
            encode_footer(id, out);
        }
    }
}

/// The head of the START section.
#[must_use]
pub fn header(id: SectionId) -> SectionHeader {
    SectionHeader {
        kind: Announcement::Start,
        id,
        idstr: IdStr::known(DIRTY_BITMAP_IDSTR),
        instance: InstanceId(0),
        version: DIRTY_BITMAP_VERSION,
    }
}
