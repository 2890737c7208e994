//! The seven COLO messages.
//!
//! A message is a big-endian `u32` and nothing else: no length, no frame. Requests and device
//! state travel on the main channel, answers on the return path, after its last framed message
//! (SHUT). Two messages are followed by more on the same channel: [`Message::VmstateSend`] by a
//! section stream with the RAM, [`Message::VmstateSize`] by a big-endian `u64` and as many bytes of
//! device state. Format: QEMU 11.1, `qapi/migration.json` (`COLOMessage`) and `migration/colo.c`.

use std::fmt;

/// Bytes of a message on the wire.
pub const MESSAGE_LEN: usize = 4;

/// Bytes of the device state's size, which follow [`Message::VmstateSize`].
pub const DEVICE_SIZE_LEN: usize = 8;

/// A COLO message. The numbers are those of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Message {
    /// Secondary: its VM runs and it takes checkpoint requests.
    CheckpointReady = 0,
    /// Primary: a checkpoint begins.
    CheckpointRequest = 1,
    /// Secondary: it takes part in the checkpoint.
    CheckpointReply = 2,
    /// Primary: the RAM follows as a section stream that ends with EOF.
    VmstateSend = 3,
    /// Primary: the size of the device state and the device state follow.
    VmstateSize = 4,
    /// Secondary: the checkpoint has arrived, complete and sound. From here on it is the state that survives the
    /// primary.
    VmstateReceived = 5,
    /// Secondary: the checkpoint is the state of its VM.
    VmstateLoaded = 6,
}

impl Message {
    /// All messages, by number.
    pub(crate) const ALL: [Self; 7] = [
        Self::CheckpointReady,
        Self::CheckpointRequest,
        Self::CheckpointReply,
        Self::VmstateSend,
        Self::VmstateSize,
        Self::VmstateReceived,
        Self::VmstateLoaded,
    ];

    /// The number on the wire.
    #[must_use]
    pub(crate) const fn number(self) -> u32 {
        self as u32
    }

    /// The name in QEMU's schema.
    #[must_use]
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::CheckpointReady => "checkpoint-ready",
            Self::CheckpointRequest => "checkpoint-request",
            Self::CheckpointReply => "checkpoint-reply",
            Self::VmstateSend => "vmstate-send",
            Self::VmstateSize => "vmstate-size",
            Self::VmstateReceived => "vmstate-received",
            Self::VmstateLoaded => "vmstate-loaded",
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Returns the bytes of a message on the wire.
#[must_use]
pub const fn encode_message(message: Message) -> [u8; MESSAGE_LEN] {
    message.number().to_be_bytes()
}

/// Reads a message.
///
/// # Errors
/// [`UnknownMessage`] for a number that is no message.
pub fn decode_message(bytes: [u8; MESSAGE_LEN]) -> Result<Message, UnknownMessage> {
    let number = u32::from_be_bytes(bytes);
    Message::ALL
        .into_iter()
        .find(|message| message.number() == number)
        .ok_or(UnknownMessage { number })
}

/// A number that is no COLO message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("unknown colo message {number:#x}, the last known is {}", Message::VmstateLoaded.number())]
pub struct UnknownMessage {
    /// What was read.
    pub number: u32,
}

/// The start of the device state: [`Message::VmstateSize`] and the size, in one piece so that both
/// leave in one segment.
#[must_use]
pub fn encode_vmstate_size(size: u64) -> [u8; MESSAGE_LEN + DEVICE_SIZE_LEN] {
    let mut out = [0; MESSAGE_LEN + DEVICE_SIZE_LEN];
    let (message, bytes) = out.split_at_mut(MESSAGE_LEN);
    message.copy_from_slice(&encode_message(Message::VmstateSize));
    bytes.copy_from_slice(&size.to_be_bytes());
    out
}

/// Reads the size that follows [`Message::VmstateSize`], before any memory is taken for it.
///
/// # Errors
/// [`DeviceStateTooLarge`] beyond `limit` bytes.
pub fn decode_device_size(
    bytes: [u8; DEVICE_SIZE_LEN],
    limit: usize,
) -> Result<usize, DeviceStateTooLarge> {
    let size = u64::from_be_bytes(bytes);
    usize::try_from(size)
        .ok()
        .filter(|&fits| fits <= limit)
        .ok_or(DeviceStateTooLarge { size, limit })
}

/// The peer announced more device state than is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("device state of {size} bytes announced, the limit is {limit}")]
pub struct DeviceStateTooLarge {
    /// What was announced, bytes.
    pub size: u64,
    /// What is accepted, bytes.
    pub limit: usize,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_message_is_its_number_in_four_big_endian_bytes() {
        for (number, message) in (0_u8..).zip(Message::ALL) {
            assert_eq!(encode_message(message), [0, 0, 0, number]);
            assert_eq!(decode_message([0, 0, 0, number]), Ok(message));
        }
    }

    #[test]
    fn device_state_starts_with_its_message_and_its_size() {
        assert_eq!(
            encode_vmstate_size(0x7f22),
            [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0x7f, 0x22]
        );
    }

    proptest! {
        #[test]
        fn any_four_bytes_are_a_message_or_a_named_number(bytes: [u8; MESSAGE_LEN]) {
            let number = u32::from_be_bytes(bytes);
            match decode_message(bytes) {
                Ok(message) => prop_assert_eq!(encode_message(message), bytes),
                Err(error) => {
                    prop_assert!(number >= 7);
                    prop_assert_eq!(error, UnknownMessage { number });
                }
            }
        }

        #[test]
        fn no_device_size_beyond_the_limit_is_let_through(bytes: [u8; DEVICE_SIZE_LEN], limit: usize) {
            let size = u64::from_be_bytes(bytes);
            match decode_device_size(bytes, limit) {
                Ok(fits) => prop_assert!(fits <= limit && fits as u64 == size),
                Err(error) => prop_assert_eq!(error, DeviceStateTooLarge { size, limit }),
            }
        }
    }
}
