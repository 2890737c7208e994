//! Taking down the members of a description as declared.

use std::any::type_name;

use crate::field::Field;
use crate::field_type::FieldType;
use crate::nested::Nested;
use crate::pointee::Pointee;
use crate::schema::{Schema, SchemaBuilder};
use crate::spec::FieldSpec;
use crate::state::VmState;

impl Schema {
    /// The description of `T`.
    #[must_use]
    pub fn of<T: VmState>() -> Self {
        SchemaBuilder::default()
            .build::<T>()
            .unwrap_or_else(empty::<T>)
    }
}

const fn empty<T: VmState>() -> Schema {
    Schema::empty(T::NAME, T::VERSION, T::MINIMUM_VERSION)
}

impl SchemaBuilder {
    /// A plain field that version `since` was the first to have.
    pub fn field<T: Field>(&mut self, spec: impl Into<FieldSpec>, since: u32) {
        self.plain(spec.into(), since, T::field_type(), T::size());
    }

    /// Plain elements whose number varies.
    pub fn list<T: Field>(&mut self, spec: impl Into<FieldSpec>, since: u32) {
        let element = FieldType {
            elements: None,
            ..T::slice_type(0)
        };
        self.plain(spec.into(), since, element, T::size());
    }

    /// A field whose bytes vary in number.
    pub fn variable(&mut self, spec: impl Into<FieldSpec>, since: u32) {
        let field_type = FieldType {
            name: "buffer",
            elements: None,
        };
        self.plain(spec.into(), since, field_type, 0);
    }

    /// A field that is a description of its own, or an array of such.
    pub fn nested<T: Nested>(&mut self, spec: impl Into<FieldSpec>, since: u32) {
        T::describe_nested(spec.into(), since, self);
    }

    /// Descriptions whose number varies.
    pub fn nested_list<T: VmState>(&mut self, spec: impl Into<FieldSpec>, since: u32) {
        self.structures::<T>(spec.into(), since, None, true);
    }

    /// An array of pointers to descriptions or numbers.
    pub fn pointers<T: Pointee>(&mut self, spec: impl Into<FieldSpec>, since: u32) {
        T::describe_pointees(spec.into(), since, self);
    }

    /// A subsection.
    pub fn subsection<T: VmState>(&mut self) {
        if let Some(schema) = self.build::<T>() {
            self.add_subsection(schema);
        }
    }

    pub(crate) fn structures<T: VmState>(
        &mut self,
        spec: FieldSpec,
        since: u32,
        array: Option<usize>,
        compresses: bool,
    ) {
        let structure = self.build::<T>();
        self.structure(spec, since, array, compresses, structure);
    }

    fn build<T: VmState>(&mut self) -> Option<Schema> {
        if !self.begin(type_name::<T>(), empty::<T>()) {
            return None;
        }
        T::describe(self);
        self.end()
    }
}
