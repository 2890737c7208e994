//! What can be wrong with a packet.

use migration_stream::{IdStr, InstanceId};

use super::{MAGIC, Method, PAGES_PER_PACKET, VERSION};
use crate::channel_id::{ChannelCount, ChannelId};

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
    #[error("no ram block '{name}'", name = migration_stream::Escaped(.name))]
    Block {
        /// Its name.
        name: String,
    },
    /// A block that both sides share, whose pages stay where they are (`x-ignore-shared`).
    #[error("page of the shared ram block '{name}', which is not migrated", name = migration_stream::Escaped(.name))]
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
