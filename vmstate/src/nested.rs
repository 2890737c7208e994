//! Descriptions as fields of other descriptions.

use crate::{LoadError, Reader, VmState, Writer};

/// A description, or an array of descriptions, as a field: no name or version on the wire, each
/// followed by its own subsections. It is there for every [`VmState`]; there is no need to
/// implement it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is neither a `VmState` nor an array of such",
    note = "a plain field goes without `#[vmstate(nested)]`"
)]
pub trait Nested: Sized {
    /// Writes the field.
    fn save_nested(&self, name: &'static str, out: &mut Writer);

    /// Reads the field, at the version that this program has.
    ///
    /// # Errors
    /// [`VmState::load`]'s.
    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError>;
}

impl<T: VmState> Nested for T {
    fn save_nested(&self, name: &'static str, out: &mut Writer) {
        out.nested_one(name, self);
    }

    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        T::load(input, T::VERSION)
    }
}

impl<T: VmState, const N: usize> Nested for [T; N] {
    fn save_nested(&self, name: &'static str, out: &mut Writer) {
        out.nested_slice(name, self);
    }

    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let items = input.elements(N, |input| T::load(input, T::VERSION))?;
        items
            .try_into()
            .map_err(|items: Vec<T>| input.invalid(format_args!("{} of {N} elements", items.len())))
    }
}
