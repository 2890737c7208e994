//! What is on the heartbeat's connection: one beat after the other, each of 64 bytes.
//!
//! | bytes | what (big endian) |
//! |---|---|
//! | 0..4 | `CLHB` |
//! | 4..6 | version, 1 |
//! | 6 | role of the sender: 1 primary, 2 secondary |
//! | 7 | what has become of it: [`Phase`] |
//! | 8..24 | the session: the guest's UUID |
//! | 24..32 | the sender's process: a random number |
//! | 32..40 | sequence number, from 1 |
//! | 40..48 | the highest sequence number that the sender has seen of the receiver, 0 for none |
//! | 48..52 | how long the sender waits for a beat before it takes the receiver for lost, ms |
//! | 52 | what the sender does then: [`OnHeartbeatLoss`] |
//! | 53..60 | zero |
//! | 60..64 | CRC-32 (ISO-HDLC) of the bytes before |
//!
//! This is a format of this project. QEMU has no heartbeat.

use std::time::Duration;

use crate::failover::Role;
use crate::policy::OnHeartbeatLoss;

/// Length of a beat, bytes.
pub const BEAT_LEN: usize = 64;

const MAGIC: [u8; 4] = *b"CLHB";
const VERSION: u16 = 1;

/// Where a side is in the life of its pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It is one of two sides, or not yet in COLO.
    #[default]
    Paired,
    /// It has lost the other side, and asks the arbiter.
    Asking,
    /// It goes on alone.
    Alone,
    /// Its guest is stopped for good.
    Stopped,
    /// Its guest is suspended, because its lease has expired, until the arbiter names the owner.
    Suspended,
}

/// One beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Beat {
    /// Who sends it.
    pub role: Role,
    /// What has become of the sender.
    pub phase: Phase,
    /// Which pair it belongs to.
    pub session: [u8; 16],
    /// Which process sends it.
    pub process: u64,
    /// Its number.
    pub sequence: u64,
    /// The highest number seen of the receiver's.
    pub seen: u64,
    /// How long the sender waits before it takes the receiver for lost: whole milliseconds.
    pub timeout: Duration,
    /// What it does then.
    pub on_loss: OnHeartbeatLoss,
}

/// Why bytes are no beat of the peer's. Their connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BeatError {
    /// Something else than a heartbeat is at the other end.
    #[error("not a heartbeat")]
    Magic,
    /// A later version.
    #[error("heartbeat of version {0}, not {VERSION}")]
    Version(u16),
    /// The checksum is wrong.
    #[error("damaged heartbeat")]
    Checksum,
    /// A field has a value that it cannot have.
    #[error("heartbeat with a bad {0}")]
    Field(&'static str),
    /// Another pair's.
    #[error("heartbeat of another guest")]
    Session,
    /// From a side with the same role.
    #[error("the other side is a {0} too")]
    Role(Role),
    /// The peer was started again: its guest is not the one of this pair.
    #[error("heartbeat of another process than the peer's")]
    Process,
    /// The process has this side's number. No arbiter could tell the two apart.
    #[error("the other side's process has the same number as this one")]
    SameProcess,
    /// Not newer than the last one.
    #[error("heartbeat {sequence} after {last}")]
    Sequence {
        /// Its number.
        sequence: u64,
        /// The last one's.
        last: u64,
    },
    /// Both sides are set to take over. A broken link would make two guests.
    #[error("both sides are set to take over")]
    BothTakeOver,
    /// One side asks an arbiter, and the other goes on or stops by itself.
    #[error("one side asks an arbiter and the other does not")]
    OneAsks,
}

impl Beat {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; BEAT_LEN] {
        let mut bytes = [0; BEAT_LEN];
        let timeout = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        let role = match self.role {
            Role::Primary => 1,
            Role::Secondary => 2,
        };
        let phase = match self.phase {
            Phase::Paired => 0,
            Phase::Asking => 1,
            Phase::Alone => 2,
            Phase::Stopped => 3,
            Phase::Suspended => 4,
        };
        let on_loss = match self.on_loss {
            OnHeartbeatLoss::TakeOver => 1,
            OnHeartbeatLoss::Ask => 2,
            OnHeartbeatLoss::Stop => 3,
        };
        let mut at = 0;
        let mut put = |part: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + part.len()) {
                place.copy_from_slice(part);
            }
            at += part.len();
        };
        put(&MAGIC);
        put(&VERSION.to_be_bytes());
        put(&[role, phase]);
        put(&self.session);
        put(&self.process.to_be_bytes());
        put(&self.sequence.to_be_bytes());
        put(&self.seen.to_be_bytes());
        put(&timeout.to_be_bytes());
        put(&[on_loss]);
        if let Some((body, sum)) = bytes.split_last_chunk_mut::<4>() {
            *sum = crc32(body).to_be_bytes();
        }
        bytes
    }

    /// Reads a beat. Whether it is the peer's is another question.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(bytes: &[u8; BEAT_LEN]) -> Result<Self, BeatError> {
        let mut rest = bytes.as_slice();
        if *take::<4>(&mut rest)? != MAGIC {
            return Err(BeatError::Magic);
        }
        // Where a later version has its checksum is not known.
        match u16::from_be_bytes(*take(&mut rest)?) {
            VERSION => {}
            other => return Err(BeatError::Version(other)),
        }
        match bytes.split_last_chunk::<4>() {
            Some((body, sum)) if crc32(body).to_be_bytes() == *sum => {}
            _ => return Err(BeatError::Checksum),
        }
        let [role, phase] = *take(&mut rest)?;
        let session = *take(&mut rest)?;
        let process = u64::from_be_bytes(*take(&mut rest)?);
        let sequence = u64::from_be_bytes(*take(&mut rest)?);
        let seen = u64::from_be_bytes(*take(&mut rest)?);
        let timeout = u32::from_be_bytes(*take(&mut rest)?);
        let [on_loss] = *take(&mut rest)?;
        if *take::<7>(&mut rest)? != [0; 7] {
            return Err(BeatError::Field("reserved byte"));
        }
        if sequence == 0 {
            return Err(BeatError::Field("sequence number"));
        }
        if timeout == 0 {
            return Err(BeatError::Field("timeout"));
        }
        Ok(Self {
            role: match role {
                1 => Role::Primary,
                2 => Role::Secondary,
                _ => return Err(BeatError::Field("role")),
            },
            phase: match phase {
                0 => Phase::Paired,
                1 => Phase::Asking,
                2 => Phase::Alone,
                3 => Phase::Stopped,
                4 => Phase::Suspended,
                _ => return Err(BeatError::Field("phase")),
            },
            session,
            process,
            sequence,
            seen,
            timeout: Duration::from_millis(timeout.into()),
            on_loss: match on_loss {
                1 => OnHeartbeatLoss::TakeOver,
                2 => OnHeartbeatLoss::Ask,
                3 => OnHeartbeatLoss::Stop,
                _ => return Err(BeatError::Field("policy")),
            },
        })
    }
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], BeatError> {
    let (part, after) = rest
        .split_first_chunk::<N>()
        .ok_or(BeatError::Field("length"))?;
    *rest = after;
    Ok(part)
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat() -> Beat {
        Beat {
            role: Role::Secondary,
            phase: Phase::Alone,
            session: *b"0123456789abcdef",
            process: 0x1122_3344_5566_7788,
            sequence: 5,
            seen: 4,
            timeout: Duration::from_millis(150),
            on_loss: OnHeartbeatLoss::Ask,
        }
    }

    #[test]
    fn a_beat_is_these_bytes() {
        let bytes = beat().encode();
        assert_eq!(&bytes[..8], b"CLHB\0\x01\x02\x02");
        assert_eq!(&bytes[8..24], b"0123456789abcdef");
        assert_eq!(&bytes[24..32], b"\x11\x22\x33\x44\x55\x66\x77\x88");
        assert_eq!(
            &bytes[32..53],
            b"\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x04\0\0\0\x96\x02"
        );
        assert_eq!(&bytes[53..60], [0; 7]);
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(Beat::decode(&bytes), Ok(beat()));
    }

    #[test]
    fn no_byte_of_a_beat_may_differ() {
        for at in 0..BEAT_LEN {
            for bit in 0..8 {
                let mut bytes = beat().encode();
                bytes[at] ^= 1 << bit;
                assert!(Beat::decode(&bytes).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn every_field_is_checked_beside_the_checksum() {
        let spoilt = |at: usize, value: u8| {
            let mut bytes = beat().encode();
            bytes[at] = value;
            let sum = crc32(&bytes[..60]).to_be_bytes();
            bytes[60..].copy_from_slice(&sum);
            Beat::decode(&bytes).unwrap_err()
        };
        assert_eq!(spoilt(0, b'Q'), BeatError::Magic);
        assert_eq!(spoilt(5, 2), BeatError::Version(2));
        assert_eq!(spoilt(6, 3), BeatError::Field("role"));
        assert_eq!(spoilt(7, 5), BeatError::Field("phase"));
        assert_eq!(spoilt(39, 0), BeatError::Field("sequence number"));
        assert_eq!(spoilt(51, 0), BeatError::Field("timeout"));
        assert_eq!(spoilt(52, 0), BeatError::Field("policy"));
        assert_eq!(spoilt(59, 1), BeatError::Field("reserved byte"));
    }
}
