//! The keys of a sorted tree.

use crate::error::LoadError;
use crate::field::Field;
use crate::reader::Reader;
use crate::state::VmState;
use crate::writer::Writer;

/// The key of a node in a tree ([`Reader::tree`]): a [`VmState`], or `u64` for what QEMU calls a
/// direct key.
pub trait TreeKey: Sized {
    /// Writes the key.
    fn save_key(&self, out: &mut Writer);

    /// Reads a key.
    ///
    /// # Errors
    /// [`VmState::load`]'s.
    fn load_key(input: &mut Reader<'_>) -> Result<Self, LoadError>;
}

impl TreeKey for u64 {
    fn save_key(&self, out: &mut Writer) {
        self.save(out);
    }

    fn load_key(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        Self::load(input)
    }
}

impl<T: VmState> TreeKey for T {
    fn save_key(&self, out: &mut Writer) {
        out.description(self);
    }

    fn load_key(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        T::load(input, T::VERSION)
    }
}
