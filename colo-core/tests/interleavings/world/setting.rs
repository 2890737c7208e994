//! What is explored, and how much may go wrong in it.

use colo_core::{OnPeerLoss, Resume};

/// Whether pages are sent between checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ahead {
    /// No.
    Never,
    /// When `Action::is_background` says so, each half on a channel of its own.
    InGap,
    /// The same, on whichever channel is free.
    InGapUnordered,
    /// Whenever the guest runs.
    Always,
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// What the primary does without its peer.
    pub primary: OnPeerLoss,
    /// What the secondary does.
    pub secondary: OnPeerLoss,
    /// When the primary's VM runs again.
    pub resume: Resume,
    /// The primary's gate tells output before a checkpoint from output after it.
    pub marks: bool,
    /// Whether pages are sent between checkpoints.
    pub ahead: Ahead,
}

/// How often the environment may still interfere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Checkpoints that become due.
    pub checkpoints: u8,
    /// Processes that are killed or told to quit.
    pub deaths: u8,
    /// Steps that fail on their own side.
    pub failures: u8,
    /// Deadlines that pass although the peer is there.
    pub deadlines: u8,
    /// Links that break.
    pub cuts: u8,
    /// Requests of an operator, who kills the other side first.
    pub requests: u8,
    /// Halves of RAM that are sent between checkpoints.
    pub ahead: u8,
    /// Halves that the guest writes again after that.
    pub writes: u8,
    /// All of these together, checkpoints, requests and what the guest does apart.
    pub mishaps: u8,
}

impl Budget {
    pub(super) fn may(&self, kind: fn(&Self) -> u8) -> bool {
        kind(self) > 0 && self.mishaps > 0
    }

    pub(super) fn spend(&mut self, kind: fn(&mut Self) -> &mut u8) {
        *kind(self) -= 1;
        self.mishaps -= 1;
    }
}
