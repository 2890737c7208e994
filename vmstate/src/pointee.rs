//! What an array of pointers may point to.

use crate::error::LoadError;
use crate::field::Field;
use crate::reader::Reader;
use crate::schema::SchemaBuilder;
use crate::spec::FieldSpec;
use crate::state::VmState;
use crate::vmdesc::FieldDescription;
use crate::writer::Writer;

/// An element of an array of pointers: a description, or a number (QEMU's
/// `VMSTATE_ARRAY_OF_POINTER_TO_STRUCT` and `VMSTATE_ARRAY_OF_POINTER`). It is there for every
/// [`VmState`] and every primitive [`Field`]; there is no need to implement it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is neither a `VmState` nor a primitive field",
    note = "an array of pointers has elements such as `Option<i32>` or `Option<T>` with `T: VmState`"
)]
pub trait Pointee: Sized + sealed::Pointee {}

impl<T: sealed::Pointee> Pointee for T {}

pub(crate) mod sealed {
    use super::Entries;
    use crate::error::LoadError;
    use crate::reader::Reader;
    use crate::schema::SchemaBuilder;
    use crate::spec::FieldSpec;
    use crate::writer::Writer;

    pub trait Pointee: Sized {
        /// Writes the element, and adds what it is to `entries` if the stream is being described.
        fn save_pointee(&self, spec: FieldSpec, out: &mut Writer, entries: &mut Entries);

        fn load_pointee(input: &mut Reader<'_>) -> Result<Self, LoadError>;

        fn describe_pointees(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder);

        /// Whether elements that are alike are described once.
        fn is_compressed(spec: FieldSpec, out: &Writer) -> bool;
    }
}

/// What was written for the elements so far.
#[derive(Debug, Default)]
pub struct Entries(pub(crate) Vec<FieldDescription>);

impl<T: VmState> sealed::Pointee for T {
    fn save_pointee(&self, spec: FieldSpec, out: &mut Writer, entries: &mut Entries) {
        entries.0.extend(out.structure(spec, self));
    }

    fn load_pointee(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        T::load(input, T::VERSION)
    }

    fn describe_pointees(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder) {
        schema.structures::<T>(spec, since, None, false);
    }

    fn is_compressed(spec: FieldSpec, out: &Writer) -> bool {
        out.compresses::<T>(spec)
    }
}

macro_rules! primitive {
    ($($type:ty),*) => {$(
        impl sealed::Pointee for $type {
            fn save_pointee(&self, spec: FieldSpec, out: &mut Writer, entries: &mut Entries) {
                let start = out.len();
                self.save(out);
                let len = out.len() - start;
                let plain = FieldDescription::of_plain(spec, Self::field_type(), len);
                entries.0.extend(plain);
            }

            fn load_pointee(input: &mut Reader<'_>) -> Result<Self, LoadError> {
                <Self as Field>::load(input)
            }

            fn describe_pointees(spec: FieldSpec, since: u32, schema: &mut SchemaBuilder) {
                schema.list::<Self>(spec, since);
            }

            fn is_compressed(spec: FieldSpec, _out: &Writer) -> bool {
                !spec.is_tested()
            }
        }
    )*};
}

primitive!(u8, u16, u32, u64, i8, i16, i32, i64, bool, f64);
