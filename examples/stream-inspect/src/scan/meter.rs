//! How much of a stream each part takes up, and how long.

use std::time::Instant;

use crate::inspection::{Extent, Part};

/// What each part takes up, by whose turn it is.
pub(super) struct Meter {
    part: Part,
    since: (u64, Instant),
    pub(super) extents: [Extent; Part::ALL.len()],
}

impl Meter {
    pub(super) fn new(offset: u64) -> Self {
        Self {
            part: Part::Configuration,
            since: (offset, Instant::now()),
            extents: Default::default(),
        }
    }

    /// From byte `offset` on it is this part's.
    pub(super) fn turn(&mut self, part: Part, offset: u64) {
        if part == self.part {
            return;
        }
        let now = Instant::now();
        let (begun, since) = std::mem::replace(&mut self.since, (offset, now));
        let past = std::mem::replace(&mut self.part, part);
        if let Some(extent) = self.extents.get_mut(past as usize) {
            extent.bytes += offset.saturating_sub(begun);
            extent.time += now - since;
        }
    }

    /// Part of what was one part's is another's.
    pub(super) fn shift(&mut self, from: Part, to: Part, what: Extent) {
        if let Some(extent) = self.extents.get_mut(from as usize) {
            extent.bytes = extent.bytes.saturating_sub(what.bytes);
            extent.time = extent.time.saturating_sub(what.time);
        }
        if let Some(extent) = self.extents.get_mut(to as usize) {
            extent.bytes += what.bytes;
            extent.time += what.time;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn bytes_go_to_the_part_whose_turn_it_is() {
        let mut meter = Meter::new(100);
        meter.turn(Part::Setup, 150);
        meter.turn(Part::Setup, 160);
        meter.turn(Part::Pages, 170);
        meter.turn(Part::Devices, 1170);
        meter.turn(Part::Description, 1470);
        let what = Extent {
            bytes: 100,
            time: Duration::ZERO,
        };
        meter.shift(Part::Devices, Part::Description, what);
        let bytes = meter.extents.map(|extent| extent.bytes);
        assert_eq!(bytes, [50, 0, 20, 1000, 0, 200, 100]);
    }
}
