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

mod error;
mod flags;
mod header;
mod hello;
mod method;
#[cfg(test)]
mod tests;

use byteorder::{BigEndian, ByteOrder};
use migration_stream::PAGE_SIZE;

pub use error::PacketError;
pub(crate) use flags::FLAG_DEVICE_STATE;
pub use flags::{PacketFlags, PacketKind};
pub use header::{PacketHeader, PacketView};
pub use hello::Hello;
pub use method::Method;

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
