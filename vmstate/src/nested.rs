//! Descriptions as fields of other descriptions.

use crate::error::LoadError;
use crate::reader::Reader;
use crate::schema::SchemaBuilder;
use crate::spec::FieldSpec;
use crate::state::VmState;
use crate::writer::Writer;

/// A description, or an array of descriptions in one or two dimensions, as a field: no name or
/// version on the wire, each followed by its own subsections. It is there for every [`VmState`];
/// there is no need to implement it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is neither a `VmState` nor an array of such",
    note = "a plain field goes without `#[vmstate(nested)]`"
)]
pub trait Nested: Sized {
    /// Writes the field.
    fn save_nested(&self, spec: FieldSpec, out: &mut Writer);

    /// Reads the field, at the version that this program has.
    ///
    /// # Errors
    /// [`VmState::load`]'s.
    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError>;

    /// Takes down the field as declared.
    fn describe_nested(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder);
}

impl<T: VmState> Nested for T {
    fn save_nested(&self, spec: FieldSpec, out: &mut Writer) {
        out.structures(spec, [self]);
    }

    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        T::load(input, T::VERSION)
    }

    fn describe_nested(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder) {
        schema.structures::<T>(spec, since, None, true);
    }
}

impl<T: VmState, const N: usize> Nested for [T; N] {
    fn save_nested(&self, spec: FieldSpec, out: &mut Writer) {
        out.structures(spec, self);
    }

    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let items = input.elements(N, |input| T::load(input, T::VERSION))?;
        input.array(items)
    }

    fn describe_nested(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder) {
        schema.structures::<T>(spec, since, Some(N), true);
    }
}

impl<T: VmState, const N: usize, const M: usize> Nested for [[T; N]; M] {
    fn save_nested(&self, spec: FieldSpec, out: &mut Writer) {
        out.structures(spec, self.iter().flatten());
    }

    fn load_nested(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let rows = input.elements(M, <[T; N]>::load_nested)?;
        input.array(rows)
    }

    fn describe_nested(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder) {
        schema.structures::<T>(spec, since, Some(N.saturating_mul(M)), true);
    }
}
