//! What a channel carries: one handshake packet, then packets of pages of one RAM block.
//!
//! Layouts are those of QEMU's `migration/multifd.c` and `migration/multifd-nocomp.c`, 11.1; every
//! integer is big-endian. A page packet is a header of [`HEADER_LEN`] bytes, which always carries
//! the whole array of offsets, followed by the payload:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic [`MAGIC`] |
//! | 4 | 4 | version [`VERSION`] |
//! | 8 | 4 | flags, see [`PacketFlags`] |
//! | 12 | 4 | pages allocated: [`PAGES_PER_PACKET`], 0 in a SYNC packet |
//! | 16 | 4 | pages with data |
//! | 20 | 4 | payload length in bytes |
//! | 24 | 8 | packet number over all channels of the source |
//! | 32 | 4 | zero pages (since QEMU 9.0; 0 before) |
//! | 36 | 28 | unused, 0 |
//! | 64 | 256 | RAM block name, zero padded |
//! | 320 | 1024 | 128 offsets in the block: the pages with data, then the zero pages, then 0 |

use byteorder::{BigEndian, ByteOrder};
use migration_stream::PAGE_SIZE;
use migration_stream::codec::IdStr;
use migration_stream::section::InstanceId;

use crate::config::{ChannelCount, ChannelId};

/// First word of a handshake and of every packet.
pub const MAGIC: u32 = 0x1122_3344;
/// The only version there is.
pub const VERSION: u32 = 1;
/// Length of the handshake packet, bytes.
pub const HELLO_LEN: usize = 64;
/// Most pages in one packet: 512 KiB of them.
pub const PAGES_PER_PACKET: usize = 128;
/// Length of the header of a page packet, bytes.
pub const HEADER_LEN: usize = OFFSETS_AT + 8 * PAGES_PER_PACKET;
/// Length of the part of a header that says what kind of packet it is: magic, version, flags.
pub const PREFIX_LEN: usize = 12;
/// Longest compressed payload that is taken, bytes (QEMU's bound since 11.1).
pub const MAX_COMPRESSED_LEN: u32 = 1 << 20;

const NAME_AT: usize = 64;
const OFFSETS_AT: usize = 320;
const PAGE_LEN: u32 = 4096;
const MAX_PAGES: u32 = 128;
const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE && MAX_PAGES as usize == PAGES_PER_PACKET);

/// The first packet of a channel: which channel, of which VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The source VM's UUID, all zero if it has none.
    pub uuid: [u8; 16],
    /// The channel.
    pub channel: ChannelId,
}

impl Hello {
    /// The packet's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut buf = [0; HELLO_LEN];
        BigEndian::write_u32(&mut buf[0..4], MAGIC);
        BigEndian::write_u32(&mut buf[4..8], VERSION);
        buf[8..24].copy_from_slice(&self.uuid);
        buf[24] = self.channel.get();
        buf
    }

    /// The packet in `buf`. The unused bytes are not looked at.
    ///
    /// # Errors
    /// [`PacketError::Magic`] and [`PacketError::Version`].
    pub fn decode(buf: &[u8; HELLO_LEN]) -> Result<Self, PacketError> {
        check_magic_and_version(buf)?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&buf[8..24]);
        Ok(Self {
            uuid,
            channel: ChannelId::new(buf[24]),
        })
    }

    /// Checks that the channel is one of `channels` of the VM `uuid`.
    ///
    /// # Errors
    /// [`PacketError::Uuid`] and [`PacketError::Channel`].
    pub fn check(&self, uuid: &[u8; 16], channels: ChannelCount) -> Result<(), PacketError> {
        if self.uuid != *uuid {
            return Err(PacketError::Uuid {
                channel: self.channel,
                got: self.uuid,
                expected: *uuid,
            });
        }
        if self.channel.get() >= channels.get() {
            return Err(PacketError::Channel {
                channel: self.channel,
                channels,
            });
        }
        Ok(())
    }
}

/// How the payload of a channel is compressed, as the flags of a packet say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The pages as they are.
    None,
    /// One deflate stream per channel.
    Zlib,
    /// One zstd frame per channel.
    Zstd,
    /// Each page alone, by Intel QPL.
    Qpl,
    /// Each page alone, by UADK.
    Uadk,
    /// One QATzip buffer per packet.
    Qatzip,
}

impl Method {
    const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => 1 << 1,
            Self::Zstd => 2 << 1,
            Self::Qpl => 4 << 1,
            Self::Uadk => 8 << 1,
            Self::Qatzip => 16 << 1,
        }
    }

    const ALL: [Self; 6] = [
        Self::None,
        Self::Zlib,
        Self::Zstd,
        Self::Qpl,
        Self::Uadk,
        Self::Qatzip,
    ];
}

/// The flags of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketFlags {
    /// The channel waits behind this packet until the main stream's MULTIFD_FLUSH.
    pub sync: bool,
    /// How the payload is compressed; [`Method::None`] in a packet without pages.
    pub method: Method,
}

const FLAG_SYNC: u32 = 0x01;
const FLAG_METHOD_MASK: u32 = 0x3e;
pub(crate) const FLAG_DEVICE_STATE: u32 = 0x40;

/// What kind of packet a prefix begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketKind {
    /// Pages, or a SYNC packet: a header of [`HEADER_LEN`] bytes.
    Pages(PacketFlags),
    /// Device state, see [`crate::device_state`].
    DeviceState,
}

impl PacketFlags {
    const fn to_bits(self) -> u32 {
        self.method.bits() | if self.sync { FLAG_SYNC } else { 0 }
    }

    fn from_bits(bits: u32) -> Result<Self, PacketError> {
        let method = Method::ALL
            .into_iter()
            .find(|m| m.bits() == bits & FLAG_METHOD_MASK)
            .filter(|_| bits & !(FLAG_SYNC | FLAG_METHOD_MASK) == 0)
            .ok_or(PacketError::Flags { flags: bits })?;
        Ok(Self {
            sync: bits & FLAG_SYNC != 0,
            method,
        })
    }
}

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

fn check_magic_and_version(buf: &[u8]) -> Result<(), PacketError> {
    let magic = BigEndian::read_u32(&buf[0..4]);
    if magic != MAGIC {
        return Err(PacketError::Magic { got: magic });
    }
    let version = BigEndian::read_u32(&buf[4..8]);
    if version != VERSION {
        return Err(PacketError::Version { got: version });
    }
    Ok(())
}

/// What is wrong with a packet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// Not a multifd packet.
    #[error("packet magic {got:#010x}, expected {MAGIC:#010x}")]
    Magic {
        /// The first word.
        got: u32,
    },
    /// A version that nobody has defined yet.
    #[error("packet version {got}, expected {VERSION}")]
    Version {
        /// The version.
        got: u32,
    },
    /// The handshake of another VM's channel.
    #[error("{channel} is of vm {}, expected {}", uuid_text(.got), uuid_text(.expected))]
    Uuid {
        /// The channel.
        channel: ChannelId,
        /// The UUID received.
        got: [u8; 16],
        /// Our own.
        expected: [u8; 16],
    },
    /// A channel id that this migration does not have.
    #[error("{channel} does not exist, there are {channels} from 0 on")]
    Channel {
        /// The channel.
        channel: ChannelId,
        /// How many there are.
        channels: ChannelCount,
    },
    /// Flags with a meaning we do not know.
    #[error("packet flags {flags:#x} are not known")]
    Flags {
        /// The flags.
        flags: u32,
    },
    /// A packet of device state (VFIO), where none is taken.
    #[error("packet of device state, which is not expected here")]
    DeviceState,
    /// A packet of device state whose device's name is empty, too long or not UTF-8.
    #[error("packet of device state without the name of a device")]
    DeviceName,
    /// A packet of device state without any.
    #[error("packet of device state of '{idstr}' is empty")]
    EmptyDeviceState {
        /// The device.
        idstr: IdStr,
    },
    /// Device state for a device that this VM does not have.
    #[error("packet of device state for '{idstr}', instance {instance}, which is not there")]
    UnknownDevice {
        /// The device's name.
        idstr: IdStr,
        /// Its instance.
        instance: InstanceId,
    },
    /// More device state in one packet than the device takes.
    #[error("packet of {got} bytes of device state of '{idstr}', expected at most {max}")]
    DeviceStateLength {
        /// The device.
        idstr: IdStr,
        /// Length of the payload, bytes.
        got: u32,
        /// The most it takes, bytes.
        max: u32,
    },
    /// Compressed in another way than configured; it is not negotiated.
    #[error("packet is compressed by {got:?}, expected {expected:?}")]
    Method {
        /// The method in its flags.
        got: Method,
        /// The one configured.
        expected: Method,
    },
    /// More pages than a packet can have.
    #[error("packet of {pages} pages, expected at most {PAGES_PER_PACKET}")]
    Pages {
        /// How many.
        pages: u64,
    },
    /// More pages than the packet itself says it has room for.
    #[error("packet of {normal} normal and {zero} zero pages with room for {allocated}")]
    Counts {
        /// Pages with data.
        normal: u32,
        /// Zero pages.
        zero: u32,
        /// Pages allocated.
        allocated: u32,
    },
    /// A payload of a length that cannot be.
    #[error("payload of {got} bytes for {normal} pages by {method:?}, expected {}{max}",
        if *.method == Method::None || *.normal == 0 { "" } else { "at most " })]
    PayloadLength {
        /// Its length in bytes.
        got: u32,
        /// Pages with data.
        normal: u32,
        /// How the channel is compressed.
        method: Method,
        /// The longest it may be, bytes.
        max: u32,
    },
    /// The block's name does not end, or is too long to be written.
    #[error("ram block name is longer than 255 bytes")]
    NameLength,
    /// A block that this VM does not have.
    #[error("no ram block '{name}'")]
    Block {
        /// Its name.
        name: String,
    },
    /// A block that both sides share, whose pages stay where they are (`x-ignore-shared`).
    #[error("page of the shared ram block '{name}', which is not migrated")]
    IgnoredBlock {
        /// Its name.
        name: String,
    },
    /// An offset that is not that of a page.
    #[error("offset {index} of the packet, {offset:#x}, is not that of a page")]
    Alignment {
        /// Position in the packet.
        index: usize,
        /// The offset, bytes.
        offset: u64,
    },
    /// An offset outside its block.
    #[error("offset {index} of the packet, {offset:#x}, is outside a block of {used_length:#x}")]
    Offset {
        /// Position in the packet.
        index: usize,
        /// The offset, bytes.
        offset: u64,
        /// Length of the block, bytes.
        used_length: u64,
    },
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    [
        &uuid[0..4],
        &uuid[4..6],
        &uuid[6..8],
        &uuid[8..10],
        &uuid[10..16],
    ]
    .map(hex)
    .join("-")
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const LENGTH: u64 = 1 << 30;

    fn header(f: impl FnOnce(&mut [u8; HEADER_LEN])) -> [u8; HEADER_LEN] {
        let mut buf = [0xff; HEADER_LEN];
        PacketHeader {
            flags: PacketFlags {
                sync: false,
                method: Method::None,
            },
            number: 7,
            block: b"pc.ram",
            normal: &[0x1000, 0x3000],
            zero: &[0],
            payload_len: 8192,
        }
        .fill(&mut buf)
        .unwrap();
        f(&mut buf);
        buf
    }

    fn unfill_error(f: impl FnOnce(&mut [u8; HEADER_LEN])) -> PacketError {
        PacketView::unfill(&header(f), Method::None).unwrap_err()
    }

    #[test]
    fn a_hello_is_the_bytes_qemu_sends() {
        let uuid = std::array::from_fn(|i| u8::try_from(i * 0x11).unwrap());
        let hello = Hello {
            uuid,
            channel: ChannelId::new(1),
        };
        let mut bytes = vec![0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1];
        bytes.extend_from_slice(&uuid);
        bytes.push(1);
        bytes.resize(HELLO_LEN, 0);
        assert_eq!(hello.encode().as_slice(), bytes);
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
    }

    #[test]
    fn a_hello_of_another_vm_version_or_channel_is_refused() {
        let two = ChannelCount::new(2).unwrap();
        let hello = |id| Hello {
            uuid: [1; 16],
            channel: ChannelId::new(id),
        };
        assert!(hello(1).check(&[1; 16], two).is_ok());
        let e = hello(1).check(&[2; 16], two).unwrap_err();
        assert!(
            e.to_string()
                .contains("01010101-0101-0101-0101-010101010101"),
            "{e}"
        );
        // QEMU before 11.1 let an id equal to the count pass.
        assert!(matches!(
            hello(2).check(&[1; 16], two),
            Err(PacketError::Channel { .. })
        ));
        let mut bytes = hello(1).encode();
        bytes[7] = 2;
        assert_eq!(Hello::decode(&bytes), Err(PacketError::Version { got: 2 }));
    }

    #[test]
    fn a_header_is_laid_out_as_qemu_lays_it_out() {
        let buf = header(|_| {});
        assert_eq!(HEADER_LEN, 1344);
        assert_eq!(
            buf[..24],
            *b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\0\0\0\0\x80\0\0\0\x02\0\0\x20\0"
        );
        assert_eq!(buf[24..40], *b"\0\0\0\0\0\0\0\x07\0\0\0\x01\0\0\0\0");
        assert!(buf[40..64].iter().all(|b| *b == 0));
        assert_eq!(buf[64..72], *b"pc.ram\0\0");
        assert_eq!(
            buf[320..344],
            *b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x30\0\0\0\0\0\0\0\0\0"
        );
        assert!(buf[344..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_sync_packet_has_no_room_no_name_and_no_method() {
        let mut buf = [0xff; HEADER_LEN];
        PacketHeader::sync(3).fill(&mut buf).unwrap();
        assert_eq!(buf[8..16], *b"\0\0\0\x01\0\0\0\0");
        let view = PacketView::unfill(&buf, Method::Zstd).unwrap();
        assert!(view.is_sync() && !view.has_pages());
        assert_eq!((view.number(), view.block().unwrap()), (3, &b""[..]));
    }

    #[test]
    fn a_sync_packet_of_an_old_source_may_carry_pages() {
        let buf = header(|b| b[11] |= 1);
        let view = PacketView::unfill(&buf, Method::None).unwrap();
        assert!(view.is_sync());
        assert_eq!((view.normal_pages(), view.zero_pages()), (2, 1));
    }

    #[test]
    fn a_packet_of_qemu_7_2_without_pages_may_have_the_length_of_the_one_before_it() {
        for flags in [0, 1] {
            let buf = header(|b| {
                b[11] = flags;
                b[16..20].fill(0);
                b[32..36].fill(0);
            });
            let view = PacketView::unfill(&buf, Method::Zlib).unwrap();
            assert_eq!((view.has_pages(), view.payload_len()), (false, 0));
        }
    }

    #[test]
    fn a_source_may_have_fewer_pages_in_a_packet_but_not_more() {
        let with_room = |pages: u8| header(|b| b[15] = pages);
        for pages in [3, 64, 128] {
            assert!(PacketView::unfill(&with_room(pages), Method::None).is_ok());
        }
        let e = PacketView::unfill(&with_room(129), Method::None).unwrap_err();
        assert_eq!(e.to_string(), "packet of 129 pages, expected at most 128");
    }

    #[test]
    fn c7_offsets_inside_a_page_are_refused() {
        let buf = header(|b| b[335] = 0x10);
        let view = PacketView::unfill(&buf, Method::None).unwrap();
        assert_eq!(
            view.offsets(LENGTH, &mut [0; PAGES_PER_PACKET])
                .unwrap_err(),
            PacketError::Alignment {
                index: 1,
                offset: 0x3010
            }
        );
    }

    #[test]
    fn c7_a_payload_length_that_contradicts_the_page_count_is_refused() {
        assert!(matches!(
            unfill_error(|b| b[22] = 0x10),
            PacketError::PayloadLength {
                got: 4096,
                normal: 2,
                ..
            }
        ));
    }

    #[test]
    fn c19_a_payload_beyond_the_bound_is_refused_before_memory_is_taken_for_it() {
        let buf = header(|b| {
            b[11] = 4;
            b[20..24].copy_from_slice(&(MAX_COMPRESSED_LEN + 1).to_be_bytes());
        });
        assert!(matches!(
            PacketView::unfill(&buf, Method::Zstd),
            Err(PacketError::PayloadLength {
                got: 0x10_0001,
                max: MAX_COMPRESSED_LEN,
                ..
            })
        ));
    }

    #[test]
    fn device_state_is_told_by_the_first_twelve_bytes_and_never_comes_with_anything_else() {
        let mut prefix = [0; PREFIX_LEN];
        prefix.copy_from_slice(b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40");
        assert_eq!(
            PacketView::check_prefix(&prefix),
            Ok(PacketKind::DeviceState)
        );
        for flags in [0x41, 0x42, 0xc0] {
            prefix[11] = flags;
            let flags = flags.into();
            assert_eq!(
                PacketView::check_prefix(&prefix),
                Err(PacketError::Flags { flags })
            );
        }
    }

    #[test]
    fn each_spoiled_field_is_named() {
        assert_eq!(
            unfill_error(|b| b[0] = 0),
            PacketError::Magic { got: 0x0022_3344 }
        );
        assert_eq!(unfill_error(|b| b[7] = 2), PacketError::Version { got: 2 });
        assert_eq!(
            unfill_error(|b| b[11] = 0x80),
            PacketError::Flags { flags: 0x80 }
        );
        assert_eq!(
            unfill_error(|b| b[11] = 0x06),
            PacketError::Flags { flags: 6 }
        );
        assert_eq!(
            unfill_error(|b| b[15] = 129),
            PacketError::Pages { pages: 129 }
        );
        assert!(matches!(
            unfill_error(|b| b[15] = 1),
            PacketError::Counts { .. }
        ));
        assert!(matches!(
            unfill_error(|b| b[35] = 127),
            PacketError::Counts { .. }
        ));
        assert!(matches!(
            unfill_error(|b| b[11] = 2),
            PacketError::Method {
                got: Method::Zlib,
                expected: Method::None
            }
        ));
        // A zero-only packet is compressed by nothing, but has the method in its flags.
        let empty = header(|b| b[19] = 0);
        assert!(matches!(
            PacketView::unfill(&empty, Method::None),
            Err(PacketError::PayloadLength {
                normal: 0,
                max: 0,
                ..
            })
        ));
        let long_name = header(|b| b[64..320].fill(b'x'));
        let view = PacketView::unfill(&long_name, Method::None).unwrap();
        assert_eq!(view.block(), Err(PacketError::NameLength));
        let buf = header(|_| {});
        let view = PacketView::unfill(&buf, Method::None).unwrap();
        assert!(matches!(
            view.offsets(0x3000, &mut [0; PAGES_PER_PACKET]),
            Err(PacketError::Offset {
                index: 1,
                offset: 0x3000,
                used_length: 0x3000
            })
        ));
    }

    #[test]
    fn more_pages_than_fit_are_not_written() {
        let offsets = [0; PAGES_PER_PACKET];
        let packet = PacketHeader {
            normal: &offsets,
            zero: &[0],
            ..PacketHeader::sync(0)
        };
        assert_eq!(
            packet.fill(&mut [0; HEADER_LEN]),
            Err(PacketError::Pages { pages: 129 })
        );
    }

    fn pages() -> impl Strategy<Value = (Vec<u64>, usize)> {
        (
            vec(0..LENGTH / PAGE_SIZE, 1..=PAGES_PER_PACKET),
            any::<prop::sample::Index>(),
        )
            .prop_map(|(pages, cut)| {
                let cut = cut.index(pages.len() + 1);
                (pages.into_iter().map(|p| p * PAGE_SIZE).collect(), cut)
            })
    }

    proptest! {
        #[test]
        fn what_is_filled_unfills_to_itself(
            (offsets, cut) in pages(),
            name in vec(1u8.., 1..=255),
            number: u64,
            sync: bool,
        ) {
            let (normal, zero) = offsets.split_at(cut);
            let mut buf = [0xff; HEADER_LEN];
            PacketHeader {
                flags: PacketFlags { sync, method: Method::None },
                number,
                block: &name,
                normal,
                zero,
                payload_len: u32::try_from(normal.len()).unwrap() * PAGE_LEN,
            }
            .fill(&mut buf)
            .unwrap();
            let view = PacketView::unfill(&buf, Method::None).unwrap();
            prop_assert_eq!(view.is_sync(), sync);
            prop_assert_eq!(view.number(), number);
            prop_assert_eq!(view.block().unwrap(), &name[..]);
            let mut got = [0; PAGES_PER_PACKET];
            prop_assert_eq!(view.offsets(LENGTH, &mut got).unwrap(), (normal, zero));
        }

        #[test]
        fn any_mutation_gives_pages_of_the_block_or_an_error(
            mutations in vec((0..HEADER_LEN, any::<u8>()), 1..16),
            used_length in (1..LENGTH / PAGE_SIZE).prop_map(|p| p * PAGE_SIZE),
            zstd: bool,
        ) {
            let mut buf = header(|b| if zstd { b[11] = 4 });
            for (at, value) in mutations {
                buf[at] = value;
            }
            let method = if zstd { Method::Zstd } else { Method::None };
            let mut got = [0; PAGES_PER_PACKET];
            if let Ok(view) = PacketView::unfill(&buf, method) {
                prop_assert!(view.payload_len() <= MAX_COMPRESSED_LEN);
                let _ = view.block();
                if let Ok((normal, zero)) = view.offsets(used_length, &mut got) {
                    prop_assert!(normal.len() + zero.len() <= PAGES_PER_PACKET);
                    for offset in normal.iter().chain(zero) {
                        prop_assert!(offset + PAGE_SIZE <= used_length);
                    }
                }
            }
        }
    }
}
