//! A driver's request, read from its buffers and checked.

use virtio_bindings::virtio_blk as spec;
use vm_memory::GuestMemory;

use super::backend::{Geometry, SECTOR};
use super::stats::RequestKind;
use crate::ring::{Chain, RingError, Segments};

/// Bytes before the data of a request: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of a range to discard or to zero: sector, count, flags.
const RANGE: u64 = 16;

/// The most data of one request, bytes.
pub const MAX_DATA: u64 = 16 << 20;
/// The most sectors of one range to discard.
pub const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// The most sectors of one range to zero: 64 MiB, which may have to be written.
pub const MAX_ZERO_SECTORS: u32 = 128 << 10;

/// How a request ended, for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It was done.
    Ok,
    /// It failed.
    IoError,
    /// The device does not know it.
    Unsupported,
}

impl Status {
    pub(super) const fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

// The bytes above are the specification's.
const _: () = assert!(spec::VIRTIO_BLK_S_IOERR == 1 && spec::VIRTIO_BLK_S_UNSUPP == 2);

/// What a driver asks for. Offsets and lengths are bytes, and lie in the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data from the disk.
    Read { offset: u64 },
    /// Data to the disk.
    Write { offset: u64 },
    /// What was written to be stable.
    Flush,
    /// The disk's serial number.
    Id,
    /// A range not needed any more.
    Discard { offset: u64, len: u64 },
    /// A range of zeroes.
    Zero { offset: u64, len: u64, unmap: bool },
    /// None of these: the guest gets the status, and the counter of the kind its due.
    Invalid(Status, Option<RequestKind>),
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// What the driver knows it by.
    pub head: u16,
    /// What is asked for.
    pub kind: Kind,
    /// The data's place in guest memory.
    pub data: Segments,
    /// The place of the status byte.
    pub status: Segments,
    /// Bytes that the device writes if all goes well.
    pub writable: u32,
}

impl Request {
    /// Reads the header of a request, and its range if it has one.
    ///
    /// # Errors
    /// There is no room for a header or a status: the guest cannot even be told.
    pub fn parse<M: GuestMemory>(
        mut chain: Chain,
        geometry: Geometry,
        memory: &M,
    ) -> Result<Self, RingError> {
        let short = RingError::Short { head: chain.head };
        if chain.readable.len() < HEADER || chain.writable.is_empty() {
            return Err(short);
        }
        let writable = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
        let output = chain.readable.split_off(HEADER);
        let status = chain.writable.split_off(chain.writable.len() - 1);
        let input = chain.writable;
        let mut header = [0; 16];
        chain.readable.read(memory, &mut header)?;
        let [a, b, c, d, _, _, _, _, rest @ ..] = header;
        let sector = u64::from_le_bytes(rest);
        let (kind, data) = match u32::from_le_bytes([a, b, c, d]) {
            spec::VIRTIO_BLK_T_IN => {
                let kind = RequestKind::Read;
                let range = transfer(geometry, sector, input.len());
                let read = range.map(|offset| Kind::Read { offset });
                (or_invalid(read, kind), input)
            }
            spec::VIRTIO_BLK_T_OUT => {
                let kind = RequestKind::Write;
                let range = transfer(geometry, sector, output.len());
                let range = range.filter(|_| !geometry.read_only);
                let write = range.map(|offset| Kind::Write { offset });
                (or_invalid(write, kind), output)
            }
            spec::VIRTIO_BLK_T_FLUSH => (Kind::Flush, Segments::default()),
            spec::VIRTIO_BLK_T_GET_ID => (Kind::Id, input),
            asked @ (spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES) => (
                range_of(asked, geometry, &output, memory)?,
                Segments::default(),
            ),
            _ => (
                Kind::Invalid(Status::Unsupported, None),
                Segments::default(),
            ),
        };
        Ok(Self {
            head: chain.head,
            kind,
            data,
            status,
            writable,
        })
    }
}

fn or_invalid(kind: Option<Kind>, counted: RequestKind) -> Kind {
    kind.unwrap_or(Kind::Invalid(Status::IoError, Some(counted)))
}

/// The offset of a transfer, if it is of whole sectors, not too long, and lies in the disk.
fn transfer(geometry: Geometry, sector: u64, len: u64) -> Option<u64> {
    if len == 0 || len > MAX_DATA || !len.is_multiple_of(SECTOR) {
        return None;
    }
    within(geometry, sector, len)
}

fn within(geometry: Geometry, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    (end <= geometry.length).then_some(offset)
}

/// The range of a discard or a write of zeroes. There is one, as the configuration says.
fn range_of<M: GuestMemory>(
    asked: u32,
    geometry: Geometry,
    output: &Segments,
    memory: &M,
) -> Result<Kind, RingError> {
    let discard = asked == spec::VIRTIO_BLK_T_DISCARD;
    let (counted, most) = if discard {
        (RequestKind::Unmap, MAX_DISCARD_SECTORS)
    } else {
        (RequestKind::Write, MAX_ZERO_SECTORS)
    };
    let invalid = |status| Ok(Kind::Invalid(status, Some(counted)));
    if output.len() != RANGE || geometry.read_only {
        return invalid(Status::IoError);
    }
    let mut range = [0; 16];
    output.read(memory, &mut range)?;
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    let unmap = flags & spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if flags & !spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
        return invalid(Status::Unsupported);
    }
    let len = u64::from(sectors) * SECTOR;
    match within(geometry, sector, len) {
        Some(offset) if 0 < sectors && sectors <= most => Ok(if discard {
            Kind::Discard { offset, len }
        } else {
            Kind::Zero { offset, len, unmap }
        }),
        _ => invalid(Status::IoError),
    }
}
