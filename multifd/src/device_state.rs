//! Device state on the channels: what VFIO devices send beside guest memory (QEMU 10.0 and later).
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic [`MAGIC`] |
//! | 4 | 4 | version [`VERSION`] |
//! | 8 | 4 | flags, 0x40 |
//! | 12 | 256 | name of the device, with a zero byte behind it |
//! | 268 | 4 | its instance |
//! | 272 | 4 | payload length in bytes, not 0 |
//!
//! A packet can come on any channel, so packets of one device arrive in any order: what they
//! carry has to say its own.

use std::error;

use byteorder::{BigEndian, ByteOrder};
use migration_stream::{IdStr, InstanceId};

use crate::packet::{FLAG_DEVICE_STATE, MAGIC, PREFIX_LEN, PacketError, VERSION};

/// Length of the header, bytes.
pub const DEVICE_STATE_HEADER_LEN: usize = 276;

const INSTANCE_AT: usize = 268;
const LENGTH_AT: usize = 272;

/// A device, as sections of the main stream name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceId {
    /// `"<path>/<name>"`.
    pub idstr: IdStr,
    /// Tells devices of one name apart.
    pub instance: InstanceId,
}

/// The head of a packet of device state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStateHeader {
    /// Whose state it is.
    pub device: DeviceId,
    /// Length of the payload, bytes.
    pub payload_len: u32,
}

impl DeviceStateHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; DEVICE_STATE_HEADER_LEN] {
        let mut buf = [0; DEVICE_STATE_HEADER_LEN];
        let name = self.device.idstr.as_str().as_bytes();
        BigEndian::write_u32(&mut buf[0..4], MAGIC);
        BigEndian::write_u32(&mut buf[4..8], VERSION);
        BigEndian::write_u32(&mut buf[8..12], FLAG_DEVICE_STATE);
        // An IdStr has at most 255 bytes, and none of them is zero.
        buf[PREFIX_LEN..PREFIX_LEN + name.len()].copy_from_slice(name);
        BigEndian::write_u32(&mut buf[INSTANCE_AT..LENGTH_AT], self.device.instance.0);
        BigEndian::write_u32(&mut buf[LENGTH_AT..], self.payload_len);
        buf
    }

    /// The header in `buf`, whose first [`PREFIX_LEN`] bytes were checked.
    ///
    /// # Errors
    /// [`PacketError::DeviceName`] and [`PacketError::EmptyDeviceState`].
    pub fn decode(buf: &[u8; DEVICE_STATE_HEADER_LEN]) -> Result<Self, PacketError> {
        let name = buf[PREFIX_LEN..INSTANCE_AT].split(|b| *b == 0).next();
        let idstr = name
            .and_then(|name| IdStr::from_bytes(name).ok())
            .ok_or(PacketError::DeviceName)?;
        let payload_len = BigEndian::read_u32(&buf[LENGTH_AT..]);
        if payload_len == 0 {
            return Err(PacketError::EmptyDeviceState { idstr });
        }
        Ok(Self {
            device: DeviceId {
                idstr,
                instance: InstanceId(BigEndian::read_u32(&buf[INSTANCE_AT..LENGTH_AT])),
            },
            payload_len,
        })
    }
}

/// Where device state that comes on the channels goes. It is called from the channels' threads, for
/// one device from several at once.
pub trait DeviceStateSink: Send + Sync {
    /// The longest payload that the device takes, bytes; `None` for a device that is not there.
    /// Not more memory than that is taken for it.
    fn max_len(&self, device: &DeviceId) -> Option<u32>;

    /// Takes one packet's payload.
    ///
    /// # Errors
    /// It is of no use. The migration fails.
    fn load(
        &self,
        device: &DeviceId,
        payload: Vec<u8>,
    ) -> Result<(), Box<dyn error::Error + Send + Sync>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> DeviceStateHeader {
        DeviceStateHeader {
            device: DeviceId {
                idstr: IdStr::new("0000:00:02.0/vfio").unwrap(),
                instance: InstanceId(3),
            },
            payload_len: 0x1_0002,
        }
    }

    #[test]
    fn a_header_is_laid_out_as_qemu_lays_it_out() {
        let buf = header().encode();
        assert_eq!(buf[..12], *b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40");
        assert_eq!(buf[12..30], *b"0000:00:02.0/vfio\0");
        assert!(buf[30..268].iter().all(|b| *b == 0));
        assert_eq!(buf[268..], *b"\0\0\0\x03\0\x01\0\x02");
        assert_eq!(DeviceStateHeader::decode(&buf).unwrap(), header());
    }

    #[test]
    fn an_empty_state_and_a_name_that_is_none_are_refused() {
        let mut buf = header().encode();
        buf[272..].fill(0);
        assert!(matches!(
            DeviceStateHeader::decode(&buf),
            Err(PacketError::EmptyDeviceState { idstr }) if idstr == header().device.idstr
        ));
        for spoilt in [0, b'x', 0xff] {
            let mut buf = header().encode();
            buf[12..268].fill(spoilt);
            let e = DeviceStateHeader::decode(&buf).unwrap_err();
            assert_eq!(e, PacketError::DeviceName);
        }
    }
}
