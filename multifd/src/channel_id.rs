//! How many channels there are, and which is which.

use std::fmt;
use std::num::NonZeroU8;

/// How many channels there are beside the main one: 1 to 255 (QEMU's `multifd-channels`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChannelCount(NonZeroU8);

impl ChannelCount {
    /// `count` channels; `None` for none.
    #[must_use]
    pub const fn new(count: u8) -> Option<Self> {
        match NonZeroU8::new(count) {
            Some(count) => Some(Self(count)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0.get()
    }

    /// The ids of the channels, from 0 on.
    pub fn ids(self) -> impl ExactSizeIterator<Item = ChannelId> {
        (0..self.get()).map(ChannelId)
    }
}

impl Default for ChannelCount {
    /// Two, as QEMU has it.
    fn default() -> Self {
        Self(NonZeroU8::MIN.saturating_add(1))
    }
}

impl fmt::Display for ChannelCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number by which a channel introduces itself, from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(u8);

impl ChannelId {
    /// Channel number `id`.
    #[must_use]
    pub const fn new(id: u8) -> Self {
        Self(id)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "multifd channel {}", self.0)
    }
}
