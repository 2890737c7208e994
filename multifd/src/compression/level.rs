//! Which level to compress at, from how long compressing and writing take: no clock, no thread, no
//! codec.
//!
//! A channel's thread compresses a packet and then writes it. Where the write has to wait, the network
//! is what holds pages up, and a higher level would have made less of them; where it does not, the
//! processor is. The level goes up and down, one at a time, until compressing takes about as long as
//! sending. All channels of a set have one level: they share the network, and mostly the processors.

use std::time::Duration;

use crate::channel_id::ChannelCount;
use crate::config::ZstdRange;

/// How long all channels are looked at before the level changes, for each of them.
const WINDOW: Duration = Duration::from_millis(50);
/// And how many bytes of pages have to be compressed in that time, for each channel: one packet says
/// more of its pages than of the network.
const WINDOW_BYTES: u64 = 1 << 20;
/// More than a channel's connection holds without the network's having carried it, bytes (Linux lets a
/// TCP socket grow to 4 MiB when sending and 6 when receiving).
const BUFFERED: u64 = 8 << 20;
/// Windows for which a level that was one too many is not tried again, the first time.
const FIRST_HOLD: u32 = 4;
/// The same when it was too many again and again.
const LONGEST_HOLD: u32 = 64;

/// What happened to one packet of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketTimes {
    /// Bytes of pages that were compressed.
    pub bytes_in: u64,
    /// What became of them, bytes.
    pub bytes_out: u64,
    /// How long that took.
    pub compressing: Duration,
    /// How long the packet's write took, the wait for the network included.
    pub writing: Duration,
    /// What the channel did before, since its last packet with data was written: waiting for pages,
    /// looking for zero pages. None of it if the channels were synchronised in between, after which
    /// it is not known whether there was anything to do.
    pub other: Duration,
}

/// Chooses the level for a set of channels.
///
/// With the same pages, network and processors all the time it comes to rest, or stays at one level
/// and tries the next one, more and more rarely.
#[derive(Clone, Debug)]
pub struct LevelControl {
    range: ZstdRange,
    channels: u64,
    level: i8,
    window: Window,
    /// Bytes a second that a channel's connection was seen to carry when it was full, or is taken to
    /// carry because more than it can hold was written faster.
    carried: u64,
    /// Bytes that were written since then, of all channels, more than it carries: they can be in buffers.
    beyond: u64,
    /// The level was raised in the window before this one.
    is_trial: bool,
    /// Windows before it may be raised again.
    hold: u32,
    /// How long the next hold is.
    next_hold: u32,
}

/// What is between two decisions, of all channels together.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    bytes_in: u64,
    bytes_out: u64,
    compressing: Duration,
    writing: Duration,
    other: Duration,
}

/// What holds the pages up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bound {
    Network,
    Processor,
    /// Both as much, or something else: what gives pages to the channels, a limit on bandwidth.
    Neither,
}

impl Window {
    fn add(&mut self, packet: &PacketTimes) {
        self.bytes_in = self.bytes_in.saturating_add(packet.bytes_in);
        self.bytes_out = self.bytes_out.saturating_add(packet.bytes_out);
        self.compressing = self.compressing.saturating_add(packet.compressing);
        self.writing = self.writing.saturating_add(packet.writing);
        self.other = self.other.saturating_add(packet.other);
    }

    fn total(&self) -> Duration {
        self.compressing
            .saturating_add(self.writing)
            .saturating_add(self.other)
    }

    /// Whether `part` is more than `numerator / denominator` of the time.
    fn is_over(&self, part: Duration, numerator: u32, denominator: u32) -> bool {
        part.saturating_mul(denominator) > self.total().saturating_mul(numerator)
    }

    fn bound(&self) -> Bound {
        if self.is_over(self.writing, 1, 3) {
            Bound::Network
        } else if self.is_over(self.compressing, 9, 10) {
            Bound::Processor
        } else {
            Bound::Neither
        }
    }

    /// Bytes a second that a channel wrote, on average.
    fn rate(&self) -> u64 {
        let nanos = self.total().as_nanos().max(1);
        u64::try_from(u128::from(self.bytes_out) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }

    /// Bytes that were written beyond what a rate would have carried.
    fn beyond(&self, rate: u64) -> u64 {
        let carried = u128::from(rate) * self.total().as_nanos() / 1_000_000_000;
        self.bytes_out
            .saturating_sub(u64::try_from(carried).unwrap_or(u64::MAX))
    }

    /// Whether the pages are such that no level makes much of them.
    fn is_incompressible(&self) -> bool {
        self.bytes_out > self.bytes_in / 16 * 15
    }
}

impl LevelControl {
    /// For so many channels, which begin at [`ZstdRange::first`].
    #[must_use]
    pub fn new(range: ZstdRange, channels: ChannelCount) -> Self {
        Self {
            range,
            channels: channels.get().into(),
            level: range.first(),
            window: Window::default(),
            carried: 0,
            beyond: 0,
            is_trial: false,
            hold: 0,
            next_hold: FIRST_HOLD,
        }
    }

    /// The level for the packets that come now.
    #[must_use]
    pub const fn level(&self) -> i8 {
        self.level
    }

    /// Takes note of a packet, of whichever channel; the level from now on.
    pub fn observe(&mut self, packet: &PacketTimes) -> i8 {
        self.window.add(packet);
        let needed = WINDOW.as_nanos().saturating_mul(self.channels.into());
        if self.window.total().as_nanos() >= needed
            && self.window.bytes_in >= WINDOW_BYTES * self.channels
        {
            let window = std::mem::take(&mut self.window);
            self.decide(&window);
        }
        self.level
    }

    fn decide(&mut self, window: &Window) {
        if window.is_over(window.writing, 1, 10) {
            // The connection was full, so what was written is what it carries.
            self.carried = window.rate();
            self.beyond = 0;
        }
        match window.bound() {
            Bound::Network => self.raise(window),
            Bound::Processor => self.lower(window),
            Bound::Neither => self.has_held(),
        }
    }

    /// The last level tried was not too high.
    fn has_held(&mut self) {
        if std::mem::take(&mut self.is_trial) {
            self.next_hold = FIRST_HOLD;
        }
    }

    fn raise(&mut self, window: &Window) {
        self.has_held();
        // Below 1, literals are not compressed, and a higher level can do what a lower one cannot.
        if window.is_incompressible() && self.level >= 1 {
            return;
        }
        // A channel that mostly waits has time for the next level, whatever that was before.
        if self.hold > 0 && !window.is_over(window.writing, 2, 3) {
            self.hold -= 1;
            return;
        }
        let higher = self.range.above(self.level);
        self.is_trial = higher != self.level;
        self.level = higher;
    }

    fn lower(&mut self, window: &Window) {
        if std::mem::take(&mut self.is_trial) {
            self.hold = self.next_hold;
            self.next_hold = LONGEST_HOLD.min(self.next_hold * 2);
        } else if window.rate() > self.carried.saturating_add(self.carried / 20) {
            // More than the network has carried yet. It may go into the buffers of the connection,
            // and the write will wait when they are full; or the network has become faster.
            self.beyond = self.beyond.saturating_add(window.beyond(self.carried));
            if self.beyond <= BUFFERED * self.channels {
                return;
            }
            // It has become faster, by how much nobody knows: the next few levels need not fill the
            // buffers first.
            self.carried = window.rate().saturating_mul(2);
            self.beyond = 0;
        }
        self.level = self.range.below(self.level);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACKET: u64 = 512 << 10;

    /// A processor and a network, in a time of their own.
    struct World {
        /// Nanoseconds that a packet takes, and the bytes that become of it, by level.
        levels: Vec<(u64, u64)>,
        /// Level of the first of them.
        lowest: i8,
        /// Bytes a second.
        bandwidth: u64,
        /// What the connection holds, bytes.
        buffer: u64,
        buffered: u64,
    }

    impl World {
        /// A codec that takes `step` percent more time with each level, and leaves `gain` percent less.
        fn new(range: ZstdRange, first: u64, step: u64, gain: u64, bandwidth: u64) -> Self {
            let mut at = (first, PACKET / 2);
            let levels = (range.min()..=range.max()).map(|_| {
                let this = at;
                at = (at.0 * (100 + step) / 100, at.1 * (100 - gain) / 100);
                this
            });
            Self {
                levels: levels.collect(),
                lowest: range.min(),
                bandwidth,
                buffer: 256 << 10,
                buffered: 0,
            }
        }

        fn carry(&mut self, nanos: u64) {
            let carried = u128::from(self.bandwidth) * u128::from(nanos) / 1_000_000_000;
            self.buffered = self
                .buffered
                .saturating_sub(u64::try_from(carried).unwrap_or(u64::MAX));
        }

        fn packet(&mut self, level: i8) -> PacketTimes {
            let index = usize::from(level.abs_diff(self.lowest));
            let (compressing, bytes_out) = self.levels[index];
            self.carry(compressing);
            let excess = (self.buffered + bytes_out).saturating_sub(self.buffer);
            let waiting = u128::from(excess) * 1_000_000_000 / u128::from(self.bandwidth);
            let waiting = u64::try_from(waiting).unwrap();
            // The copy into the buffer, 4 GB a second.
            let writing = waiting.max(bytes_out / 4);
            self.buffered += bytes_out;
            self.carry(writing);
            PacketTimes {
                bytes_in: PACKET,
                bytes_out,
                compressing: Duration::from_nanos(compressing),
                writing: Duration::from_nanos(writing),
                other: Duration::ZERO,
            }
        }

        /// The levels of the next so many packets.
        fn run(&mut self, control: &mut LevelControl, packets: usize) -> Vec<i8> {
            let run = (0..packets).map(|_| {
                let packet = self.packet(control.level());
                control.observe(&packet)
            });
            run.collect()
        }

        /// Bytes of pages a second at a level that stays.
        fn throughput(&self, level: i8) -> u64 {
            let (compressing, bytes_out) = self.levels[usize::from(level.abs_diff(self.lowest))];
            let sending = bytes_out.saturating_mul(1_000_000_000) / self.bandwidth;
            PACKET.saturating_mul(1_000_000_000) / compressing.max(sending)
        }
    }

    fn range(min: i8, max: i8) -> ZstdRange {
        ZstdRange::new(min, max).unwrap()
    }

    fn control(range: ZstdRange) -> LevelControl {
        LevelControl::new(range, ChannelCount::new(1).unwrap())
    }

    fn changes(levels: &[i8]) -> usize {
        levels.windows(2).filter(|pair| pair[0] != pair[1]).count()
    }

    fn packet(compressing: u64, writing: u64, other: u64) -> PacketTimes {
        PacketTimes {
            bytes_in: 2 * WINDOW_BYTES,
            bytes_out: WINDOW_BYTES,
            compressing: Duration::from_millis(compressing),
            writing: Duration::from_millis(writing),
            other: Duration::from_millis(other),
        }
    }

    #[test]
    fn a_thin_line_takes_the_level_up_to_where_compressing_takes_as_long_as_sending() {
        let range = range(-7, 15);
        // 1 ms a packet at level -7; 2 MB/s carry half a packet in 130 ms.
        let mut world = World::new(range, 1_000_000, 40, 3, 2_000_000);
        let mut control = control(range);
        assert_eq!(control.level(), 1);
        world.run(&mut control, 200);
        let level = control.level();
        let best = (range.min()..=range.max()).filter(|level| *level != 0);
        let best = best.max_by_key(|level| world.throughput(*level)).unwrap();
        assert!(level.abs_diff(best) <= 2, "{level}, the best is {best}");
        assert!(level > 5, "{level}");
    }

    #[test]
    fn a_network_that_carries_everything_takes_the_level_down_to_the_least() {
        let range = range(-7, 15);
        let mut world = World::new(range, 1_000_000, 30, 3, 10_000_000_000);
        let mut control = control(range);
        let levels = world.run(&mut control, 3_000);
        assert_eq!(control.level(), -7);
        assert!(levels.is_sorted_by(|a, b| a >= b), "it never went up");
    }

    #[test]
    fn a_network_that_changes_is_followed_both_ways() {
        let range = range(-7, 15);
        let mut world = World::new(range, 1_000_000, 30, 3, 100_000_000_000);
        let mut control = control(range);
        world.run(&mut control, 5_000);
        assert_eq!(control.level(), -7);
        world.bandwidth = 1_000_000;
        world.run(&mut control, 300);
        let high = control.level();
        assert!(high > 8, "{high}");
        world.bandwidth = 100_000_000_000;
        world.run(&mut control, 5_000);
        assert_eq!(control.level(), -7);
    }

    #[test]
    fn full_buffers_are_waited_for_before_the_level_goes_on_down() {
        let range = range(1, 12);
        // 20 ms a packet at level 1; what it leaves takes 21 ms to send.
        let mut world = World::new(range, 20_000_000, 30, 3, 12_500_000);
        world.buffer = 4 << 20;
        let mut control = control(range);
        let levels = world.run(&mut control, 4_000);
        assert!(levels.iter().all(|level| *level <= 2), "{levels:?}");
        // Back from 12, where nothing was in the buffers.
        control.level = 12;
        let levels = world.run(&mut control, 4_000);
        assert!(levels[2_000..].iter().all(|level| (1..=2).contains(level)));
    }

    #[test]
    fn a_level_that_was_too_high_is_tried_again_more_and_more_rarely() {
        let range = range(1, 2);
        // Level 1 waits for half of the time, level 2 never.
        let mut world = World::new(range, 10_000_000, 150, 1, 13_000_000);
        let mut control = control(range);
        let levels = world.run(&mut control, 10_000);
        assert!((2..80).contains(&changes(&levels[..5_000])));
        assert!(changes(&levels[5_000..]) <= changes(&levels[..5_000]));
        let low = levels.iter().filter(|level| **level == 1).count();
        assert!(low > 8_000, "{low}");
    }

    #[test]
    fn a_level_is_not_lowered_while_the_channels_wait_for_pages() {
        let mut control = control(range(-7, 15));
        for _ in 0..1_000 {
            // As under a limit on bandwidth: written at once, and then nothing to do.
            assert_eq!(control.observe(&packet(40, 1, 59)), 1);
        }
    }

    #[test]
    fn pages_that_do_not_compress_do_not_raise_the_level() {
        let mut control = control(range(-7, 15));
        for _ in 0..100 {
            let mut packet = packet(10, 90, 0);
            packet.bytes_out = packet.bytes_in;
            assert_eq!(control.observe(&packet), 1);
        }
        assert_eq!(control.observe(&packet(10, 90, 0)), 2);
    }

    #[test]
    fn the_level_zero_is_left_out() {
        let mut control = control(range(-1, 2));
        // Beyond what buffers hold, and all of the time.
        let levels: Vec<_> = (0..20)
            .map(|_| control.observe(&packet(100, 0, 0)))
            .collect();
        assert_eq!(control.level(), -1);
        assert!(!levels.contains(&0));
        assert_eq!(control.observe(&packet(10, 90, 0)), 1);
    }

    #[test]
    fn one_window_is_of_all_channels() {
        let channels = ChannelCount::new(4).unwrap();
        let mut control = LevelControl::new(range(1, 20), channels);
        let levels = [0; 8].map(|_| control.observe(&packet(10, 40, 0)));
        assert_eq!(levels, [1, 1, 1, 2, 2, 2, 2, 3]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn any_packets_leave_the_level_in_its_range(
            min in -100_i8..=20, width in 0_i8..=40,
            packets in prop::collection::vec(
                (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()),
                1..200,
            ),
        ) {
            let Some(range) = ZstdRange::new(min, min.saturating_add(width).min(20)) else {
                return Ok(());
            };
            let mut control = control(range);
            for (bytes_in, bytes_out, compressing, writing, other) in packets {
                let before = control.level();
                let level = control.observe(&PacketTimes {
                    bytes_in,
                    bytes_out,
                    compressing: Duration::from_nanos(compressing),
                    writing: Duration::from_nanos(writing),
                    other: Duration::from_nanos(other),
                });
                prop_assert!((range.min()..=range.max()).contains(&level) && level != 0);
                prop_assert!(level == before || range.above(before) == level || range.below(before) == level);
            }
        }

        /// Whatever the codec, the network and its buffers: in the end it goes by one level at most,
        /// and seldom.
        #[test]
        fn the_same_all_the_time_comes_to_rest(
            first in 200_000_u64..20_000_000,
            step in 5_u64..100,
            gain in 0_u64..7,
            bandwidth in 500_000_u64..5_000_000_000,
            buffer in (64_u64 << 10)..(6 << 20),
        ) {
            let range = range(-7, 15);
            let mut world = World::new(range, first, step, gain, bandwidth);
            world.buffer = buffer;
            let mut control = control(range);
            world.run(&mut control, 40_000);
            let levels = world.run(&mut control, 10_000);
            let (least, most) = (levels.iter().min().unwrap(), levels.iter().max().unwrap());
            let one_up = range.above(*least);
            prop_assert!(most == least || *most == one_up, "{} to {}", least, most);
            // Two for each hold, of 64 windows with at least two packets each.
            prop_assert!(changes(&levels) <= 2 * 10_000 / 128 + 2, "{}", changes(&levels));
        }
    }
}
