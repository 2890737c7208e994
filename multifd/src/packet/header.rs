//! The header of a packet of pages, to be written and as it was received.

use byteorder::{BigEndian, ByteOrder};
use migration_stream::PAGE_SIZE;

use super::{
    FLAG_DEVICE_STATE, HEADER_LEN, MAGIC, MAX_COMPRESSED_LEN, MAX_PAGES, Method, NAME_AT,
    OFFSETS_AT, PAGE_LEN, PAGES_PER_PACKET, PREFIX_LEN, PacketError, PacketFlags, PacketKind,
    VERSION, check_magic_and_version,
};

/// What a page packet says, to be written.
#[derive(Clone, Copy, Debug)]
pub struct PacketHeader<'a> {
    /// Its flags.
    pub flags: PacketFlags,
    /// Its number, counted over all channels of the source, SYNC packets included.
    pub number: u64,
    /// The RAM block's name; empty in a SYNC packet without pages.
    pub block: &'a [u8],
    /// Offsets in the block of the pages with data, bytes.
    pub normal: &'a [u64],
    /// Offsets in the block of the zero pages, bytes.
    pub zero: &'a [u64],
    /// Length of the payload, bytes.
    pub payload_len: u32,
}

impl<'a> PacketHeader<'a> {
    /// A SYNC packet without pages.
    #[must_use]
    pub const fn sync(number: u64) -> PacketHeader<'a> {
        PacketHeader {
            flags: PacketFlags {
                sync: true,
                method: Method::None,
            },
            number,
            block: &[],
            normal: &[],
            zero: &[],
            payload_len: 0,
        }
    }

    /// Writes the header over all of `buf`.
    ///
    /// # Errors
    /// [`PacketError::Pages`] for more than [`PAGES_PER_PACKET`] pages,
    /// [`PacketError::NameLength`] for a name longer than 255 bytes.
    pub fn fill(&self, buf: &mut [u8; HEADER_LEN]) -> Result<(), PacketError> {
        let pages = self.normal.len() + self.zero.len();
        let (Ok(normal), Ok(zero), true) = (
            u32::try_from(self.normal.len()),
            u32::try_from(self.zero.len()),
            pages <= PAGES_PER_PACKET,
        ) else {
            return Err(PacketError::Pages {
                pages: pages as u64,
            });
        };
        if self.block.len() > 255 {
            return Err(PacketError::NameLength);
        }
        BigEndian::write_u32(&mut buf[0..4], MAGIC);
        BigEndian::write_u32(&mut buf[4..8], VERSION);
        BigEndian::write_u32(&mut buf[8..12], self.flags.to_bits());
        BigEndian::write_u32(&mut buf[12..16], if pages == 0 { 0 } else { MAX_PAGES });
        BigEndian::write_u32(&mut buf[16..20], normal);
        BigEndian::write_u32(&mut buf[20..24], self.payload_len);
        BigEndian::write_u64(&mut buf[24..32], self.number);
        BigEndian::write_u32(&mut buf[32..36], zero);
        buf[36..NAME_AT].fill(0);
        let name_end = NAME_AT + self.block.len();
        buf[NAME_AT..name_end].copy_from_slice(self.block);
        buf[name_end..OFFSETS_AT].fill(0);
        let zero_at = OFFSETS_AT + 8 * self.normal.len();
        let end = OFFSETS_AT + 8 * pages;
        BigEndian::write_u64_into(self.normal, &mut buf[OFFSETS_AT..zero_at]);
        BigEndian::write_u64_into(self.zero, &mut buf[zero_at..end]);
        buf[end..].fill(0);
        Ok(())
    }
}

/// A header that was received, borrowed from the bytes it came in.
///
/// A value that exists passed every check that needs no RAM block: magic, version, flags, counts,
/// and a payload length that fits the channel's method.
#[derive(Clone, Copy, Debug)]
pub struct PacketView<'a> {
    buf: &'a [u8; HEADER_LEN],
    sync: bool,
    normal: usize,
    zero: usize,
    payload_len: u32,
}

impl<'a> PacketView<'a> {
    /// Checks magic, version and flags: the part of a header in which packets of all kinds agree.
    /// A packet of another kind can be shorter than [`HEADER_LEN`], so this goes before the rest
    /// is waited for.
    ///
    /// # Errors
    /// [`PacketError::Magic`], [`PacketError::Version`] and [`PacketError::Flags`].
    pub fn check_prefix(prefix: &[u8; PREFIX_LEN]) -> Result<PacketKind, PacketError> {
        check_magic_and_version(prefix)?;
        match BigEndian::read_u32(&prefix[8..12]) {
            FLAG_DEVICE_STATE => Ok(PacketKind::DeviceState),
            bits => PacketFlags::from_bits(bits).map(PacketKind::Pages),
        }
    }

    /// The header in `buf`, of a channel that is compressed by `method`.
    ///
    /// # Errors
    /// As [`PacketView::check_prefix`], and [`PacketError::DeviceState`], [`PacketError::Pages`], [`PacketError::Counts`],
    /// [`PacketError::Method`] and [`PacketError::PayloadLength`].
    pub fn unfill(buf: &'a [u8; HEADER_LEN], method: Method) -> Result<Self, PacketError> {
        let mut prefix = [0; PREFIX_LEN];
        prefix.copy_from_slice(&buf[..PREFIX_LEN]);
        let PacketKind::Pages(flags) = Self::check_prefix(&prefix)? else {
            return Err(PacketError::DeviceState);
        };
        let allocated = BigEndian::read_u32(&buf[12..16]);
        let normal = BigEndian::read_u32(&buf[16..20]);
        let payload_len = BigEndian::read_u32(&buf[20..24]);
        let zero = BigEndian::read_u32(&buf[32..36]);
        if allocated > MAX_PAGES {
            return Err(PacketError::Pages {
                pages: allocated.into(),
            });
        }
        if normal > allocated || zero > allocated - normal {
            return Err(PacketError::Counts {
                normal,
                zero,
                allocated,
            });
        }
        // A SYNC packet carries no method; old sources put pages into it, and then it does.
        let no_pages = normal == 0 && zero == 0;
        if flags.method != method && !(no_pages && flags.method == Method::None) {
            return Err(PacketError::Method {
                got: flags.method,
                expected: method,
            });
        }
        // QEMU 7.2 has the length of the packet before it in a packet without pages, of which there is
        // one behind each SYNC packet that has pages.
        let payload_len = if no_pages { 0 } else { payload_len };
        let (min, max) = match method {
            Method::None => (normal * PAGE_LEN, normal * PAGE_LEN),
            _ if normal == 0 => (0, 0),
            _ => (0, MAX_COMPRESSED_LEN),
        };
        if !(min..=max).contains(&payload_len) {
            return Err(PacketError::PayloadLength {
                got: payload_len,
                normal,
                method,
                max,
            });
        }
        Ok(Self {
            buf,
            sync: flags.sync,
            normal: normal as usize,
            zero: zero as usize,
            payload_len,
        })
    }

    /// Whether the channel is to wait behind this packet.
    #[must_use]
    pub const fn is_sync(&self) -> bool {
        self.sync
    }

    /// Number of pages with data.
    #[must_use]
    pub const fn normal_pages(&self) -> usize {
        self.normal
    }

    /// Number of zero pages.
    #[must_use]
    pub const fn zero_pages(&self) -> usize {
        self.zero
    }

    /// Whether the packet says something about any page.
    #[must_use]
    pub const fn has_pages(&self) -> bool {
        self.normal + self.zero > 0
    }

    /// Length of the payload behind the header, bytes.
    #[must_use]
    pub const fn payload_len(&self) -> u32 {
        self.payload_len
    }

    /// The packet's number over all channels of the source.
    #[must_use]
    pub fn number(&self) -> u64 {
        BigEndian::read_u64(&self.buf[24..32])
    }

    /// The RAM block's name, without its padding.
    ///
    /// # Errors
    /// [`PacketError::NameLength`] when nothing ends it.
    pub fn block(&self) -> Result<&'a [u8], PacketError> {
        let name = &self.buf[NAME_AT..OFFSETS_AT];
        name.iter()
            .position(|b| *b == 0)
            .and_then(|end| name.get(..end))
            .ok_or(PacketError::NameLength)
    }

    /// Reads the offsets into `offsets` and returns those of the pages with data and those of the
    /// zero pages, each checked to be that of a whole page of a block of `used_length` bytes.
    ///
    /// # Errors
    /// [`PacketError::Alignment`] and [`PacketError::Offset`].
    pub fn offsets<'o>(
        &self,
        used_length: u64,
        offsets: &'o mut [u64; PAGES_PER_PACKET],
    ) -> Result<(&'o [u64], &'o [u64]), PacketError> {
        let pages = self.normal + self.zero;
        let offsets = &mut offsets[..pages];
        BigEndian::read_u64_into(&self.buf[OFFSETS_AT..OFFSETS_AT + 8 * pages], offsets);
        for (index, &offset) in offsets.iter().enumerate() {
            if !offset.is_multiple_of(PAGE_SIZE) {
                return Err(PacketError::Alignment { index, offset });
            }
            if offset >= used_length || used_length - offset < PAGE_SIZE {
                return Err(PacketError::Offset {
                    index,
                    offset,
                    used_length,
                });
            }
        }
        Ok(offsets.split_at(self.normal))
    }
}
