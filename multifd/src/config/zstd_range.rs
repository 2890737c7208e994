//! Between which levels an adaptive one is chosen.

use std::str::FromStr;

/// Levels of zstd from which one is chosen: the negative ones, which are faster than 1 and leave
/// more, and the positive ones. There is no 0, which is zstd's name for 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZstdRange {
    min: i8,
    max: i8,
}

impl ZstdRange {
    /// The fastest level that can be asked for: it finds little but long repetitions.
    pub const MIN: i8 = -100;
    /// The slowest, as in QEMU.
    pub const MAX: i8 = 20;

    /// The levels from `min` to `max`; `None` if there are none, for 0 at either end, and beyond
    /// [`MIN`](Self::MIN) and [`MAX`](Self::MAX).
    #[must_use]
    pub const fn new(min: i8, max: i8) -> Option<Self> {
        let is_range = Self::MIN <= min && min <= max && max <= Self::MAX;
        if is_range && min != 0 && max != 0 {
            Some(Self { min, max })
        } else {
            None
        }
    }

    /// The fastest.
    #[must_use]
    pub const fn min(self) -> i8 {
        self.min
    }

    /// The slowest.
    #[must_use]
    pub const fn max(self) -> i8 {
        self.max
    }

    /// Where a set of channels begins: at 1, or as near to it as there is.
    #[must_use]
    pub fn first(self) -> i8 {
        1.clamp(self.min, self.max)
    }

    /// The next slower one, or the same if it is the slowest.
    pub(crate) fn above(self, level: i8) -> i8 {
        let next = if level == -1 {
            1
        } else {
            level.saturating_add(1)
        };
        next.min(self.max)
    }

    /// The next faster one, or the same if it is the fastest.
    pub(crate) fn below(self, level: i8) -> i8 {
        let next = if level == 1 {
            -1
        } else {
            level.saturating_sub(1)
        };
        next.max(self.min)
    }
}

impl Default for ZstdRange {
    /// From -7 to 12, which takes ten times as long and leaves half as much.
    fn default() -> Self {
        Self { min: -7, max: 12 }
    }
}

impl FromStr for ZstdRange {
    type Err = ZstdRangeError;

    /// As options of programs have it: `auto`, or `auto:MIN:MAX`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::default());
        }
        let range = text
            .strip_prefix("auto:")
            .and_then(|range| range.split_once(':'))
            .and_then(|(min, max)| Some((min.parse().ok()?, max.parse().ok()?)));
        let (min, max) = range.ok_or_else(|| ZstdRangeError::Form(text.to_owned()))?;
        Self::new(min, max).ok_or(ZstdRangeError::Levels { min, max })
    }
}

/// Why a text is no [`ZstdRange`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ZstdRangeError {
    /// It does not look like one.
    #[error("'{0}' is neither auto nor auto:MIN:MAX")]
    Form(String),
    /// There are no such levels.
    #[error(
        "no levels from {min} to {max}: expected {} to {}, without 0 at either end",
        ZstdRange::MIN,
        ZstdRange::MAX
    )]
    Levels {
        /// The first.
        min: i8,
        /// The last.
        max: i8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_that_adapt_are_read_as_options_have_them() {
        let range = |min, max| ZstdRange::new(min, max).unwrap();
        assert_eq!("auto".parse(), Ok(ZstdRange::default()));
        assert_eq!("auto:-3:9".parse(), Ok(range(-3, 9)));
        assert_eq!("auto:5:5".parse(), Ok(range(5, 5)));
        for text in [
            "",
            "9",
            "auto:",
            "auto:1",
            "auto:1:x",
            "auto:1:1000",
            "Auto",
        ] {
            let form = ZstdRangeError::Form(text.to_owned());
            assert_eq!(text.parse::<ZstdRange>(), Err(form));
        }
        for (min, max) in [(0, 5), (-5, 0), (5, 4), (-101, 1), (1, 21)] {
            let levels = ZstdRangeError::Levels { min, max };
            assert_eq!(
                format!("auto:{min}:{max}").parse::<ZstdRange>(),
                Err(levels)
            );
        }
    }

    #[test]
    fn channels_begin_at_one_or_as_near_to_it_as_there_is() {
        let first = |min, max| ZstdRange::new(min, max).unwrap().first();
        assert_eq!((first(-7, 12), first(4, 9), first(-9, -2)), (1, 4, -2));
    }
}
