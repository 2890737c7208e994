//! Where the channels and the main stream of an incoming migration meet.

use std::ops::AddAssign;
use std::sync::Arc;
use std::time::Instant;

use migration_stream::io::CancelToken;

use crate::crew::Crew;
use crate::error::{ChannelError, Failure};
use crate::patience::Patience;

/// What a channel is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It waits for a packet.
    Idle,
    /// It takes a packet in.
    Busy,
    /// It has reached its SYNC packet and waits for the flush.
    AtSync,
    /// The peer ended it, between packets.
    Ended,
    /// It broke; the failure follows, if it is the first.
    Broken,
}

/// What the channels of a set have received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecvCounters {
    /// Pages that came with data.
    pub normal_pages: u64,
    /// Pages that came as zero.
    pub zero_pages: u64,
    /// Bytes of whole packets, headers included.
    pub bytes: u64,
}

impl RecvCounters {
    /// All pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.normal_pages.saturating_add(self.zero_pages)
    }
}

impl AddAssign for RecvCounters {
    fn add_assign(&mut self, other: Self) {
        self.normal_pages = self.normal_pages.saturating_add(other.normal_pages);
        self.zero_pages = self.zero_pages.saturating_add(other.zero_pages);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

#[derive(Debug)]
pub(super) struct Rendezvous {
    phases: Vec<Phase>,
    /// Channels on which pages came after the last SYNC packet.
    unsynced: Vec<bool>,
    counters: RecvCounters,
    /// Nobody may begin a packet: the store is being changed.
    closed: bool,
    /// The main stream waits at a flush, and it is the flush that decides how long.
    flushing: bool,
}

impl Rendezvous {
    pub(super) fn new(channels: u8) -> Self {
        Self {
            phases: vec![Phase::Idle; channels.into()],
            unsynced: vec![false; channels.into()],
            counters: RecvCounters::default(),
            closed: false,
            flushing: false,
        }
    }

    fn count(&self, phase: Phase) -> usize {
        self.phases.iter().filter(|p| **p == phase).count()
    }

    fn set(&mut self, channel: u8, phase: Phase) {
        if let Some(p) = self.phases.get_mut(usize::from(channel)) {
            *p = phase;
        }
    }

    pub(super) const fn counters(&self) -> RecvCounters {
        self.counters
    }

    fn note_pages(&mut self, channel: u8, after_sync: bool) {
        if let Some(unsynced) = self.unsynced.get_mut(usize::from(channel)) {
            *unsynced = after_sync;
        }
    }

    fn first_unsynced(&self) -> Option<u8> {
        self.unsynced
            .iter()
            .position(|unsynced| *unsynced)
            .and_then(|i| u8::try_from(i).ok())
    }

    fn first_not_at_sync(&self) -> Option<u8> {
        self.phases
            .iter()
            .position(|p| *p != Phase::AtSync)
            .and_then(|i| u8::try_from(i).ok())
    }

    fn first_ended(&self) -> Option<u8> {
        self.phases
            .iter()
            .position(|p| *p == Phase::Ended)
            .and_then(|i| u8::try_from(i).ok())
    }
}

/// The channels' side.
impl Crew<Rendezvous> {
    /// A packet is about to be taken in. Waits while the store is being changed.
    pub(super) fn begin_packet(&self, channel: u8) -> Result<(), ChannelError> {
        let mut state = self.lock();
        while state.closed {
            state.check().map_err(|f| f.error)?;
            state = self
                .for_channels
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.set(channel, Phase::Busy);
        Ok(())
    }

    /// All of the packet has landed, and it had pages or not.
    pub(super) fn end_packet(&self, channel: u8, had_pages: bool, taken: RecvCounters) {
        let mut state = self.lock();
        state.set(channel, Phase::Idle);
        state.counters += taken;
        if had_pages {
            state.note_pages(channel, true);
        }
        state.progress += 1;
        if state.closed {
            self.for_owner.notify_all();
        }
    }

    /// The channel has reached its SYNC packet: waits for the flush to it.
    pub(super) fn wait_at_sync(
        &self,
        channel: u8,
        taken: RecvCounters,
    ) -> Result<(), ChannelError> {
        let mut state = self.lock();
        state.set(channel, Phase::AtSync);
        state.counters += taken;
        state.note_pages(channel, false);
        state.progress += 1;
        self.for_owner.notify_all();
        let mut patience = Patience::new(None, self.limit, state.progress);
        while state.phases.get(usize::from(channel)) == Some(&Phase::AtSync) {
            state.check().map_err(|f| f.error)?;
            let in_time;
            (state, in_time) = patience.wait(&self.for_channels, state, |s| s.progress);
            if !in_time && state.flushing {
                patience = Patience::new(None, self.limit, state.progress);
            } else if !in_time {
                return Err(ChannelError::NoFlush { limit: self.limit });
            }
        }
        Ok(())
    }

    /// The first error of a channel. A peer that closes the main stream closes its channels too, so
    /// that each of them soon has ended or failed: waits a moment for that.
    pub(super) fn first_error(&self) -> Option<Failure> {
        self.first_failure(|rendezvous| {
            let left = rendezvous.count(Phase::Ended);
            left < rendezvous.phases.len()
        })
    }

    /// The channel's thread ends: because the peer ended the channel between packets, or not.
    pub(super) fn leave(&self, channel: u8, clean: bool) {
        self.lock()
            .set(channel, if clean { Phase::Ended } else { Phase::Broken });
        self.for_owner.notify_all();
    }
}

/// The main stream's side.
impl Crew<Rendezvous> {
    /// Waits until every channel is at its SYNC packet, and lets them all go on. An error is one
    /// for good: the channels are shut.
    pub(super) fn flush(
        &self,
        deadline: Option<Instant>,
        cancel: Option<&CancelToken>,
    ) -> Result<(), Failure> {
        let mut state = self.lock();
        let mut patience = self.patience(deadline, &state).until_cancelled(cancel);
        state.flushing = true;
        while let Some(late) = state.first_not_at_sync() {
            state.check()?;
            if let Some(ended) = state.first_ended() {
                drop(state);
                return Err(self.give_up(Some(ended), ChannelError::Ended));
            }
            let in_time;
            (state, in_time) = patience.wait(&self.for_owner, state, |s| s.progress);
            if !in_time {
                drop(state);
                if cancel.is_some_and(CancelToken::is_cancelled) {
                    return Err(self.give_up(None, ChannelError::Closed));
                }
                let what = "the channel's sync packet";
                return Err(self.give_up(Some(late), ChannelError::Stalled { what }));
            }
        }
        state.check()?;
        state.flushing = false;
        state.phases.fill(Phase::Idle);
        state.progress += 1;
        drop(state);
        self.for_channels.notify_all();
        Ok(())
    }

    /// Runs `f` while no channel is inside a packet.
    pub(super) fn between_packets<R>(
        &self,
        deadline: Option<Instant>,
        f: impl FnOnce() -> R,
    ) -> Result<R, Failure> {
        self.close_between_packets(deadline, None)?;
        let _reopen = Reopen(self);
        Ok(f())
    }

    /// From the return on no channel is inside a packet, or begins one, until [`Crew::reopen`].
    fn close_between_packets(
        &self,
        deadline: Option<Instant>,
        cancel: Option<&CancelToken>,
    ) -> Result<(), Failure> {
        let stalled = Failure {
            channel: None,
            error: ChannelError::Stalled {
                what: "the channels to end their packets",
            },
        };
        let mut state = self.lock();
        let mut patience = self.patience(deadline, &state).until_cancelled(cancel);
        // Another caller's turn ends first.
        while state.closed {
            let in_time;
            (state, in_time) = patience.wait(&self.for_owner, state, |s| s.progress);
            if !in_time {
                return Err(stalled);
            }
        }
        state.closed = true;
        while state.count(Phase::Busy) > 0 {
            let in_time;
            (state, in_time) = patience.wait(&self.for_owner, state, |s| s.progress);
            if !in_time {
                drop(state);
                self.reopen();
                return Err(stalled);
            }
        }
        Ok(())
    }

    /// Channels may begin packets again.
    fn reopen(&self) {
        self.lock().closed = false;
        self.for_channels.notify_all();
        self.for_owner.notify_all();
    }
}

/// Keeps the channels between two packets until the result is dropped. A channel that has taken
/// in pages after its last SYNC packet is an error.
pub(super) fn hold(
    crew: &Arc<Crew<Rendezvous>>,
    deadline: Option<Instant>,
    cancel: Option<&CancelToken>,
) -> Result<Held, Failure> {
    crew.close_between_packets(deadline, cancel)?;
    let held = Held(Arc::clone(crew));
    let state = crew.lock();
    state.check()?;
    match state.first_unsynced() {
        None => {
            drop(state);
            Ok(held)
        }
        Some(channel) => {
            drop(state);
            Err(Failure {
                channel: Some(channel),
                error: ChannelError::NotSynchronised,
            })
        }
    }
}

/// Lets the channels of a set go on when it is dropped.
pub(super) struct Held(Arc<Crew<Rendezvous>>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.reopen();
    }
}

/// Lets the channels begin packets again, also when what ran meanwhile panicked.
struct Reopen<'a>(&'a Crew<Rendezvous>);

impl Drop for Reopen<'_> {
    fn drop(&mut self) {
        self.0.reopen();
    }
}
