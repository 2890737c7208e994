//! Messages of the return path, destination to source (`migration/migration.c`, QEMU 11.1).
//!
//! Frame: be16 number, be16 payload length, payload. After SHUT a COLO secondary goes on with
//! COLO's own messages on the same channel, so a reader must not take more than one message asks.

mod error;
mod number;

pub use self::error::ReturnPathError;
pub use self::number::ReturnPathNumber;
use bytes::BufMut;

use crate::IdStr;
use crate::error::DecodeError;
use crate::raw::codec::Reader;

/// The longest payload, bytes; also that of QEMU's source.
pub const MAX_PAYLOAD: u16 = 512;

/// A message of the return path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnPathMessage {
    /// The last message: 0 when the migration was loaded, anything else when it failed.
    Shut {
        /// The status.
        status: u32,
    },
    /// Answer to a PING, with its value.
    Pong(u32),
    /// Postcopy: send these pages of a block.
    ReqPagesId {
        /// First byte in the block.
        start: u64,
        /// Number of bytes.
        length: u32,
        /// The block.
        block: IdStr,
    },
    /// Postcopy: send these pages of the block named last.
    ReqPages {
        /// First byte in the block.
        start: u64,
        /// Number of bytes.
        length: u32,
    },
    /// Postcopy recovery: the bitmap of a block follows, outside the frame.
    RecvBitmap {
        /// The block.
        block: IdStr,
    },
    /// Postcopy recovery: ready to go on. QEMU's value is 1.
    ResumeAck {
        /// The value.
        value: u32,
    },
    /// A device is ready for the switch-over.
    SwitchoverAck,
}

impl ReturnPathMessage {
    /// The message's number.
    #[must_use]
    pub const fn number(&self) -> ReturnPathNumber {
        match self {
            Self::Shut { .. } => ReturnPathNumber::Shut,
            Self::Pong(_) => ReturnPathNumber::Pong,
            Self::ReqPagesId { .. } => ReturnPathNumber::ReqPagesId,
            Self::ReqPages { .. } => ReturnPathNumber::ReqPages,
            Self::RecvBitmap { .. } => ReturnPathNumber::RecvBitmap,
            Self::ResumeAck { .. } => ReturnPathNumber::ResumeAck,
            Self::SwitchoverAck => ReturnPathNumber::SwitchoverAck,
        }
    }

    /// Appends the message.
    pub fn encode(&self, out: &mut impl BufMut) {
        let name = |block: &IdStr| 1 + block.as_str().len();
        let len = match self {
            Self::Shut { .. } | Self::Pong(_) | Self::ResumeAck { .. } => 4,
            Self::ReqPagesId { block, .. } => 12 + name(block),
            Self::ReqPages { .. } => 12,
            Self::RecvBitmap { block } => name(block),
            Self::SwitchoverAck => 0,
        };
        out.put_u16(self.number().number());
        #[allow(clippy::cast_possible_truncation)] // at most 12 + 1 + IdStr::MAX_LEN
        out.put_u16(len as u16);
        match self {
            Self::Shut { status: value } | Self::Pong(value) | Self::ResumeAck { value } => {
                out.put_u32(*value);
            }
            Self::ReqPagesId {
                start,
                length,
                block,
            } => {
                out.put_u64(*start);
                out.put_u32(*length);
                block.encode(out);
            }
            Self::ReqPages { start, length } => {
                out.put_u64(*start);
                out.put_u32(*length);
            }
            Self::RecvBitmap { block } => block.encode(out),
            Self::SwitchoverAck => {}
        }
    }

    /// Reads one message.
    ///
    /// # Errors
    /// [`ReturnPathError`]; number and length are checked before the payload is there. Or the
    /// bytes end before the message does: [`DecodeError::missing`] says by how much.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.clone();
        let number = r.be16()?;
        let len = r.be16()?;
        let Some(message) = ReturnPathNumber::from_number(number) else {
            return Err(at.error(ReturnPathError::Unknown { number, len }));
        };
        let bad_length = || at.error(ReturnPathError::Length { message, len });
        if len > MAX_PAYLOAD || !message.accepts(len) {
            return Err(bad_length());
        }
        let offset = r.offset();
        let mut payload = Reader::new(r.take(usize::from(len))?, offset);
        let value = Self::decode_payload(message, &mut payload)
            // The payload is here in full: what it lacks does not come later.
            .map_err(|e| e.missing().map_or(e, |_| bad_length()))?;
        if payload.rest().is_empty() {
            Ok(value)
        } else {
            Err(bad_length())
        }
    }

    fn decode_payload(
        message: ReturnPathNumber,
        payload: &mut Reader<'_>,
    ) -> Result<Self, DecodeError> {
        Ok(match message {
            ReturnPathNumber::Shut => Self::Shut {
                status: payload.be32()?,
            },
            ReturnPathNumber::Pong => Self::Pong(payload.be32()?),
            ReturnPathNumber::ReqPagesId => Self::ReqPagesId {
                start: payload.be64()?,
                length: payload.be32()?,
                block: payload.idstr()?,
            },
            ReturnPathNumber::ReqPages => Self::ReqPages {
                start: payload.be64()?,
                length: payload.be32()?,
            },
            ReturnPathNumber::RecvBitmap => Self::RecvBitmap {
                block: payload.idstr()?,
            },
            ReturnPathNumber::ResumeAck => Self::ResumeAck {
                value: payload.be32()?,
            },
            ReturnPathNumber::SwitchoverAck => Self::SwitchoverAck,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;

    fn decode(bytes: &[u8]) -> Result<(ReturnPathMessage, usize), DecodeError> {
        let mut r = Reader::new(bytes, 0);
        ReturnPathMessage::decode(&mut r).map(|m| (m, r.consumed()))
    }

    #[test]
    fn messages_are_the_bytes_that_qemu_sends() {
        let pc_ram = IdStr::new("pc.ram").unwrap();
        let cases: [(ReturnPathMessage, &[u8]); 5] = [
            (ReturnPathMessage::Pong(1), &[0, 2, 0, 4, 0, 0, 0, 1]),
            (
                ReturnPathMessage::Shut { status: 0 },
                &[0, 1, 0, 4, 0, 0, 0, 0],
            ),
            (ReturnPathMessage::SwitchoverAck, &[0, 7, 0, 0]),
            (
                ReturnPathMessage::ReqPagesId {
                    start: 0xc0000,
                    length: 4096,
                    block: pc_ram,
                },
                b"\0\x03\0\x13\0\0\0\0\0\x0c\0\0\0\0\x10\0\x06pc.ram",
            ),
            (
                ReturnPathMessage::ReqPages {
                    start: 0xc1000,
                    length: 4096,
                },
                b"\0\x04\0\x0c\0\0\0\0\0\x0c\x10\0\0\0\x10\0",
            ),
        ];
        for (message, bytes) in cases {
            let mut out = Vec::new();
            message.encode(&mut out);
            assert_eq!(out, bytes);
            // What comes after the message stays where it is.
            out.extend_from_slice(&[0; 4]);
            assert_eq!(decode(&out).unwrap(), (message, bytes.len()));
        }
    }

    #[test]
    fn a_message_may_arrive_byte_by_byte() {
        let bytes = [0, 2, 0, 4, 0, 0, 0, 1];
        for n in 0..bytes.len() {
            let missing = decode(&bytes[..n]).unwrap_err().missing().unwrap();
            assert!((1..=bytes.len() - n).contains(&missing));
        }
    }

    #[test]
    fn unknown_messages_and_wrong_lengths_are_refused_before_the_payload_is_there() {
        for number in [0u8, 8, 255] {
            assert_eq!(
                decode(&[0, number, 0xff, 0xff]).unwrap_err().cause,
                Cause::ReturnPath(ReturnPathError::Unknown {
                    number: number.into(),
                    len: 0xffff
                })
            );
        }
        for (number, len) in [
            (1u8, 0u16),
            (2, 8),
            (3, 13),
            (3, 513),
            (4, 13),
            (5, 1),
            (7, 4),
        ] {
            let [hi, lo] = len.to_be_bytes();
            assert_eq!(
                decode(&[0, number, hi, lo]).unwrap_err().cause,
                Cause::ReturnPath(ReturnPathError::Length {
                    message: ReturnPathNumber::from_number(number.into()).unwrap(),
                    len
                })
            );
        }
    }
}
