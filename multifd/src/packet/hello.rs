//! The handshake.

use byteorder::{BigEndian, ByteOrder};

use super::{HELLO_LEN, MAGIC, PacketError, VERSION, check_magic_and_version};
use crate::channel_id::{ChannelCount, ChannelId};

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
