//! Tells connections apart by their first bytes, without I/O.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::channels::{CHANNEL_MAGIC, ChannelId, Channels, HELLO_LEN, PacketError, Set, index};

/// The first bytes of a main stream, `QEVM`.
pub const MAIN_MAGIC: [u8; 4] = *b"QEVM";

/// What a connection turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The main channel. [`MAIN_MAGIC`], and nothing behind it, has been read from it.
    Main,
    /// A multifd channel. Its handshake, and nothing behind it, has been read from it.
    Channel(ChannelId),
}

impl Role {
    /// The id of a multifd channel.
    pub(super) const fn channel(self) -> Option<ChannelId> {
        match self {
            Self::Main => None,
            Self::Channel(id) => Some(id),
        }
    }

    /// What messages call it.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Main => "main channel".to_owned(),
            Self::Channel(id) => id.to_string(),
        }
    }
}

/// What a new connection has said so far.
#[derive(Clone, Debug)]
pub struct Greeting {
    buf: [u8; HELLO_LEN],
    have: usize,
}

impl Greeting {
    /// Nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            buf: [0; HELLO_LEN],
            have: 0,
        }
    }

    /// Where the bytes that are read next belong. No more may be read from the connection than fit:
    /// what follows is not the classifier's.
    pub fn wanted(&mut self) -> &mut [u8] {
        let end = if self.have < MAIN_MAGIC.len() {
            MAIN_MAGIC.len()
        } else {
            HELLO_LEN
        };
        self.buf.get_mut(self.have..end).unwrap_or_default()
    }

    fn magic(&self) -> Option<[u8; 4]> {
        self.buf
            .first_chunk::<4>()
            .filter(|magic| self.have >= magic.len())
            .copied()
    }
}

impl Default for Greeting {
    fn default() -> Self {
        Self::new()
    }
}

/// Decides what each connection is, and knows which are still missing.
#[derive(Clone, Debug)]
pub struct Classifier {
    expected: Channels,
    main: bool,
    channels: Vec<bool>,
}

impl Classifier {
    /// Expects a main channel, and `channels` if there are any.
    #[must_use]
    pub fn new(channels: impl Into<Channels>) -> Self {
        let expected: Channels = channels.into();
        let channels = vec![false; expected.len()];
        Self {
            expected,
            main: false,
            channels,
        }
    }

    /// `n` bytes were read into [`Greeting::wanted`]; 0 is the end of the connection. Returns what
    /// the connection is, `None` while it has not said enough. The place it takes is taken from
    /// then on, until [`Classifier::release`].
    ///
    /// # Errors
    /// Why this connection is not part of the migration. It says nothing about the others.
    pub fn advance(&mut self, greeting: &mut Greeting, n: usize) -> Result<Option<Role>, Refusal> {
        if n == 0 {
            return Err(Refusal::Ended { got: greeting.have });
        }
        greeting.have = (greeting.have + n).min(HELLO_LEN);
        let Some(magic) = greeting.magic() else {
            return Ok(None);
        };
        if magic == MAIN_MAGIC {
            if self.main {
                return Err(Refusal::SecondMain);
            }
            self.main = true;
            return Ok(Some(Role::Main));
        }
        if magic != CHANNEL_MAGIC {
            return Err(Refusal::Magic {
                got: u32::from_be_bytes(magic),
            });
        }
        let Some(set) = &self.expected.0 else {
            return Err(Refusal::MultifdOff);
        };
        if greeting.have < HELLO_LEN {
            return Ok(None);
        }
        let channel = set.identify(&greeting.buf)?;
        match self.channels.get_mut(index(channel)) {
            Some(taken @ false) => *taken = true,
            _ => return Err(Refusal::ChannelTwice { channel }),
        }
        Ok(Some(Role::Channel(channel)))
    }

    /// The connection that had this role is gone; another may take its place.
    pub fn release(&mut self, role: Role) {
        match role {
            Role::Main => self.main = false,
            Role::Channel(id) => {
                if let Some(taken) = self.channels.get_mut(index(id)) {
                    *taken = false;
                }
            }
        }
    }

    /// Whether the main channel is there.
    #[must_use]
    pub const fn has_main(&self) -> bool {
        self.main
    }

    /// The multifd channels that are not there.
    pub fn missing_channels(&self) -> impl Iterator<Item = ChannelId> + '_ {
        let ids = self.expected.0.iter().flat_map(Set::ids);
        ids.zip(&self.channels)
            .filter(|(_, there)| !**there)
            .map(|(id, _)| id)
    }

    /// Whether nothing is missing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.main && self.missing_channels().next().is_none()
    }
}

/// Why a connection was closed and not made part of the migration.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It begins like nothing we know.
    #[error("the connection begins with {got:#010x}, neither a main stream nor a multifd channel")]
    Magic {
        /// Its first word.
        got: u32,
    },
    /// It introduces itself as a multifd channel, and multifd is off here.
    #[error("a multifd channel, but multifd is off on this side")]
    MultifdOff,
    /// There is a main channel already.
    #[error("a second main channel")]
    SecondMain,
    /// Its channel is there already.
    #[error("{channel} is there already")]
    ChannelTwice {
        /// The channel.
        channel: ChannelId,
    },
    /// Its handshake is not for us.
    #[error("the multifd handshake is not for this migration")]
    Hello(#[from] PacketError),
    /// It ended before it had said what it is.
    #[error("the connection ended after {got} bytes, before it had said what it is")]
    Ended {
        /// Bytes that came.
        got: usize,
    },
    /// It said what it is, and was closed by the peer before the others were there.
    #[error("the peer closed the {} before the others were there", .role.name())]
    Left {
        /// What it was.
        role: Role,
    },
    /// It did not say what it is in time.
    #[error("the connection did not say within {limit:?} what it is")]
    Silent {
        /// How long it had.
        limit: Duration,
    },
    /// Too many connections that say nothing, of which this was one: see
    /// [`Collection`](super::Collection).
    #[error("more than {limit} connections that have not said what they are")]
    Crowded {
        /// How many there may be.
        limit: usize,
    },
    /// The host has no descriptor or no memory for another connection. It is accepted when there is
    /// one, and this is not said again before.
    #[error("a connection waits, which the host cannot accept")]
    Exhausted(#[source] Arc<io::Error>),
    /// It could not be read.
    #[error("reading what the connection is")]
    Io(#[source] Arc<io::Error>),
}

#[cfg(test)]
#[cfg(feature = "multifd")]
mod tests {
    use multifd::packet::Hello;
    use multifd::{ChannelCount, MultifdConfig};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn config(channels: u8) -> MultifdConfig {
        MultifdConfig::new(ChannelCount::new(channels).unwrap()).uuid([7; 16])
    }

    /// Feeds `bytes`, `step` at a time, and returns the verdict and how many were taken.
    fn feed(
        classifier: &mut Classifier,
        bytes: &[u8],
        step: usize,
    ) -> (Result<Option<Role>, Refusal>, usize) {
        let mut greeting = Greeting::new();
        let mut at = 0;
        loop {
            let wanted = greeting.wanted();
            let n = wanted.len().min(step).min(bytes.len() - at);
            wanted[..n].copy_from_slice(&bytes[at..at + n]);
            at += n;
            match classifier.advance(&mut greeting, n) {
                Ok(None) if at < bytes.len() => {}
                other => return (other, at),
            }
        }
    }

    fn hello(id: u8) -> Vec<u8> {
        Hello {
            uuid: [7; 16],
            channel: ChannelId::new(id),
        }
        .encode()
        .to_vec()
    }

    #[test]
    fn channels_may_come_in_any_order_and_before_the_main_stream() {
        let mut classifier = Classifier::new(Some(&config(2)));
        for (bytes, role, taken) in [
            (hello(1), Role::Channel(ChannelId::new(1)), 64),
            (hello(0), Role::Channel(ChannelId::new(0)), 64),
            (b"QEVM\0\0\0\x03".to_vec(), Role::Main, 4),
        ] {
            assert!(!classifier.is_complete());
            let (verdict, at) = feed(&mut classifier, &bytes, 3);
            assert_eq!((verdict.unwrap(), at), (Some(role), taken));
        }
        assert!(classifier.is_complete());
    }

    #[test]
    fn c2_a_multifd_hello_while_multifd_is_off_is_refused_by_its_magic() {
        let mut classifier = Classifier::new(Channels::none());
        let (verdict, at) = feed(&mut classifier, &hello(0), 64);
        assert!(matches!(verdict, Err(Refusal::MultifdOff)));
        assert_eq!(at, 4);
        assert!(feed(&mut classifier, b"QEVM", 4).0.is_ok());
        assert!(classifier.is_complete());
    }

    #[test]
    fn what_is_not_part_of_the_migration_is_refused_by_its_reason() {
        let mut classifier = Classifier::new(Some(&config(2)));
        feed(&mut classifier, b"QEVM", 4).0.unwrap();
        feed(&mut classifier, &hello(0), 64).0.unwrap();
        let mut refusal = |bytes: &[u8]| feed(&mut classifier, bytes, 64).0.unwrap_err();
        assert!(matches!(refusal(b"QEVM"), Refusal::SecondMain));
        assert!(matches!(refusal(&hello(0)), Refusal::ChannelTwice { .. }));
        assert!(matches!(
            refusal(&hello(2)),
            Refusal::Hello(PacketError::Channel { .. })
        ));
        assert!(matches!(
            refusal(b"GET / HTTP"),
            Refusal::Magic { got: 0x4745_5420 }
        ));
        assert!(matches!(refusal(b""), Refusal::Ended { got: 0 }));
        let mut other_vm = hello(1);
        other_vm[8] = 0;
        assert!(matches!(
            refusal(&other_vm),
            Refusal::Hello(PacketError::Uuid { .. })
        ));
        // Nothing of it took a place.
        assert_eq!(
            classifier.missing_channels().collect::<Vec<_>>(),
            [ChannelId::new(1)]
        );
    }

    #[test]
    fn a_connection_that_left_makes_room_for_another() {
        let mut classifier = Classifier::new(Some(&config(1)));
        let role = feed(&mut classifier, &hello(0), 64).0.unwrap().unwrap();
        classifier.release(role);
        assert!(feed(&mut classifier, &hello(0), 64).0.is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_take_more_than_a_hello(
            bytes in vec(any::<u8>(), 1..100),
            known in 0..3usize,
            step in 1..70usize,
        ) {
            let mut bytes = bytes;
            let start = [&b""[..], b"QEVM", b"\x11\x22\x33\x44"][known];
            bytes.splice(0..0, start.iter().copied());
            let mut classifier = Classifier::new(Some(&config(3)));
            let (_, at) = feed(&mut classifier, &bytes, step);
            prop_assert!(at <= HELLO_LEN);
        }
    }
}
