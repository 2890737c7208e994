//! The rest of QEMU's vocabulary of plain fields.

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;
use bitvec::vec::BitVec;

use crate::field::{Field, FieldType};
use crate::{LoadError, Reader, Writer};

/// `N` bytes that mean nothing: written as zero, skipped when read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unused<const N: usize>;

impl<const N: usize> Field for Unused<N> {
    fn field_type() -> FieldType {
        FieldType {
            name: "unused_buffer",
            elements: None,
        }
    }

    fn save(&self, out: &mut Writer) {
        out.put_with(N, |_| ());
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        input.take(N).map(|_| Self)
    }
}

/// When a timer expires, in nanoseconds of its clock; be64, all ones when it is not armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timer(u64);

impl Timer {
    /// A timer that does not run.
    pub const NOT_ARMED: Self = Self(u64::MAX);

    /// A timer that expires at `nanoseconds` of its clock. The last nanosecond a clock can show is
    /// the same as [`Timer::NOT_ARMED`].
    #[must_use]
    pub const fn at(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// When the timer expires, `None` when it is not armed.
    #[must_use]
    pub const fn expiry(self) -> Option<u64> {
        match self {
            Self::NOT_ARMED => None,
            Self(nanoseconds) => Some(nanoseconds),
        }
    }
}

impl Default for Timer {
    fn default() -> Self {
        Self::NOT_ARMED
    }
}

impl Field for Timer {
    fn field_type() -> FieldType {
        FieldType {
            name: "timer",
            elements: None,
        }
    }

    fn save(&self, out: &mut Writer) {
        self.0.save(out);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        u64::load(input).map(Self)
    }
}

/// `BITS` bits, as be64 words; bit 0 of the first word is bit 0. What the last word has beyond the
/// end is written as zero and ignored when read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap<const BITS: usize>(BitVec<u64, Lsb0>);

impl<const BITS: usize> Bitmap<BITS> {
    /// All bits clear.
    #[must_use]
    pub fn new() -> Self {
        Self(BitVec::repeat(false, BITS))
    }

    /// The bits.
    #[must_use]
    pub fn bits(&self) -> &BitSlice<u64, Lsb0> {
        &self.0
    }

    /// The bits, to be changed.
    pub fn bits_mut(&mut self) -> &mut BitSlice<u64, Lsb0> {
        &mut self.0
    }
}

impl<const BITS: usize> Default for Bitmap<BITS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const BITS: usize> Field for Bitmap<BITS> {
    fn field_type() -> FieldType {
        FieldType {
            name: "bitmap",
            elements: None,
        }
    }

    fn save(&self, out: &mut Writer) {
        // `domain` yields the words with what is beyond the end cleared.
        for word in self.0.domain() {
            word.save(out);
        }
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let mut bits = BitVec::from_vec(u64::load_vec(BITS.div_ceil(64), input)?);
        bits.truncate(BITS);
        Ok(Self(bits))
    }
}
