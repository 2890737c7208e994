//! The chunks of a stream, and the bitmaps they are of.

use std::collections::BTreeMap;

use bytes::BufMut;

use super::chunk::{check_bits, check_granularity};
use super::{
    ALIGN, ALIGN_LEN, BitmapFlags, Chunk, ChunkKind, DirtyBitmapError, FlagsWidth, MAX_BITMAPS,
    MAX_BITS_LEN,
};
use crate::IdStr;
use crate::error::{Cause, DecodeError};
use crate::raw::codec::Reader;

/// A bitmap of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigratedBitmap {
    /// The alias of its node: the node's name, or that of the device, unless the source maps it.
    pub node: IdStr,
    /// Its own alias.
    pub name: IdStr,
    /// Bytes that one bit is for.
    pub granularity: u32,
    /// What it is.
    pub flags: BitmapFlags,
    /// All of its bits have come.
    pub is_complete: bool,
}

/// Reads the chunks of a stream's `dirty-bitmap` sections, one after the other, and remembers the
/// bitmaps they are of.
///
/// More is refused than QEMU 11.1 refuses: what would make it stop with an assertion (granularity,
/// alignment), and what makes it go on without bitmaps (bits of a bitmap that was not started).
#[derive(Clone, Debug, Default)]
pub struct DirtyBitmapDecoder {
    bitmaps: Vec<MigratedBitmap>,
    /// Their places by node and name: every chunk of a hostile stream may name another bitmap.
    by_name: BTreeMap<(IdStr, IdStr), usize>,
    current: Option<usize>,
}

impl DirtyBitmapDecoder {
    /// For a stream whose section is still to come.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            bitmaps: Vec::new(),
            by_name: BTreeMap::new(),
            current: None,
        }
    }

    /// The bitmaps so far, in the order in which they were started.
    #[must_use]
    pub fn bitmaps(&self) -> &[MigratedBitmap] {
        &self.bitmaps
    }

    /// The bitmap that the last chunk was of.
    #[must_use]
    pub fn current(&self) -> Option<&MigratedBitmap> {
        self.bitmaps.get(self.current?)
    }

    /// Reads the next chunk from the front of `r`. After one that [is the last](Chunk::is_last) the
    /// section's footer comes.
    ///
    /// # Errors
    /// [`DirtyBitmapError`], or the bytes end before the chunk does ([`DecodeError::missing`]).
    /// Then nothing has changed.
    pub fn next(&mut self, r: &mut Reader<'_>) -> Result<Chunk, DecodeError> {
        let at = r.clone();
        let mut attempt = r.clone();
        let chunk = Chunk::decode(&mut attempt)?;
        self.take(&chunk).map_err(|e| at.error(e))?;
        *r = attempt;
        Ok(chunk)
    }

    /// How long the rest of a section's body is, if its end is in `bytes`, which begin where a chunk
    /// does. For those who only want to get past it.
    ///
    /// # Errors
    /// As for [`DirtyBitmapDecoder::next`], but for the end of the bytes.
    pub fn skip(&mut self, bytes: &[u8], offset: u64) -> Result<Option<usize>, DecodeError> {
        let mut ahead = self.clone();
        let mut r = Reader::new(bytes, offset);
        loop {
            match ahead.next(&mut r) {
                Ok(chunk) if chunk.is_last => {
                    *self = ahead;
                    return Ok(Some(r.consumed()));
                }
                Ok(_) => {}
                Err(e) if matches!(e.cause, Cause::Truncated { .. }) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    fn take(&mut self, chunk: &Chunk) -> Result<(), DirtyBitmapError> {
        if let ChunkKind::Nothing = chunk.kind {
            return Ok(());
        }
        let current = self.current();
        let unnamed = || DirtyBitmapError::NoName;
        let node = chunk.node.as_ref().or(current.map(|c| &c.node));
        let node = node.ok_or_else(unnamed)?.clone();
        // Another node's bitmap is another bitmap.
        let name = match (&chunk.bitmap, &chunk.node, current) {
            (Some(name), _, _) => name.clone(),
            (None, None, Some(current)) => current.name.clone(),
            (None, _, _) => return Err(unnamed()),
        };
        let found = match self.current {
            Some(i) if chunk.node.is_none() && chunk.bitmap.is_none() => Some(i),
            _ => self.by_name.get(&(node.clone(), name.clone())).copied(),
        };
        if let ChunkKind::Start { granularity, flags } = &chunk.kind {
            if found.is_some() {
                return Err(DirtyBitmapError::StartedTwice { node, name });
            }
            if self.bitmaps.len() == MAX_BITMAPS {
                return Err(DirtyBitmapError::TooMany);
            }
            self.current = Some(self.bitmaps.len());
            self.by_name
                .insert((node.clone(), name.clone()), self.bitmaps.len());
            self.bitmaps.push(MigratedBitmap {
                node,
                name,
                granularity: *granularity,
                flags: *flags,
                is_complete: false,
            });
            return Ok(());
        }
        let bitmap = found.and_then(|i| self.bitmaps.get_mut(i));
        let bitmap = match bitmap {
            None => return Err(DirtyBitmapError::NotStarted { node, name }),
            Some(b) if b.is_complete => {
                return Err(DirtyBitmapError::AfterComplete { node, name });
            }
            Some(b) => b,
        };
        match &chunk.kind {
            ChunkKind::Bits {
                first_sector,
                sectors,
                bits,
            } => {
                let len = bits.as_ref().map(|b| b.len() as u64);
                check_bits(bitmap.granularity, *first_sector, *sectors, len)?;
            }
            ChunkKind::Complete => bitmap.is_complete = true,
            ChunkKind::Start { .. } | ChunkKind::Nothing => {}
        }
        self.current = found;
        Ok(())
    }
}

/// Makes chunks out of bitmaps, with names only where they change.
///
/// A section's body is any of its chunks and then [`Chunk::end`].
#[derive(Clone, Debug, Default)]
pub struct DirtyBitmapEncoder {
    check: DirtyBitmapDecoder,
}

impl DirtyBitmapEncoder {
    /// For a stream on which no chunk was sent yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            check: DirtyBitmapDecoder::new(),
        }
    }

    /// Appends the start of a bitmap, and returns its number.
    ///
    /// # Errors
    /// [`DirtyBitmapError`]: the granularity cannot be, the bitmap was started, or there are too
    /// many.
    pub fn start(
        &mut self,
        node: &IdStr,
        name: &IdStr,
        granularity: u32,
        flags: BitmapFlags,
        out: &mut impl BufMut,
    ) -> Result<usize, DirtyBitmapError> {
        check_granularity(granularity)?;
        let current = self.check.current();
        let is_same_node = current.is_some_and(|c| c.node == *node);
        self.put(
            Chunk {
                node: (!is_same_node).then(|| node.clone()),
                bitmap: Some(name.clone()),
                kind: ChunkKind::Start { granularity, flags },
                is_last: false,
                width: FlagsWidth::One,
            },
            out,
        )?;
        Ok(self.check.bitmaps.len().saturating_sub(1))
    }

    /// Appends bits of the bitmap of this number, padded as QEMU does; none if all are clear.
    ///
    /// # Errors
    /// [`DirtyBitmapError`]: they are not those of these sectors, or too many for a chunk; the
    /// bitmap was not started, or is complete.
    pub fn bits(
        &mut self,
        bitmap: usize,
        first_sector: u64,
        sectors: u32,
        bits: &[u8],
        out: &mut impl BufMut,
    ) -> Result<(), DirtyBitmapError> {
        let granularity = self.bitmap(bitmap)?.granularity;
        let len = bits.len() as u64;
        check_bits(granularity, first_sector, sectors, Some(len))?;
        if len.next_multiple_of(ALIGN) > MAX_BITS_LEN {
            return Err(DirtyBitmapError::TooLong { len });
        }
        let bits = bits.iter().any(|b| *b != 0).then(|| {
            let mut bits = bits.to_vec();
            bits.resize(bits.len().next_multiple_of(ALIGN_LEN), 0);
            bits
        });
        let kind = ChunkKind::Bits {
            first_sector,
            sectors,
            bits,
        };
        self.of(bitmap, kind, out)
    }

    /// Appends the end of the bitmap of this number.
    ///
    /// # Errors
    /// [`DirtyBitmapError`]: it was not started, or is complete.
    pub fn complete(
        &mut self,
        bitmap: usize,
        out: &mut impl BufMut,
    ) -> Result<(), DirtyBitmapError> {
        self.bitmap(bitmap)?;
        self.of(bitmap, ChunkKind::Complete, out)
    }

    fn bitmap(&self, number: usize) -> Result<&MigratedBitmap, DirtyBitmapError> {
        self.check
            .bitmaps
            .get(number)
            .ok_or(DirtyBitmapError::NoName)
    }

    fn of(
        &mut self,
        number: usize,
        kind: ChunkKind,
        out: &mut impl BufMut,
    ) -> Result<(), DirtyBitmapError> {
        let bitmap = self.bitmap(number)?;
        let current = self.check.current();
        let is_same_node = current.is_some_and(|c| c.node == bitmap.node);
        let is_same = self.check.current == Some(number);
        let chunk = Chunk {
            node: (!is_same_node).then(|| bitmap.node.clone()),
            bitmap: (!is_same).then(|| bitmap.name.clone()),
            kind,
            is_last: false,
            width: FlagsWidth::One,
        };
        self.put(chunk, out)
    }

    fn put(&mut self, chunk: Chunk, out: &mut impl BufMut) -> Result<(), DirtyBitmapError> {
        self.check.take(&chunk)?;
        chunk.encode(out);
        Ok(())
    }
}
