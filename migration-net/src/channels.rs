//! Multifd's channels as connections see them: how many there are, and how each introduces itself.
//!
//! Without the feature `multifd` there are none, and the types have no values.

#[cfg(feature = "multifd")]
pub(crate) use self::multifd_channels::{HELLO_LEN, Set, index, surplus};
#[cfg(not(feature = "multifd"))]
pub(crate) use self::no_channels::{HELLO_LEN, Set, index, surplus};
#[cfg(feature = "multifd")]
pub use multifd::{ChannelCount, ChannelId, packet::PacketError};
#[cfg(not(feature = "multifd"))]
pub use no_channels::{ChannelCount, ChannelId, PacketError};

/// The first bytes of a channel.
pub(crate) const CHANNEL_MAGIC: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

/// The channels that a migration has beside its main one.
///
/// Made from an `Option<&MultifdConfig>`, or a `&MultifdConfig`, with the feature `multifd`.
#[derive(Clone, Debug, Default)]
pub struct Channels(pub(crate) Option<Set>);

impl Channels {
    /// No channels: all goes over the main one.
    #[must_use]
    pub const fn none() -> Self {
        Self(None)
    }

    /// Returns how many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |set| set.ids().count())
    }

    /// Returns whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

#[cfg(feature = "multifd")]
mod multifd_channels {
    use multifd::packet::{Hello, MAGIC, PacketError};
    use multifd::{ChannelCount, ChannelId, MultifdConfig};

    use super::{CHANNEL_MAGIC, Channels};

    pub(crate) use multifd::packet::HELLO_LEN;

    const _: () = assert!(u32::from_be_bytes(CHANNEL_MAGIC) == MAGIC);

    /// The channels of one VM.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Set {
        count: ChannelCount,
        uuid: [u8; 16],
    }

    impl Set {
        pub(crate) const fn count(&self) -> ChannelCount {
            self.count
        }

        pub(crate) fn ids(&self) -> impl Iterator<Item = ChannelId> + use<> {
            self.count.ids()
        }

        /// What a channel says first.
        pub(crate) fn hello(&self, channel: ChannelId) -> [u8; HELLO_LEN] {
            let uuid = self.uuid;
            Hello { uuid, channel }.encode()
        }

        /// Which channel says this.
        pub(crate) fn identify(&self, hello: &[u8; HELLO_LEN]) -> Result<ChannelId, PacketError> {
            let hello = Hello::decode(hello)?;
            hello.check(&self.uuid, self.count)?;
            Ok(hello.channel)
        }
    }

    pub(crate) fn index(channel: ChannelId) -> usize {
        channel.get().into()
    }

    /// The channel of this VM that is one too many.
    pub(crate) const fn surplus(refused: &PacketError) -> Option<ChannelId> {
        match refused {
            PacketError::Channel { channel, .. } => Some(*channel),
            _ => None,
        }
    }

    impl From<&MultifdConfig> for Channels {
        fn from(config: &MultifdConfig) -> Self {
            Self(Some(Set {
                count: config.channels,
                uuid: config.uuid,
            }))
        }
    }

    impl From<Option<&MultifdConfig>> for Channels {
        fn from(config: Option<&MultifdConfig>) -> Self {
            config.map_or(Self(None), Self::from)
        }
    }
}

#[cfg(not(feature = "multifd"))]
mod no_channels {
    use std::{fmt, iter};

    /// As many as a greeting of the main channel.
    pub(crate) const HELLO_LEN: usize = 4;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    enum Never {}

    macro_rules! without_values {
        ($($(#[$meta:meta])* $visibility:vis $name:ident),*) => {$(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
            $visibility struct $name(Never);

            impl fmt::Display for $name {
                fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                    match self.0 {}
                }
            }
        )*};
    }

    without_values! {
        /// A channel. There is none without the feature `multifd`.
        pub ChannelId,
        /// How many channels. There is no such number without the feature `multifd`.
        pub ChannelCount,
        /// What is wrong with a channel's greeting. There is none without the feature `multifd`.
        pub PacketError,
        pub(crate) Set
    }

    impl std::error::Error for PacketError {}

    impl Set {
        pub(crate) const fn count(&self) -> ChannelCount {
            match self.0 {}
        }

        pub(crate) fn ids(&self) -> iter::Empty<ChannelId> {
            match self.0 {}
        }

        pub(crate) const fn hello(&self, _: ChannelId) -> [u8; HELLO_LEN] {
            match self.0 {}
        }

        pub(crate) const fn identify(&self, _: &[u8; HELLO_LEN]) -> Result<ChannelId, PacketError> {
            match self.0 {}
        }
    }

    pub(crate) const fn index(channel: ChannelId) -> usize {
        match channel.0 {}
    }

    pub(crate) const fn surplus(refused: &PacketError) -> Option<ChannelId> {
        match refused.0 {}
    }
}
