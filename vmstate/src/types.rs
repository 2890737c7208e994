//! The rest of QEMU's vocabulary of plain fields.

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;
use bitvec::vec::BitVec;

use crate::error::LoadError;
use crate::field::Field;
use crate::field_type::FieldType;
use crate::reader::Reader;
use crate::writer::Writer;

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

    fn size() -> usize {
        N
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

    fn size() -> usize {
        size_of::<u64>()
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

    fn size() -> usize {
        BITS.div_ceil(64).saturating_mul(8)
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

/// As many bits as an earlier field says (`#[vmstate(bits = count, max = ..)]`), in the form of
/// [`Bitmap`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits(BitVec<u64, Lsb0>);

impl Bits {
    /// `len` bits, all clear.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self(BitVec::repeat(false, len))
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

    pub(crate) fn save(&self, out: &mut Writer) {
        for word in self.0.domain() {
            word.save(out);
        }
    }

    pub(crate) fn load(len: usize, input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let mut bits = BitVec::from_vec(u64::load_vec(len.div_ceil(64), input)?);
        bits.truncate(len);
        Ok(Self(bits))
    }
}

/// A floating-point number as QEMU's CPUs keep it: its IEEE 754 bits, be64.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CpuDouble(pub u64);

impl Field for CpuDouble {
    fn field_type() -> FieldType {
        FieldType {
            name: "CPU_Double_U",
            elements: None,
        }
    }

    fn size() -> usize {
        size_of::<u64>()
    }

    fn save(&self, out: &mut Writer) {
        self.0.save(out);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        u64::load(input).map(Self)
    }
}

/// Up to `MAX` bytes that say themselves how many they are, be32.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ByteArray<const MAX: usize>(Vec<u8>);

impl<const MAX: usize> ByteArray<MAX> {
    /// These bytes, `None` if they are more than `MAX` or than 32 bits can say.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() <= MAX && u32::try_from(bytes.len()).is_ok()).then_some(Self(bytes))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<const MAX: usize> Field for ByteArray<MAX> {
    fn field_type() -> FieldType {
        FieldType {
            name: "GByteArray",
            elements: None,
        }
    }

    fn save(&self, out: &mut Writer) {
        // `new` and `load` let nothing longer be.
        u32::try_from(self.0.len()).unwrap_or(u32::MAX).save(out);
        out.put(&self.0);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let count = u32::load(input)?;
        let count = input.check_count(count.into(), MAX)?;
        input.take(count).map(|bytes| Self(bytes.to_vec()))
    }
}

/// The name of a migration capability: a byte that says how long it is, and the name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capability(String);

impl Capability {
    /// This name, `None` if it is longer than 255 bytes.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        (name.len() <= usize::from(u8::MAX)).then(|| Self(name.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Field for Capability {
    fn field_type() -> FieldType {
        FieldType {
            name: "capability",
            elements: None,
        }
    }

    fn save(&self, out: &mut Writer) {
        out.put(&[u8::try_from(self.0.len()).unwrap_or(u8::MAX)]);
        out.put(self.0.as_bytes());
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let len = u8::load(input)?;
        match std::str::from_utf8(input.take(len.into())?) {
            Ok(name) => Ok(Self(name.to_owned())),
            Err(e) => Err(input.invalid(format_args!("the name of a capability: {e}"))),
        }
    }
}
