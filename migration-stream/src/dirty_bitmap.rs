//! Dirty bitmaps of block devices (the capability `dirty-bitmaps`): the section `dirty-bitmap`
//! (`migration/block-dirty-bitmap.c`, QEMU 11.1).
//!
//! Such a section comes as START, PART and END, and like a device's it has no length: its body is
//! chunks, the last of which says that it is.
//!
//! ```text
//! chunk     flags  [counted node alias]  [counted bitmap alias]  kind
//! flags     1 byte; 2 bytes if its highest bit is set, 4 if that of the second is too
//! START     be32 granularity  u8 1 enabled | 2 persistent | 4 autoload
//! BITS      be64 first sector  be32 sectors  [be64 length  bits]
//! COMPLETE  nothing
//! ```
//!
//! A name that is left out is that of the chunk before, in whichever section that was. Sectors are
//! of 512 bytes. Bit `i` of the bits is for `granularity` bytes from the first sector on; they are
//! words of 64, low bit first and little-endian, padded to 32 bytes.
//!
//! | type | what |
//! |---|---|
//! | [`Chunk`] | one chunk as it is, to be looked at or sent on |
//! | [`DirtyBitmapDecoder`] | the chunks of a stream, and which bitmap each is of |
//! | [`DirtyBitmapEncoder`] | chunks out of bitmaps |
//! | [`BitmapSections`] | all sections of a stream, kept to be sent on |

use bytes::BufMut;

use crate::codec::{IdStr, Reader};
use crate::error::{Cause, DecodeError};
use crate::section::{
    Announcement, Continuation, InstanceId, SectionHeader, SectionId, encode_continuation,
    encode_footer,
};

/// The section's name. Its instance is 0.
pub const DIRTY_BITMAP_IDSTR: &str = "dirty-bitmap";
/// The section's version.
pub const DIRTY_BITMAP_VERSION: u32 = 1;
/// More bitmaps than any machine has; it bounds what a hostile peer can make us remember.
pub const MAX_BITMAPS: usize = 4096;
/// The longest bits that QEMU takes in one chunk, bytes; it sends a tenth of that.
pub const MAX_BITS_LEN: u64 = 10 << 10;
/// The longest chunk, bytes.
#[allow(clippy::cast_possible_truncation)] // 10 KiB
pub const MAX_CHUNK_LEN: usize = 4 + 2 * (1 + IdStr::MAX_LEN) + 8 + 4 + 8 + MAX_BITS_LEN as usize;

const SECTOR: u64 = 512;
/// What the length of the bits is padded to, bytes.
const ALIGN: u64 = ALIGN_LEN as u64;
const ALIGN_LEN: usize = 32;

const EOS: u32 = 0x01;
const ZEROES: u32 = 0x02;
const BITMAP_NAME: u32 = 0x04;
const NODE_NAME: u32 = 0x08;
const START: u32 = 0x10;
const COMPLETE: u32 = 0x20;
const BITS: u32 = 0x40;
const KINDS: u32 = START | COMPLETE | BITS;
const KNOWN: u32 = EOS | ZEROES | BITMAP_NAME | NODE_NAME | KINDS;
/// More flags follow.
const EXTRA: u8 = 0x80;

/// What a bitmap is beside its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitmapFlags {
    /// Writes are recorded.
    pub enabled: bool,
    /// It is kept in the image.
    pub persistent: bool,
    /// It is loaded with the image. QEMU sends it no more, and ignores it.
    pub autoload: bool,
}

impl BitmapFlags {
    const fn byte(self) -> u8 {
        self.enabled as u8 | (self.persistent as u8) << 1 | (self.autoload as u8) << 2
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        if byte & 0xf8 != 0 {
            return None;
        }
        Some(Self {
            enabled: byte & 1 != 0,
            persistent: byte & 2 != 0,
            autoload: byte & 4 != 0,
        })
    }
}

/// What a chunk says of its bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// There is such a bitmap.
    Start {
        /// Bytes that one bit is for: a power of two from 512 on.
        granularity: u32,
        /// What it is.
        flags: BitmapFlags,
    },
    /// Some of its bits.
    Bits {
        /// The first sector they are for.
        first_sector: u64,
        /// How many sectors they are for, not 0.
        sectors: u32,
        /// The bits, `None` if all are clear.
        bits: Option<Vec<u8>>,
    },
    /// All of its bits have come.
    Complete,
    /// Nothing: it only ends the body.
    Nothing,
}

/// How many bytes the flags of a chunk take. QEMU has only sent one so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlagsWidth {
    /// One byte.
    #[default]
    One,
    /// Two bytes.
    Two,
    /// Four bytes.
    Four,
}

/// A chunk, as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The alias of the node, where it is another than that of the chunk before.
    pub node: Option<IdStr>,
    /// The alias of the bitmap, likewise.
    pub bitmap: Option<IdStr>,
    /// What it says.
    pub kind: ChunkKind,
    /// The section's body ends with it.
    pub is_last: bool,
    /// How its flags are written.
    pub width: FlagsWidth,
}

impl Chunk {
    /// The chunk that ends a body and says nothing else.
    #[must_use]
    pub const fn end() -> Self {
        Self {
            node: None,
            bitmap: None,
            kind: ChunkKind::Nothing,
            is_last: true,
            width: FlagsWidth::One,
        }
    }

    /// Whether it says something of a bitmap.
    #[must_use]
    pub const fn is_of_a_bitmap(&self) -> bool {
        !matches!(self.kind, ChunkKind::Nothing)
    }

    fn flags(&self) -> u32 {
        let kind = match &self.kind {
            ChunkKind::Start { .. } => START,
            ChunkKind::Bits { bits: Some(_), .. } => BITS,
            ChunkKind::Bits { bits: None, .. } => BITS | ZEROES,
            ChunkKind::Complete => COMPLETE,
            ChunkKind::Nothing => 0,
        };
        let set = |flag, is_set: bool| if is_set { flag } else { 0 };
        kind | set(NODE_NAME, self.node.is_some())
            | set(BITMAP_NAME, self.bitmap.is_some())
            | set(EOS, self.is_last)
    }

    /// Appends the chunk.
    pub fn encode(&self, out: &mut impl BufMut) {
        let flags = self.flags();
        #[allow(clippy::cast_possible_truncation)] // all flags are in the lowest byte
        let byte = flags as u8;
        match self.width {
            FlagsWidth::One => {}
            FlagsWidth::Two => out.put_u8(EXTRA),
            FlagsWidth::Four => out.put_slice(&[EXTRA, EXTRA, 0]),
        }
        out.put_u8(byte);
        if let Some(node) = &self.node {
            node.encode(out);
        }
        if let Some(bitmap) = &self.bitmap {
            bitmap.encode(out);
        }
        match &self.kind {
            ChunkKind::Start { granularity, flags } => {
                out.put_u32(*granularity);
                out.put_u8(flags.byte());
            }
            ChunkKind::Bits {
                first_sector,
                sectors,
                bits,
            } => {
                out.put_u64(*first_sector);
                out.put_u32(*sectors);
                if let Some(bits) = bits {
                    out.put_u64(bits.len() as u64);
                    out.put_slice(bits);
                }
            }
            ChunkKind::Complete | ChunkKind::Nothing => {}
        }
    }

    /// Reads one chunk. What depends on the chunks before it is left to a [`DirtyBitmapDecoder`].
    ///
    /// # Errors
    /// [`DirtyBitmapError`], or the bytes end before the chunk does.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.clone();
        let (flags, width) = read_flags(r)?;
        let unknown = || at.error(DirtyBitmapError::Flags { flags });
        let is_kind = matches!(flags & KINDS, START | BITS | COMPLETE);
        let is_end = flags == EOS;
        if flags & !KNOWN != 0 || !(is_kind || is_end) || (flags & ZEROES != 0 && flags & BITS == 0)
        {
            return Err(unknown());
        }
        let node = (flags & NODE_NAME != 0).then(|| r.idstr()).transpose()?;
        let bitmap = (flags & BITMAP_NAME != 0).then(|| r.idstr()).transpose()?;
        let kind = match flags & KINDS {
            START => read_start(r)?,
            BITS => read_bits(r, flags & ZEROES != 0)?,
            COMPLETE => ChunkKind::Complete,
            _ => ChunkKind::Nothing,
        };
        Ok(Self {
            node,
            bitmap,
            kind,
            is_last: flags & EOS != 0,
            width,
        })
    }
}

/// The flags without the bits that say how many bytes they are.
fn read_flags(r: &mut Reader<'_>) -> Result<(u32, FlagsWidth), DecodeError> {
    let first = r.u8()?;
    if first & EXTRA == 0 {
        return Ok((u32::from(first), FlagsWidth::One));
    }
    let second = r.u8()?;
    let high = u32::from(first & !EXTRA);
    if second & EXTRA == 0 {
        return Ok((high << 8 | u32::from(second), FlagsWidth::Two));
    }
    let low = u32::from(r.be16()?);
    let flags = high << 24 | u32::from(second & !EXTRA) << 16 | low;
    Ok((flags, FlagsWidth::Four))
}

fn read_start(r: &mut Reader<'_>) -> Result<ChunkKind, DecodeError> {
    let at = r.clone();
    let granularity = r.be32()?;
    check_granularity(granularity).map_err(|e| at.error(e))?;
    let at = r.clone();
    let found = r.u8()?;
    let flags = BitmapFlags::from_byte(found)
        .ok_or_else(|| at.error(DirtyBitmapError::BitmapFlags { found }))?;
    Ok(ChunkKind::Start { granularity, flags })
}

fn read_bits(r: &mut Reader<'_>, zeroes: bool) -> Result<ChunkKind, DecodeError> {
    let at = r.clone();
    let first_sector = r.be64()?;
    let sectors = r.be32()?;
    check_range(first_sector, sectors).map_err(|e| at.error(e))?;
    let bits = if zeroes {
        None
    } else {
        let at = r.clone();
        let len = r.be64()?;
        match usize::try_from(len) {
            Ok(fits) if len <= MAX_BITS_LEN => Some(r.take(fits)?.to_vec()),
            _ => return Err(at.error(DirtyBitmapError::TooLong { len })),
        }
    };
    Ok(ChunkKind::Bits {
        first_sector,
        sectors,
        bits,
    })
}

const fn check_granularity(granularity: u32) -> Result<(), DirtyBitmapError> {
    if granularity.is_power_of_two() && granularity as u64 >= SECTOR {
        Ok(())
    } else {
        Err(DirtyBitmapError::Granularity { granularity })
    }
}

/// The sectors are some, and their bytes can be counted as QEMU does, signed.
fn check_range(first_sector: u64, sectors: u32) -> Result<(), DirtyBitmapError> {
    let end = first_sector.checked_add(u64::from(sectors));
    match end {
        Some(end) if sectors > 0 && end <= i64::MAX.unsigned_abs() / SECTOR => Ok(()),
        _ => Err(DirtyBitmapError::Range {
            first_sector,
            sectors,
        }),
    }
}

/// How long the bits for these sectors are, bytes, without padding.
fn bits_len(granularity: u32, first_sector: u64, sectors: u32) -> Result<u64, DirtyBitmapError> {
    check_range(first_sector, sectors)?;
    // Both fit: the range was checked, and the granularity has 32 bits.
    let word = u64::from(granularity) * 64;
    if !(first_sector * SECTOR).is_multiple_of(word) {
        return Err(DirtyBitmapError::Alignment {
            first_sector,
            granularity,
        });
    }
    Ok((u64::from(sectors) * SECTOR).div_ceil(word) * 8)
}

/// Whether bits for these sectors may have this length.
fn check_bits(
    granularity: u32,
    first_sector: u64,
    sectors: u32,
    found: Option<u64>,
) -> Result<(), DirtyBitmapError> {
    let expected = bits_len(granularity, first_sector, sectors)?;
    match found {
        Some(found) if found < expected || found > expected.next_multiple_of(ALIGN) => {
            Err(DirtyBitmapError::BitsLength { found, expected })
        }
        _ => Ok(()),
    }
}

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
    current: Option<usize>,
}

impl DirtyBitmapDecoder {
    /// For a stream whose section is still to come.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            bitmaps: Vec::new(),
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
            _ => {
                let is_it = |b: &MigratedBitmap| b.node == node && b.name == name;
                self.bitmaps.iter().position(is_it)
            }
        };
        if let ChunkKind::Start { granularity, flags } = &chunk.kind {
            if found.is_some() {
                return Err(DirtyBitmapError::StartedTwice { node, name });
            }
            if self.bitmaps.len() == MAX_BITMAPS {
                return Err(DirtyBitmapError::TooMany);
            }
            self.current = Some(self.bitmaps.len());
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
        idstr: IdStr::dirty_bitmap(),
        instance: InstanceId(0),
        version: DIRTY_BITMAP_VERSION,
    }
}

/// What is wrong with a `dirty-bitmap` section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyBitmapError {
    /// The flags are no chunk's.
    #[error("unknown combination of dirty bitmap flags {flags:#x}")]
    Flags {
        /// The flags, without what says how many bytes they are.
        flags: u32,
    },
    /// A bitmap is something we do not know.
    #[error("dirty bitmap with unknown flags {found:#04x}")]
    BitmapFlags {
        /// Its flags.
        found: u8,
    },
    /// A granularity that is none.
    #[error("dirty bitmap of granularity {granularity}, expected a power of two from 512 on")]
    Granularity {
        /// The granularity, bytes.
        granularity: u32,
    },
    /// Sectors that there cannot be.
    #[error("dirty bitmap bits for {sectors} sectors from {first_sector:#x} on")]
    Range {
        /// The first sector.
        first_sector: u64,
        /// How many.
        sectors: u32,
    },
    /// The first sector is not that of a word's first bit.
    #[error(
        "dirty bitmap bits from sector {first_sector:#x} on, which is in a word of 64 bits for {granularity} bytes each"
    )]
    Alignment {
        /// The first sector.
        first_sector: u64,
        /// Bytes that one bit is for.
        granularity: u32,
    },
    /// More bits than one chunk has.
    #[error("dirty bitmap chunk of {len} bytes, expected at most {MAX_BITS_LEN}")]
    TooLong {
        /// Their length, bytes.
        len: u64,
    },
    /// Bits of another length than their sectors need.
    #[error("dirty bitmap bits of {found} bytes, expected {expected} and padding to {ALIGN}")]
    BitsLength {
        /// Their length, bytes.
        found: u64,
        /// What the sectors need, bytes.
        expected: u64,
    },
    /// A chunk leaves its bitmap's name out, and no chunk before it has one.
    #[error("dirty bitmap chunk without a name")]
    NoName,
    /// A bitmap is started again.
    #[error("dirty bitmap '{name}' of '{node}' is started twice")]
    StartedTwice {
        /// Its node.
        node: IdStr,
        /// The bitmap.
        name: IdStr,
    },
    /// A chunk of a bitmap that was not started.
    #[error("dirty bitmap '{name}' of '{node}' was not started")]
    NotStarted {
        /// Its node.
        node: IdStr,
        /// The bitmap.
        name: IdStr,
    },
    /// A chunk of a bitmap that is complete.
    #[error("dirty bitmap '{name}' of '{node}' goes on after its end")]
    AfterComplete {
        /// Its node.
        node: IdStr,
        /// The bitmap.
        name: IdStr,
    },
    /// More bitmaps than a stream may have.
    #[error("more than {MAX_BITMAPS} dirty bitmaps")]
    TooMany,
    /// More of them than is kept.
    #[error("dirty bitmaps of more than {max} bytes")]
    SectionsTooLong {
        /// The limit, bytes.
        max: usize,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(s: &str) -> IdStr {
        IdStr::new(s).unwrap()
    }

    const FLAGS: BitmapFlags = BitmapFlags {
        enabled: true,
        persistent: false,
        autoload: false,
    };

    /// The first section of two bitmaps of a disk, and the one that completes the first.
    fn bodies() -> Vec<u8> {
        let mut out = Vec::new();
        let mut encoder = DirtyBitmapEncoder::new();
        let a = encoder
            .start(&name("disk0"), &name("a"), 65536, FLAGS, &mut out)
            .unwrap();
        let b = encoder
            .start(&name("disk0"), &name("b"), 512, FLAGS, &mut out)
            .unwrap();
        Chunk::end().encode(&mut out);
        encoder.bits(a, 0, 16384, &[0; 16], &mut out).unwrap();
        encoder.bits(a, 16384, 8192, &[1; 8], &mut out).unwrap();
        encoder.complete(a, &mut out).unwrap();
        encoder.complete(b, &mut out).unwrap();
        Chunk::end().encode(&mut out);
        out
    }

    #[test]
    fn chunks_are_laid_out_as_qemu_lays_them_out() {
        let expected = [
            &b"\x1c\x05disk0\x01a\0\x01\0\0\x01"[..],
            b"\x14\x01b\0\0\x02\0\x01",
            b"\x01",
            // All clear: no bits.
            b"\x46\x01a\0\0\0\0\0\0\0\0\0\0\x40\0",
            b"\x40\0\0\0\0\0\0\x40\0\0\0\x20\0\0\0\0\0\0\0\0\x20",
            &[1; 8],
            &[0; 24],
            b"\x20",
            b"\x24\x01b",
            b"\x01",
        ]
        .concat();
        assert_eq!(bodies(), expected);
    }

    /// The chunks of these bytes, of which one more is there at a time.
    fn decode(bytes: &[u8]) -> Result<(Vec<Chunk>, DirtyBitmapDecoder), DecodeError> {
        let mut decoder = DirtyBitmapDecoder::new();
        let mut chunks = Vec::new();
        let (mut start, mut end) = (0, 0);
        while start < bytes.len() {
            let mut r = Reader::new(&bytes[start..end], start as u64);
            match decoder.next(&mut r) {
                Ok(chunk) => {
                    let mut again = Vec::new();
                    chunk.encode(&mut again);
                    assert_eq!(again, bytes[start..start + r.consumed()]);
                    assert!(again.len() <= MAX_CHUNK_LEN);
                    chunks.push(chunk);
                    start += r.consumed();
                }
                Err(e) if e.missing().is_some() => {
                    if end == bytes.len() {
                        break;
                    }
                    end += 1;
                }
                Err(e) => return Err(e),
            }
        }
        Ok((chunks, decoder))
    }

    fn refused(bytes: &[u8]) -> (u64, Cause) {
        let e = decode(bytes).unwrap_err();
        (e.offset, e.cause)
    }

    #[test]
    fn what_was_written_reads_back_byte_by_byte() {
        let (chunks, decoder) = decode(&bodies()).unwrap();
        assert_eq!(chunks.len(), 8);
        assert_eq!(chunks.iter().filter(|c| c.is_last).count(), 2);
        let bitmap = |n, granularity| MigratedBitmap {
            node: name("disk0"),
            name: name(n),
            granularity,
            flags: FLAGS,
            is_complete: true,
        };
        assert_eq!(decoder.bitmaps(), [bitmap("a", 65536), bitmap("b", 512)]);
        assert_eq!(decoder.current().unwrap().name, name("b"));
    }

    #[test]
    fn a_body_is_got_past_once_its_end_is_there() {
        let bytes = bodies();
        let first = 23;
        assert_eq!(bytes[first - 1], 1);
        for n in 0..=bytes.len() {
            let mut decoder = DirtyBitmapDecoder::new();
            let got = decoder.skip(&bytes[..n], 7).unwrap();
            assert_eq!(got, (n >= first).then_some(first), "{n}");
        }
        let mut decoder = DirtyBitmapDecoder::new();
        decoder.skip(&bytes, 7).unwrap();
        let rest = decoder.skip(&bytes[first..], 30).unwrap();
        assert_eq!(rest, Some(bytes.len() - first));
    }

    #[test]
    fn flags_of_two_and_four_bytes_are_read_and_written_again() {
        let bytes = b"\x80\x1c\x05disk0\x01a\0\x01\0\0\x07\x80\x80\0\x21\x80\x01";
        let (chunks, decoder) = decode(bytes).unwrap();
        let widths: Vec<_> = chunks.iter().map(|c| c.width).collect();
        assert_eq!(widths, [FlagsWidth::Two, FlagsWidth::Four, FlagsWidth::Two]);
        assert!(chunks[1].is_last && decoder.bitmaps()[0].is_complete);
        assert!(decoder.bitmaps()[0].flags.autoload);
        for (bytes, flags) in [
            (&b"\x81\x01"[..], 0x101),
            (b"\x80\x81\0\x01", 0x1_0001),
            (b"\x81\x80\0\x01", 0x100_0001),
            (b"\x80\x80\x01\x01", 0x101),
            (b"\x80\x80\0\x81", 0x81),
        ] {
            assert_eq!(
                refused(bytes),
                (0, DirtyBitmapError::Flags { flags }.into())
            );
        }
    }

    #[test]
    fn flags_that_no_chunk_has_are_refused() {
        // Two kinds, clear bits without bits, names or nothing without a kind.
        for flags in [
            0x30, 0x50, 0x60, 0x70, 0x12, 0x22, 0x02, 0, 0x04, 0x08, 0x0d,
        ] {
            assert_eq!(
                refused(&[flags]),
                (
                    0,
                    DirtyBitmapError::Flags {
                        flags: flags.into()
                    }
                    .into()
                )
            );
        }
    }

    #[test]
    fn a_bitmap_that_cannot_be_is_refused() {
        for granularity in [0, 1, 256, 511, 513, 0xffff_ffff_u32] {
            let bytes = [&b"\x1c\x01d\x01a"[..], &granularity.to_be_bytes()].concat();
            assert_eq!(
                refused(&bytes),
                (5, DirtyBitmapError::Granularity { granularity }.into())
            );
        }
        assert_eq!(
            refused(b"\x1c\x01d\x01a\0\x01\0\0\x08"),
            (9, DirtyBitmapError::BitmapFlags { found: 8 }.into())
        );
        assert!(matches!(refused(b"\x1c\0"), (1, Cause::IdStr(_))));
    }

    const STARTED: &[u8] = b"\x1c\x01d\x01a\0\x01\0\0\x01";

    fn after_start(bytes: &[u8]) -> Cause {
        refused(&[STARTED, bytes].concat()).1
    }

    fn bits(first_sector: u64, sectors: u32, len: u64) -> Vec<u8> {
        let mut bytes = vec![0x40];
        bytes.put_u64(first_sector);
        bytes.put_u32(sectors);
        bytes.put_u64(len);
        bytes.resize(
            bytes.len() + usize::try_from(len.min(1 << 14)).unwrap(),
            0xff,
        );
        bytes
    }

    #[test]
    fn bits_of_a_length_that_their_sectors_do_not_have_are_refused() {
        // A word of bits is for 4 MiB, 8192 sectors.
        for (sectors, len) in [(1, 8), (8192, 8), (8192, 32), (8193, 16), (32768, 32)] {
            let bytes = [STARTED, &bits(8192, sectors, len)].concat();
            assert!(decode(&bytes).is_ok());
        }
        for (sectors, found, expected) in [
            (1, 0, 8),
            (8192, 7, 8),
            (8192, 33, 8),
            (8193, 8, 16),
            (32769, 32, 40),
        ] {
            assert_eq!(
                after_start(&bits(0, sectors, found)),
                DirtyBitmapError::BitsLength { found, expected }.into()
            );
        }
    }

    #[test]
    fn hostile_lengths_and_places_are_refused_before_memory_is_taken() {
        for len in [MAX_BITS_LEN + 1, u64::MAX] {
            let (offset, cause) = refused(&[STARTED, &bits(0, 1, len)[..21]].concat());
            assert_eq!(offset, STARTED.len() as u64 + 13);
            assert_eq!(cause, DirtyBitmapError::TooLong { len }.into());
        }
        for (first_sector, sectors) in [(0, 0), (u64::MAX, 1), (i64::MAX.unsigned_abs() / 512, 1)] {
            assert_eq!(
                after_start(&bits(first_sector, sectors, 8)),
                DirtyBitmapError::Range {
                    first_sector,
                    sectors
                }
                .into()
            );
        }
        assert_eq!(
            after_start(&bits(8, 1, 8)),
            DirtyBitmapError::Alignment {
                first_sector: 8,
                granularity: 65536
            }
            .into()
        );
        // Clear bits have a place as well.
        assert!(matches!(
            after_start(b"\x42\0\0\0\0\0\0\0\x08\0\0\0\x01"),
            Cause::DirtyBitmap(DirtyBitmapError::Alignment { .. })
        ));
    }

    #[test]
    fn a_chunk_is_of_a_bitmap_that_goes_on() {
        assert_eq!(refused(b"\x20"), (0, DirtyBitmapError::NoName.into()));
        assert_eq!(
            refused(b"\x14\x01a\0\x01\0\0\x01"),
            (0, DirtyBitmapError::NoName.into())
        );
        let (node, a, b) = (name("d"), name("a"), name("b"));
        assert_eq!(
            after_start(b"\x24\x01b"),
            DirtyBitmapError::NotStarted {
                node: node.clone(),
                name: b
            }
            .into()
        );
        // The same name at another node is another bitmap, which has to be named.
        assert!(matches!(
            after_start(b"\x2c\x01e\x01a"),
            Cause::DirtyBitmap(DirtyBitmapError::NotStarted { .. })
        ));
        assert_eq!(after_start(b"\x28\x01e"), DirtyBitmapError::NoName.into());
        assert_eq!(
            after_start(STARTED),
            DirtyBitmapError::StartedTwice {
                node: node.clone(),
                name: a.clone()
            }
            .into()
        );
        assert_eq!(
            after_start(b"\x20\x20"),
            DirtyBitmapError::AfterComplete { node, name: a }.into()
        );
    }

    #[test]
    fn bitmaps_are_bounded() {
        let mut encoder = DirtyBitmapEncoder::new();
        let mut out = Vec::new();
        let mut add = |i: usize| {
            let bitmap = name(&format!("b{i}"));
            encoder.start(&name("d"), &bitmap, 512, FLAGS, &mut out)
        };
        for i in 0..MAX_BITMAPS {
            assert_eq!(add(i), Ok(i));
        }
        assert_eq!(add(MAX_BITMAPS), Err(DirtyBitmapError::TooMany));
    }

    #[test]
    fn kept_sections_are_bounded_and_sent_on_as_they_came() {
        let bytes = bodies();
        let mut kept = BitmapSections::new();
        let mut r = Reader::new(&bytes, 0);
        for kind in [None, Some(Continuation::End)] {
            kept.begin(kind);
            while !kept.next(&mut r, bytes.len()).unwrap().is_last {}
        }
        assert_eq!((kept.len(), kept.bitmaps().len()), (bytes.len(), 2));
        let mut out = Vec::new();
        kept.encode_sections(SectionId(5), &mut out);
        let expected = [
            &b"\x01\0\0\0\x05\x0cdirty-bitmap\0\0\0\0\0\0\0\x01"[..],
            &bytes[..23],
            b"\x7e\0\0\0\x05\x03\0\0\0\x05",
            &bytes[23..],
            b"\x7e\0\0\0\x05",
        ]
        .concat();
        assert_eq!(out, expected);
        let mut kept = BitmapSections::new();
        kept.begin(None);
        let mut r = Reader::new(&bytes, 0);
        assert_eq!(
            kept.next(&mut r, 10).unwrap_err().cause,
            DirtyBitmapError::SectionsTooLong { max: 10 }.into()
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_chunks_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            // Chunks are compared with their bytes on the way.
            let _ = decode(&bytes);
        }

        #[test]
        fn bits_read_back(
            shift in 9_u32..20,
            word in 0_u64..1000,
            bits in proptest::collection::vec(any::<u8>(), 1..160),
        ) {
            let mut out = Vec::new();
            let mut encoder = DirtyBitmapEncoder::new();
            let granularity = 1 << shift;
            let bitmap = encoder
                .start(&name("disk0"), &name("a"), granularity, FLAGS, &mut out)
                .unwrap();
            let per_word = u64::from(granularity) * 64 / 512;
            let words = bits.len().div_ceil(8);
            let sectors = u32::try_from(words as u64 * per_word).unwrap();
            let mut whole = bits.clone();
            whole.resize(words * 8, 0);
            encoder.bits(bitmap, word * per_word, sectors, &whole, &mut out).unwrap();
            let (chunks, _) = decode(&out).unwrap();
            match &chunks[1].kind {
                ChunkKind::Bits { bits: Some(found), .. } => {
                    prop_assert_eq!(&found[..whole.len()], &whole[..]);
                    prop_assert_eq!(found.len() % 32, 0);
                }
                ChunkKind::Bits { bits: None, .. } => {
                    prop_assert!(whole.iter().all(|b| *b == 0));
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
