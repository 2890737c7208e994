//! The numbers of the commands.

/// The number of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CommandNumber {
    /// See [`Command::OpenReturnPath`](super::Command::OpenReturnPath).
    OpenReturnPath = 1,
    /// See [`Command::Ping`](super::Command::Ping).
    Ping = 2,
    /// See [`Command::PostcopyAdvise`](super::Command::PostcopyAdvise).
    PostcopyAdvise = 3,
    /// See [`Command::PostcopyListen`](super::Command::PostcopyListen).
    PostcopyListen = 4,
    /// See [`Command::PostcopyRun`](super::Command::PostcopyRun).
    PostcopyRun = 5,
    /// See [`Command::PostcopyRamDiscard`](super::Command::PostcopyRamDiscard).
    PostcopyRamDiscard = 6,
    /// See [`Command::Packaged`](super::Command::Packaged).
    Packaged = 7,
    /// Before QEMU 11.0: ENABLE_COLO. No [`Command`](super::Command) has this number, so it cannot be sent, and
    /// receiving it is [`CommandError::Deprecated`](super::CommandError::Deprecated).
    Deprecated0 = 8,
    /// See [`Command::PostcopyResume`](super::Command::PostcopyResume).
    PostcopyResume = 9,
    /// See [`Command::RecvBitmap`](super::Command::RecvBitmap).
    RecvBitmap = 10,
    /// See [`Command::SwitchoverStart`](super::Command::SwitchoverStart).
    SwitchoverStart = 11,
}

impl CommandNumber {
    /// The command with this number; 0 (INVALID) and those beyond 11 are none.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::OpenReturnPath,
            2 => Self::Ping,
            3 => Self::PostcopyAdvise,
            4 => Self::PostcopyListen,
            5 => Self::PostcopyRun,
            6 => Self::PostcopyRamDiscard,
            7 => Self::Packaged,
            8 => Self::Deprecated0,
            9 => Self::PostcopyResume,
            10 => Self::RecvBitmap,
            11 => Self::SwitchoverStart,
            _ => return None,
        })
    }

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Whether a payload may have `len` bytes.
    pub(super) const fn accepts(self, len: u16) -> bool {
        match self {
            Self::OpenReturnPath
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::Deprecated0
            | Self::PostcopyResume
            | Self::SwitchoverStart => len == 0,
            Self::Ping | Self::Packaged => len == 4,
            Self::PostcopyAdvise => len == 0 || len == 16,
            // Version, a name of one byte, its end, one range; ranges are checked with the name.
            Self::PostcopyRamDiscard => len >= 20,
            Self::RecvBitmap => len >= 2 && len <= 256,
        }
    }

    /// The lengths accepted, for the error message.
    pub(super) const fn expected(self) -> &'static str {
        match self {
            Self::OpenReturnPath
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::Deprecated0
            | Self::PostcopyResume
            | Self::SwitchoverStart => "0",
            Self::Ping | Self::Packaged => "4",
            Self::PostcopyAdvise => "0 or 16",
            Self::PostcopyRamDiscard => "3, the length of the name, and a multiple of 16",
            Self::RecvBitmap => "1 and the length of the name",
        }
    }
}
