//! Whether all of a checkpoint's RAM has arrived.
//!
//! ```text
//! PART or END of RAM, pages, [MULTIFD_FLUSH] ..., end of the body, EOF
//! ```
//!
//! A checkpoint is complete at its EOF if the last section of RAM was an END, and if, with
//! channels, that section had a MULTIFD_FLUSH: QEMU sends one there whether pages crossed or not.
//! The channels are then looked at themselves: none may have taken in a page after its last SYNC
//! packet.

use std::fmt;

use super::pages::Received;
use crate::raw::decoder::{Item, RamItem};
use crate::raw::section::Continuation;
use crate::raw::transport::HeldChannels;

/// What EOF came too early for.
const END: &str = "the end section of ram, with which a checkpoint's memory is complete";
const FLUSH: &str = "a multifd flush in the end section of ram, behind the pages of the channels";

/// All of a checkpoint's RAM is in the store. Only [`CheckpointReceiver::receive_ram`] makes this:
/// a commit that takes it by value cannot be called for less, or twice.
///
/// The channels take in no page as long as it lives, or what [`CheckpointComplete::into_held`]
/// makes of it. Dropping it drops the checkpoint.
///
/// ```compile_fail,E0451
/// use migration_stream::raw::transport::HeldChannels;
/// use migration_stream::precopy::Received;
/// use migration_stream::raw::checkpoint::CheckpointComplete;
///
/// let claimed = CheckpointComplete {
///     received: Received::default(),
///     held: HeldChannels::none(),
/// };
/// ```
///
/// [`CheckpointReceiver::receive_ram`]: super::CheckpointReceiver::receive_ram
#[must_use = "the checkpoint is dropped with this"]
pub struct CheckpointComplete {
    received: Received,
    held: HeldChannels,
}

impl CheckpointComplete {
    pub(super) const fn new(received: Received, held: HeldChannels) -> Self {
        Self { received, held }
    }

    /// Returns what came on the main stream.
    #[must_use]
    pub const fn received(&self) -> Received {
        self.received
    }

    /// Returns the channels, which are held until that is dropped. The checkpoint is used up.
    pub fn into_held(self) -> HeldChannels {
        self.held
    }
}

impl fmt::Debug for CheckpointComplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointComplete")
            .field("received", &self.received)
            .field("held", &self.held)
            .finish()
    }
}

/// How much of a checkpoint's RAM has been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// Pages come on channels.
    channels: bool,
    /// The last section of RAM was, or is, an END.
    end: bool,
    /// Its body is over.
    body_over: bool,
    /// A flush came in it.
    flushed: bool,
}

impl Progress {
    /// Nothing was seen yet.
    pub(super) const fn new(channels: bool) -> Self {
        Self {
            channels,
            end: false,
            body_over: false,
            flushed: false,
        }
    }

    /// Takes note of an item before its EOF.
    pub(super) fn note(&mut self, item: &Item) {
        match item {
            Item::Continuation { kind, .. } => {
                *self = Self {
                    end: *kind == Continuation::End,
                    ..Self::new(self.channels)
                };
            }
            Item::Ram(RamItem::MultifdFlush) => self.flushed = true,
            Item::Ram(RamItem::EndOfSection) => self.body_over = true,
            _ => {}
        }
    }

    /// What is missing at EOF, `None` if nothing is.
    pub(super) const fn missing(&self) -> Option<&'static str> {
        if !(self.end && self.body_over) {
            Some(END)
        } else if self.channels && !self.flushed {
            Some(FLUSH)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SectionId;

    const PART: Item = continuation(Continuation::Part);
    const END_SECTION: Item = continuation(Continuation::End);
    const FLUSHED: Item = Item::Ram(RamItem::MultifdFlush);
    const OVER: Item = Item::Ram(RamItem::EndOfSection);

    const fn continuation(kind: Continuation) -> Item {
        Item::Continuation {
            kind,
            id: SectionId(1),
        }
    }

    fn missing(channels: bool, items: &[Item]) -> Option<&'static str> {
        let mut progress = Progress::new(channels);
        for item in items {
            progress.note(item);
        }
        progress.missing()
    }

    #[test]
    fn only_an_end_section_completes_a_checkpoint() {
        for channels in [false, true] {
            assert_eq!(missing(channels, &[]), Some(END));
            assert_eq!(missing(channels, &[PART, FLUSHED, OVER]), Some(END));
            let twice = [END_SECTION, FLUSHED, OVER, PART, OVER];
            assert_eq!(missing(channels, &twice), Some(END));
            let both = [PART, OVER, END_SECTION, FLUSHED, OVER];
            assert_eq!(missing(channels, &both), None);
        }
        assert_eq!(missing(false, &[END_SECTION, OVER]), None);
    }

    #[test]
    fn with_channels_the_end_section_has_a_flush() {
        assert_eq!(missing(true, &[END_SECTION, OVER]), Some(FLUSH));
        let before = [PART, FLUSHED, OVER, END_SECTION, OVER];
        assert_eq!(missing(true, &before), Some(FLUSH));
        assert_eq!(missing(true, &[END_SECTION, FLUSHED, OVER]), None);
    }
}
