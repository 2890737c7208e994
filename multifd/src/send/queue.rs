//! What the channels have to do: packets of pages that any of them may take, packets that only one
//! of them may, and what each of them owes at a point behind these.

use std::collections::VecDeque;
use std::time::Instant;

use migration_stream::PAGE_SIZE;
use migration_stream::ram::BlockId;

use crate::channel_id::ChannelCount;
use crate::crew::Crew;
use crate::device_state::DeviceStateHeader;
use crate::packet::PAGES_PER_PACKET;

/// Packets of pages queued per channel, some 1 KiB each: their pages stay where they are. Whoever fills
/// the queue is woken when half of it is free; woken for each packet, it took the processor from the
/// channels each time.
const DEPTH: usize = 16;
/// Packets of pages queued in all while a limit on bandwidth holds.
const LIMITED: usize = 2;
/// Packets of device state queued per channel: one more than it writes. Their payloads are here.
const STATES: usize = 2;

/// The pages of one packet.
#[derive(Debug)]
pub(super) struct Batch {
    block: BlockId,
    offsets: Vec<u64>,
}

impl Batch {
    pub(super) fn block(&self) -> BlockId {
        self.block
    }

    /// Offsets in the block, bytes; at most [`PAGES_PER_PACKET`].
    pub(super) fn offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Takes the pages from `offset` on, up to `end` or until it is full; returns where it stopped.
    pub(super) fn extend(&mut self, mut offset: u64, end: u64) -> u64 {
        while offset < end && self.offsets.len() < PAGES_PER_PACKET {
            self.offsets.push(offset);
            offset += PAGE_SIZE;
        }
        offset
    }
}

/// One packet of a device's state.
#[derive(Debug)]
pub(super) struct DeviceState {
    pub(super) header: DeviceStateHeader,
    pub(super) payload: Vec<u8>,
}

/// What one packet is made of.
#[derive(Debug)]
pub(super) enum Work {
    Pages(Batch),
    DeviceState(DeviceState),
}

#[derive(Debug)]
pub(super) struct Queue {
    channels: usize,
    work: VecDeque<Work>,
    /// What only one channel may take, by channel.
    own: Vec<VecDeque<Work>>,
    /// Packets that were queued and are not written yet.
    unwritten: usize,
    /// Batches to be used again.
    spare: Vec<Batch>,
    /// How many points there were. A channel owes what is due at them up to this number.
    points: u64,
    /// What is due at the last one.
    due: Due,
    /// Channels that have done all they owe.
    settled: usize,
    /// The channels end when the queue is empty.
    finishing: bool,
    /// Until when a channel may write.
    pub(super) deadline: Option<Instant>,
    /// What the owner of the set waits for.
    awaited: Option<Awaited>,
    /// Packets wait for a limit on bandwidth.
    pub(super) limited: bool,
}

/// What the owner of the set may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// Room for packets of this channel's own, or of any.
    Room(Option<usize>),
    /// That all is written.
    Drained,
    /// That every channel has done what it owes.
    Settled,
}

/// What every channel owes at a point behind all that was queued before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// A SYNC packet, and that nobody reads for what was sent before it any more.
    Sync,
    /// The latter alone.
    LetGo,
}

impl Queue {
    pub(super) fn new(channels: ChannelCount) -> Self {
        let channels = usize::from(channels.get());
        Self {
            channels,
            work: VecDeque::with_capacity(channels * DEPTH),
            own: (0..channels)
                .map(|_| VecDeque::with_capacity(DEPTH))
                .collect(),
            unwritten: 0,
            spare: Vec::new(),
            points: 0,
            due: Due::Sync,
            settled: channels,
            finishing: false,
            deadline: None,
            awaited: None,
            limited: false,
        }
    }

    /// Whether there is room for this, of a channel's own or of any.
    pub(super) fn has_room(&self, channel: Option<usize>, work: &Work) -> bool {
        let (queued, most) = self.filling(channel);
        match work {
            Work::Pages(_) => queued < most,
            Work::DeviceState(_) => {
                let is_state = |work: &&Work| matches!(work, Work::DeviceState(_));
                let states = self.work.iter().filter(is_state).count();
                queued < most && states < self.channels * STATES
            }
        }
    }

    /// How many packets are queued, of this channel's own or of any, and how many may be.
    fn filling(&self, channel: Option<usize>) -> (usize, usize) {
        match channel {
            // Under a limit the channels have packets in hand, and more would only wait longer.
            None if self.limited => (self.work.len(), LIMITED),
            None => (self.work.len(), self.channels * DEPTH),
            Some(channel) => (self.own.get(channel).map_or(DEPTH, VecDeque::len), DEPTH),
        }
    }

    /// The owner waits for this from now on.
    pub(super) const fn wait_for(&mut self, awaited: Awaited) {
        self.awaited = Some(awaited);
    }

    /// Whether the owner is to be woken, once for each wait.
    fn wakes_owner(&mut self) -> bool {
        let is_there = self.awaited.is_some_and(|awaited| match awaited {
            Awaited::Room(channel) => {
                let (queued, most) = self.filling(channel);
                queued <= most / 2
            }
            Awaited::Drained => self.is_drained(),
            Awaited::Settled => self.is_settled(),
        });
        if is_there {
            self.awaited = None;
        }
        is_there
    }

    pub(super) fn push(&mut self, channel: Option<usize>, work: Work) {
        let queue = match channel {
            None => &mut self.work,
            Some(channel) => match self.own.get_mut(channel) {
                Some(own) => own,
                None => return,
            },
        };
        queue.push_back(work);
        self.unwritten += 1;
    }

    /// Whether nothing that was queued is still to be written.
    pub(super) const fn is_drained(&self) -> bool {
        self.unwritten == 0
    }

    fn pop(&mut self, channel: usize) -> Option<Work> {
        let own = self.own.get_mut(channel).and_then(VecDeque::pop_front);
        own.or_else(|| self.work.pop_front())
    }

    /// An empty batch for pages of `block`.
    pub(super) fn empty_batch(&mut self, block: BlockId) -> Batch {
        let mut batch = self.spare.pop().unwrap_or_else(|| Batch {
            block,
            offsets: Vec::with_capacity(PAGES_PER_PACKET),
        });
        batch.block = block;
        batch.offsets.clear();
        batch
    }

    pub(super) fn begin_point(&mut self, due: Due) {
        self.points += 1;
        self.due = due;
        self.settled = 0;
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled == self.channels
    }

    pub(super) fn finish(&mut self) {
        self.finishing = true;
    }
}

/// What a channel does next.
#[derive(Debug)]
pub(super) enum Job {
    /// It writes these pages.
    Pages(Batch),
    /// It writes this state of a device.
    DeviceState(DeviceState),
    /// It does what is due.
    Due(Due),
    /// It ends.
    End,
}

impl Crew<Queue> {
    /// Waits for work for `channel`, which has done what was due at `points` points. Pages go first: a
    /// point is behind everything that was queued before it. An idle channel waits without end; the
    /// owner of the set is what wakes it.
    pub(super) fn next_job(&self, channel: usize, points: u64) -> (Job, Option<Instant>) {
        let mut state = self.lock();
        loop {
            let deadline = state.deadline;
            if state.is_over() {
                return (Job::End, deadline);
            }
            match state.pop(channel) {
                Some(Work::Pages(batch)) => return (Job::Pages(batch), deadline),
                Some(Work::DeviceState(state)) => return (Job::DeviceState(state), deadline),
                None => {}
            }
            if points < state.points {
                return (Job::Due(state.due), deadline);
            }
            if state.finishing {
                return (Job::End, deadline);
            }
            state = self
                .for_channels
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// A channel has written the pages of a packet.
    pub(super) fn wrote_pages(&self, batch: Batch) {
        self.done(|state| {
            state.spare.push(batch);
            state.unwritten = state.unwritten.saturating_sub(1);
        });
    }

    /// A channel has written the state of a device.
    pub(super) fn wrote_device_state(&self) {
        self.done(|state| state.unwritten = state.unwritten.saturating_sub(1));
    }

    /// A channel has done what was due.
    pub(super) fn settled(&self) {
        self.done(|state| state.settled += 1);
    }

    fn done(&self, note: impl FnOnce(&mut Queue)) {
        let mut state = self.lock();
        note(&mut state);
        state.progress += 1;
        let wakes = state.wakes_owner();
        drop(state);
        if wakes {
            self.for_owner.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use migration_stream::{IdStr, InstanceId};

    use super::*;
    use crate::device_state::DeviceId;

    const RAM: BlockId = BlockId::new(0);

    fn pages(queue: &mut Queue) -> Work {
        Work::Pages(queue.empty_batch(RAM))
    }

    fn state() -> Work {
        let device = DeviceId {
            idstr: IdStr::new("vfio").unwrap(),
            instance: InstanceId(0),
        };
        let payload = vec![0];
        Work::DeviceState(DeviceState {
            header: DeviceStateHeader {
                device,
                payload_len: 1,
            },
            payload,
        })
    }

    #[test]
    fn whoever_waits_for_room_is_woken_once_half_of_it_is_free() {
        let mut queue = Queue::new(ChannelCount::new(2).unwrap());
        for channel in [None, Some(1)] {
            let (_, most) = queue.filling(channel);
            for _ in 0..most {
                let work = pages(&mut queue);
                assert!(queue.has_room(channel, &work));
                queue.push(channel, work);
            }
            let work = pages(&mut queue);
            assert!(!queue.has_room(channel, &work));
            queue.wait_for(Awaited::Room(channel));
            let mut woken_at = Vec::new();
            while queue.pop(1).is_some() {
                if queue.wakes_owner() {
                    woken_at.push(queue.filling(channel).0);
                }
            }
            assert_eq!(woken_at, [most / 2]);
        }
    }

    #[test]
    fn payloads_of_devices_are_few() {
        let mut queue = Queue::new(ChannelCount::new(2).unwrap());
        for _ in 0..2 * STATES {
            assert!(queue.has_room(None, &state()));
            queue.push(None, state());
        }
        assert!(!queue.has_room(None, &state()));
        let work = pages(&mut queue);
        assert!(queue.has_room(None, &work));
        queue.wait_for(Awaited::Room(None));
        queue.pop(0);
        assert!(queue.wakes_owner());
        assert!(queue.has_room(None, &state()));
    }
}
