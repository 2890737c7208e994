//! A chunk: flags, names, and what it says.

use bytes::BufMut;

use super::{ALIGN, DirtyBitmapError, MAX_BITS_LEN, SECTOR};
use crate::IdStr;
use crate::error::DecodeError;
use crate::raw::codec::Reader;

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

    /// Reads one chunk. What depends on the chunks before it is left to a [`DirtyBitmapDecoder`](super::DirtyBitmapDecoder).
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

pub(super) const fn check_granularity(granularity: u32) -> Result<(), DirtyBitmapError> {
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
pub(super) fn check_bits(
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
