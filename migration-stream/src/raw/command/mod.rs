//! Commands of the main stream (`migration/savevm.c`, QEMU 11.1).
//!
//! Frame: `0x08`, be16 number, be16 payload length, payload. There is no footer.

mod error;
mod number;

use bytes::BufMut;

pub use self::error::CommandError;
pub use self::number::CommandNumber;
use crate::IdStr;
use crate::error::DecodeError;
use crate::raw::codec::Reader;
use crate::raw::section::SectionType;

/// A command with its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The destination opens the reverse direction for return path messages.
    OpenReturnPath,
    /// To be answered with a PONG of the same value.
    Ping(u32),
    /// Postcopy may follow; without a payload only that of dirty bitmaps.
    PostcopyAdvise(Option<PostcopyAdvice>),
    /// Pages may come while device state loads.
    PostcopyListen,
    /// Start the VM; ends all nested section loops.
    PostcopyRun,
    /// Drop ranges of a RAM block.
    PostcopyRamDiscard(RamDiscard),
    /// A nested stream of this many bytes follows. Nothing is allocated for it here.
    Packaged {
        /// Length of the nested stream, bytes.
        size: u32,
    },
    /// The source is ready to resume; answered with RESUME_ACK.
    PostcopyResume,
    /// Asks for the bitmap of received pages of a RAM block.
    RecvBitmap(IdStr),
    /// The source's VM has stopped, the final phase begins.
    SwitchoverStart,
}

/// What both sides must agree on before postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostcopyAdvice {
    /// The page sizes of all RAM blocks, bytes, or-ed together.
    pub ram_page_sizes: u64,
    /// The target's page size, bytes.
    pub target_page_size: u64,
}

/// Ranges of one RAM block that the destination has to drop: at least one, as many as fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamDiscard {
    block: IdStr,
    ranges: Vec<DiscardRange>,
}

/// A range of bytes of a RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
}

impl RamDiscard {
    /// How many ranges QEMU puts into one command; a receiver takes as many as fit.
    pub const QEMU_MAX_RANGES: usize = 12;
    const RANGE_LEN: usize = 16;

    /// The command to drop `ranges` of `block`.
    ///
    /// # Errors
    /// There are no ranges, or more than a payload of 65535 bytes holds.
    pub fn new(block: IdStr, ranges: Vec<DiscardRange>) -> Result<Self, CommandError> {
        let max = (usize::from(u16::MAX) - 3 - block.as_str().len()) / Self::RANGE_LEN;
        if ranges.is_empty() || ranges.len() > max {
            return Err(CommandError::DiscardRanges {
                count: ranges.len(),
                max,
            });
        }
        Ok(Self { block, ranges })
    }

    /// The block.
    #[must_use]
    pub const fn block(&self) -> &IdStr {
        &self.block
    }

    /// The ranges.
    #[must_use]
    pub fn ranges(&self) -> &[DiscardRange] {
        &self.ranges
    }

    fn len(&self) -> usize {
        3 + self.block.as_str().len() + self.ranges.len() * Self::RANGE_LEN
    }

    fn encode(&self, out: &mut impl BufMut) {
        out.put_u8(0); // version
        self.block.encode(out);
        out.put_u8(0); // end of the name
        for range in &self.ranges {
            out.put_u64(range.start);
            out.put_u64(range.length);
        }
    }

    fn decode(payload: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = payload.clone();
        let version = payload.u8()?;
        if version != 0 {
            return Err(at.error(CommandError::DiscardVersion { found: version }));
        }
        let block = payload.idstr()?;
        let end = payload.u8()?;
        if end != 0 {
            return Err(at.error(CommandError::DiscardName { block, found: end }));
        }
        if !payload.rest().len().is_multiple_of(Self::RANGE_LEN) {
            return Err(at.error(CommandError::DiscardPartialRange {
                block,
                left: payload.rest().len(),
            }));
        }
        let mut ranges = Vec::with_capacity(payload.rest().len() / Self::RANGE_LEN);
        while !payload.rest().is_empty() {
            ranges.push(DiscardRange {
                start: payload.be64()?,
                length: payload.be64()?,
            });
        }
        Self::new(block, ranges).map_err(|e| at.error(e))
    }
}

impl Command {
    /// The command's number.
    #[must_use]
    pub const fn number(&self) -> CommandNumber {
        match self {
            Self::OpenReturnPath => CommandNumber::OpenReturnPath,
            Self::Ping(_) => CommandNumber::Ping,
            Self::PostcopyAdvise(_) => CommandNumber::PostcopyAdvise,
            Self::PostcopyListen => CommandNumber::PostcopyListen,
            Self::PostcopyRun => CommandNumber::PostcopyRun,
            Self::PostcopyRamDiscard(_) => CommandNumber::PostcopyRamDiscard,
            Self::Packaged { .. } => CommandNumber::Packaged,
            Self::PostcopyResume => CommandNumber::PostcopyResume,
            Self::RecvBitmap(_) => CommandNumber::RecvBitmap,
            Self::SwitchoverStart => CommandNumber::SwitchoverStart,
        }
    }

    /// Appends the command, type byte included.
    pub fn encode(&self, out: &mut impl BufMut) {
        let len = match self {
            Self::OpenReturnPath
            | Self::PostcopyAdvise(None)
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::PostcopyResume
            | Self::SwitchoverStart => 0,
            Self::Ping(_) | Self::Packaged { .. } => 4,
            Self::PostcopyAdvise(Some(_)) => 16,
            Self::PostcopyRamDiscard(discard) => discard.len(),
            Self::RecvBitmap(block) => 1 + block.as_str().len(),
        };
        out.put_u8(SectionType::Command.byte());
        out.put_u16(self.number().number());
        #[allow(clippy::cast_possible_truncation)] // IdStr and RamDiscard are made to fit
        out.put_u16(len as u16);
        match self {
            Self::Ping(value) | Self::Packaged { size: value } => out.put_u32(*value),
            Self::PostcopyAdvise(Some(advice)) => {
                out.put_u64(advice.ram_page_sizes);
                out.put_u64(advice.target_page_size);
            }
            Self::PostcopyRamDiscard(discard) => discard.encode(out),
            Self::RecvBitmap(block) => block.encode(out),
            Self::OpenReturnPath
            | Self::PostcopyAdvise(None)
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::PostcopyResume
            | Self::SwitchoverStart => {}
        }
    }

    /// Reads what follows the type byte.
    ///
    /// # Errors
    /// [`CommandError`]; number and length are checked before the payload is there. Or the bytes
    /// end before the command does.
    pub fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let at = r.clone();
        let number = r.be16()?;
        let len = r.be16()?;
        let Some(command) = CommandNumber::from_number(number) else {
            return Err(at.error(CommandError::Unknown { number, len }));
        };
        if command == CommandNumber::Deprecated0 {
            return Err(at.error(CommandError::Deprecated { len }));
        }
        let bad_length = || at.error(CommandError::Length { command, len });
        if !command.accepts(len) {
            return Err(bad_length());
        }
        let offset = r.offset();
        let mut payload = Reader::new(r.take(usize::from(len))?, offset);
        let value = Self::decode_payload(command, &mut payload)
            // The payload is here in full: what it lacks does not come later.
            .map_err(|e| e.missing().map_or(e, |_| bad_length()))?;
        if payload.rest().is_empty() {
            Ok(value)
        } else {
            Err(bad_length())
        }
    }

    fn decode_payload(
        command: CommandNumber,
        payload: &mut Reader<'_>,
    ) -> Result<Self, DecodeError> {
        Ok(match command {
            CommandNumber::OpenReturnPath => Self::OpenReturnPath,
            CommandNumber::Ping => Self::Ping(payload.be32()?),
            CommandNumber::PostcopyAdvise if payload.rest().is_empty() => {
                Self::PostcopyAdvise(None)
            }
            CommandNumber::PostcopyAdvise => Self::PostcopyAdvise(Some(PostcopyAdvice {
                ram_page_sizes: payload.be64()?,
                target_page_size: payload.be64()?,
            })),
            CommandNumber::PostcopyListen => Self::PostcopyListen,
            CommandNumber::PostcopyRun => Self::PostcopyRun,
            CommandNumber::PostcopyRamDiscard => {
                Self::PostcopyRamDiscard(RamDiscard::decode(payload)?)
            }
            CommandNumber::Packaged => Self::Packaged {
                size: payload.be32()?,
            },
            CommandNumber::Deprecated0 => {
                return Err(payload.error(CommandError::Deprecated { len: 0 }));
            }
            CommandNumber::PostcopyResume => Self::PostcopyResume,
            CommandNumber::RecvBitmap => Self::RecvBitmap(payload.idstr()?),
            CommandNumber::SwitchoverStart => Self::SwitchoverStart,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;

    fn encoded(command: &Command) -> Vec<u8> {
        let mut out = Vec::new();
        command.encode(&mut out);
        out
    }

    fn cause(bytes: &[u8]) -> Cause {
        Command::decode(&mut Reader::new(bytes, 0))
            .unwrap_err()
            .cause
    }

    #[test]
    fn commands_are_the_bytes_that_qemu_sends() {
        let cases: [(Command, &[u8]); 5] = [
            (Command::OpenReturnPath, &[8, 0, 1, 0, 0]),
            (Command::Ping(1), &[8, 0, 2, 0, 4, 0, 0, 0, 1]),
            (Command::SwitchoverStart, &[8, 0, 11, 0, 0]),
            (
                Command::PostcopyAdvise(Some(PostcopyAdvice {
                    ram_page_sizes: 4096,
                    target_page_size: 4096,
                })),
                &[
                    8, 0, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0,
                ],
            ),
            (
                Command::PostcopyRamDiscard(
                    RamDiscard::new(
                        IdStr::new("pc.ram").unwrap(),
                        vec![DiscardRange {
                            start: 0,
                            length: 0x0200_0000,
                        }],
                    )
                    .unwrap(),
                ),
                b"\x08\0\x06\0\x19\0\x06pc.ram\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0",
            ),
        ];
        for (command, bytes) in cases {
            assert_eq!(encoded(&command), bytes);
            let mut r = Reader::new(&bytes[1..], 1);
            assert_eq!(Command::decode(&mut r).unwrap(), command);
            assert!(r.rest().is_empty());
        }
    }

    #[test]
    fn command_8_is_refused_by_the_name_it_had() {
        for len in [0, 1] {
            let cause = cause(&[0, 8, 0, len]);
            assert_eq!(
                cause,
                CommandError::Deprecated {
                    len: u16::from(len)
                }
                .into()
            );
            assert!(cause.to_string().contains("ENABLE_COLO"));
        }
    }

    #[test]
    fn unknown_commands_are_refused_with_number_and_length() {
        for number in [0, 12, 0xff] {
            assert_eq!(
                cause(&[0, number, 0x12, 0x34]),
                CommandError::Unknown {
                    number: number.into(),
                    len: 0x1234
                }
                .into()
            );
        }
        assert_eq!(
            cause(&[0, 12, 0, 0]).to_string(),
            "unknown command 0xc (length 0x0)"
        );
    }

    #[test]
    fn a_payload_of_another_length_is_refused_before_it_is_read() {
        for (number, len) in [(1, 1), (2, 2), (3, 8), (7, 0), (10, 0), (11, 4), (6, 19)] {
            assert_eq!(
                cause(&[0, number, 0, len]),
                CommandError::Length {
                    command: CommandNumber::from_number(number.into()).unwrap(),
                    len: len.into()
                }
                .into()
            );
        }
    }

    #[test]
    fn a_name_that_does_not_fill_its_payload_is_refused() {
        for bytes in [&b"\0\x0a\0\x03\x01ab"[..], b"\0\x0a\0\x03\x05ab"] {
            assert_eq!(
                cause(bytes),
                CommandError::Length {
                    command: CommandNumber::RecvBitmap,
                    len: 3
                }
                .into()
            );
        }
    }

    #[test]
    fn a_discard_of_half_a_range_is_refused() {
        let mut bytes = encoded(&Command::PostcopyRamDiscard(
            RamDiscard::new(
                IdStr::new("pc.ram").unwrap(),
                vec![
                    DiscardRange {
                        start: 0,
                        length: 1
                    };
                    2
                ],
            )
            .unwrap(),
        ));
        bytes.truncate(bytes.len() - 8);
        bytes[4] -= 8;
        assert!(matches!(
            cause(&bytes[1..]),
            Cause::Command(CommandError::DiscardPartialRange { left: 24, .. })
        ));
    }
}
