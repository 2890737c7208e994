//! Which channel a place in memory belongs to, and the packets that are being filled for each.
//!
//! A page that is sent twice must not be overtaken by its older copy. On one channel it is not: so
//! every stretch of a block has a channel for good. Stretches that follow each other go round all
//! channels, since what a guest writes lies together; where a round begins is scattered, so that
//! a guest that writes at some regular distance does not keep one channel busy alone.

use migration_stream::PAGE_SIZE;
use migration_stream::ram::BlockId;

use super::queue::Batch;
use crate::packet::PAGES_PER_PACKET;

/// Bytes of a block that go on one channel: few enough that some hundred pages keep all channels
/// busy, and enough that a packet is made of few pieces.
const STRETCH: u64 = 16 * PAGE_SIZE;

/// The packets that are being filled, one for each channel.
#[derive(Debug)]
pub(super) struct Places {
    batches: Vec<Option<Batch>>,
}

impl Places {
    pub(super) fn new(channels: usize) -> Self {
        Self {
            batches: (0..channels.max(1)).map(|_| None).collect(),
        }
    }

    /// Takes pages of `block` from `offset` on, at most up to `end`, that belong to one channel.
    /// Returns where it stopped, and the channel with what it is to write now: the packet that was
    /// begun for another block, and the one that is full.
    pub(super) fn extend(
        &mut self,
        block: BlockId,
        offset: u64,
        end: u64,
        empty: impl FnOnce() -> Batch,
    ) -> (u64, usize, [Option<Batch>; 2]) {
        let channel = channel_of(block, offset, self.batches.len());
        let end = end.min((offset / STRETCH + 1).saturating_mul(STRETCH));
        let mut full = [None, None];
        let mut stopped = end;
        if let Some(slot) = self.batches.get_mut(channel) {
            if slot.as_ref().is_some_and(|batch| batch.block() != block) {
                full[0] = slot.take();
            }
            let batch = slot.get_or_insert_with(empty);
            stopped = batch.extend(offset, end);
            if batch.offsets().len() == PAGES_PER_PACKET {
                full[1] = slot.take();
            }
        }
        (stopped, channel, full)
    }

    /// All packets that were begun.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = (usize, Batch)> {
        let slots = self.batches.iter_mut().enumerate();
        slots.filter_map(|(channel, slot)| Some((channel, slot.take()?)))
    }
}

/// The channel of the stretch that `offset` lies in.
fn channel_of(block: BlockId, offset: u64, channels: usize) -> usize {
    let channels = channels.max(1) as u64;
    let stretch = offset / STRETCH;
    let round = stretch / channels;
    // Fibonacci hashing.
    let scattered = (round ^ ((block.index() as u64) << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let channel = ((stretch % channels) + (scattered >> 32)) % channels;
    usize::try_from(channel).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockId = BlockId::new(0);

    /// How many of `stretches` go on each channel.
    fn load(stretches: impl Iterator<Item = u64>, channels: usize) -> Vec<usize> {
        let mut load = vec![0; channels];
        for stretch in stretches {
            load[channel_of(BLOCK, stretch * STRETCH, channels)] += 1;
        }
        load
    }

    #[test]
    fn a_page_has_one_channel() {
        for channels in [1, 2, 3, 7] {
            for page in 0..1000 {
                let first = channel_of(BLOCK, page / 16 * STRETCH, channels);
                assert_eq!(channel_of(BLOCK, page * PAGE_SIZE, channels), first);
                assert!(first < channels);
            }
        }
    }

    #[test]
    fn what_lies_together_keeps_all_channels_equally_busy() {
        for channels in [2, 3, 8] {
            let load = load(0..channels as u64 * 50, channels);
            assert!(load.iter().all(|n| *n == 50), "{load:?}");
        }
    }

    #[test]
    fn what_lies_at_a_regular_distance_keeps_no_channel_idle() {
        for channels in [2, 4, 8] {
            for distance in [channels as u64, 16, 32, 512] {
                let load = load((0..4000).map(|i| i * distance), channels);
                let fair = 4000 / channels;
                let range = fair * 3 / 4..fair * 5 / 4;
                assert!(
                    load.iter().all(|n| range.contains(n)),
                    "every {distance}: {load:?}"
                );
            }
        }
    }
}
