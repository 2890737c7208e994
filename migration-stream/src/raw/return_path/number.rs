//! The numbers of the messages.

/// The number of a return path message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ReturnPathNumber {
    /// See [`ReturnPathMessage::Shut`](super::ReturnPathMessage::Shut).
    Shut = 1,
    /// See [`ReturnPathMessage::Pong`](super::ReturnPathMessage::Pong).
    Pong = 2,
    /// See [`ReturnPathMessage::ReqPagesId`](super::ReturnPathMessage::ReqPagesId).
    ReqPagesId = 3,
    /// See [`ReturnPathMessage::ReqPages`](super::ReturnPathMessage::ReqPages).
    ReqPages = 4,
    /// See [`ReturnPathMessage::RecvBitmap`](super::ReturnPathMessage::RecvBitmap).
    RecvBitmap = 5,
    /// See [`ReturnPathMessage::ResumeAck`](super::ReturnPathMessage::ResumeAck).
    ResumeAck = 6,
    /// See [`ReturnPathMessage::SwitchoverAck`](super::ReturnPathMessage::SwitchoverAck).
    SwitchoverAck = 7,
}

impl ReturnPathNumber {
    /// The message with this number; 0 (INVALID) and those beyond 7 are none.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Shut,
            2 => Self::Pong,
            3 => Self::ReqPagesId,
            4 => Self::ReqPages,
            5 => Self::RecvBitmap,
            6 => Self::ResumeAck,
            7 => Self::SwitchoverAck,
            _ => return None,
        })
    }

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    pub(super) const fn accepts(self, len: u16) -> bool {
        match self {
            Self::Shut | Self::Pong | Self::ResumeAck => len == 4,
            // A name of 1 to 255 bytes and its count, after 12 or 0 bytes.
            Self::ReqPagesId => len >= 14 && len <= 268,
            Self::ReqPages => len == 12,
            Self::RecvBitmap => len >= 2 && len <= 256,
            Self::SwitchoverAck => len == 0,
        }
    }
}
