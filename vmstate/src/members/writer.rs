//! Writing the members of a description.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::SaveError;
use crate::field::Field;
use crate::field_type::FieldType;
use crate::nested::Nested;
use crate::pointee::{Entries, Pointee};
use crate::schema::Schema;
use crate::spec::FieldSpec;
use crate::state::VmState;
use crate::tree_key::TreeKey;
use crate::types::Bits;
use crate::vmdesc::{Description, FieldDescription};
use crate::writer::Writer;

impl Writer {
    /// Writes a whole description, and returns what it consisted of if this is a
    /// [`describing`](Self::describing) writer.
    pub fn description<T: VmState>(&mut self, state: &T) -> Option<Description> {
        self.description_at(state, T::VERSION)
    }

    fn description_at<T: VmState>(&mut self, state: &T, version: u32) -> Option<Description> {
        if let Some(open) = &mut self.open {
            open.push(Description::new(T::NAME, version));
        }
        state.save_at(self, version);
        self.open.as_mut().and_then(Vec::pop)
    }

    /// Writes a plain field.
    pub fn field<T: Field>(&mut self, spec: impl Into<FieldSpec>, value: &T) {
        let start = self.len();
        value.save(self);
        self.note(spec.into(), T::field_type(), start);
    }

    /// Writes a field that is a description of its own, or an array of such.
    pub fn nested<T: Nested>(&mut self, spec: impl Into<FieldSpec>, value: &T) {
        value.save_nested(spec.into(), self);
    }

    /// Writes a list of plain elements that an earlier field counted.
    pub fn list<T: Field>(
        &mut self,
        spec: impl Into<FieldSpec>,
        items: &[T],
        count: i128,
        max: usize,
    ) {
        let spec = spec.into();
        if self.check_count(spec.name(), items.len(), count, max) {
            self.elements(spec, items);
        }
    }

    /// Writes a list of descriptions that an earlier field counted.
    pub fn nested_list<T: VmState>(
        &mut self,
        spec: impl Into<FieldSpec>,
        items: &[T],
        count: i128,
        max: usize,
    ) {
        let spec = spec.into();
        if self.check_count(spec.name(), items.len(), count, max) {
            self.structures(spec, items);
        }
    }

    /// Writes elements `range` of an array.
    pub fn part<T: Field, const N: usize>(
        &mut self,
        spec: impl Into<FieldSpec>,
        array: &[T; N],
        range: Range<usize>,
    ) {
        let spec = spec.into();
        match array.get(range.clone()) {
            Some(part) => self.elements(spec, part),
            None => self.fail(SaveError::TooMany {
                field: spec.name(),
                len: range.end,
                max: N,
            }),
        }
    }

    /// Writes a description in the form of `version`, whatever the current one is.
    pub fn nested_at<T: VmState>(&mut self, spec: impl Into<FieldSpec>, value: &T, version: u32) {
        let start = self.len();
        let description = self.description_at(value, version);
        self.note_inline(spec.into(), "vstruct", description, start);
    }

    /// Writes a description that stands for other members of the state (QEMU's `tmp`).
    pub fn nested_tmp<T: VmState>(&mut self, spec: impl Into<FieldSpec>, value: &T) {
        let start = self.len();
        let description = self.description(value);
        self.note_inline(spec.into(), "tmp", description, start);
    }

    /// Writes an array of pointers to descriptions or numbers: with `markers` each behind a byte that says
    /// whether it is NULL, without only NULL ones have that byte.
    pub fn pointers<T: Pointee>(
        &mut self,
        spec: impl Into<FieldSpec>,
        items: &[Option<T>],
        count: i128,
        max: usize,
        markers: bool,
    ) {
        let spec = spec.into();
        if !self.check_count(spec.name(), items.len(), count, max) {
            return;
        }
        let mut entries = Entries::default();
        for item in items {
            if item.is_none() || markers {
                self.put(&[match item {
                    None => crate::NULL_POINTER,
                    Some(_) => crate::VALID_POINTER,
                }]);
                entries.0.push(FieldDescription::of_marker(spec));
            }
            if let Some(item) = item {
                item.save_pointee(spec, self, &mut entries);
            }
        }
        let is_compressed = !markers && T::is_compressed(spec, self);
        self.note_entries(entries.0, is_compressed);
    }

    /// Writes a list whose elements have a byte 1 before them, and a byte 0 behind the last. Its
    /// type is described as QEMU's `qtailq`, unless `spec` has another.
    pub fn queue<T: VmState>(&mut self, spec: impl Into<FieldSpec>, items: &[T], max: usize) {
        let spec = spec.into();
        if !self.check_max(spec.name(), items.len(), max) {
            return;
        }
        let start = self.len();
        let mut last = None;
        for item in items {
            self.put(&[1]);
            last = self.description(item);
        }
        self.put(&[0]);
        self.note_inline(spec, "qtailq", last, start);
    }

    /// Writes a sorted tree: a be32 count, for each node a byte 1, key and value, then a byte 0.
    pub fn tree<K: TreeKey, V: VmState>(
        &mut self,
        spec: impl Into<FieldSpec>,
        tree: &BTreeMap<K, V>,
        max: usize,
    ) {
        let spec = spec.into();
        if !self.check_max(spec.name(), tree.len(), max) {
            return;
        }
        let Ok(count) = u32::try_from(tree.len()) else {
            return self.fail(SaveError::TooMany {
                field: spec.name(),
                len: tree.len(),
                max: usize::try_from(u32::MAX).unwrap_or(usize::MAX),
            });
        };
        let start = self.len();
        count.save(self);
        let mut last = None;
        for (key, value) in tree {
            self.put(&[1]);
            key.save_key(self);
            last = self.description(value);
        }
        self.put(&[0]);
        self.note_inline(spec, "gtree", last, start);
    }

    /// Writes bits that an earlier field counted.
    pub fn bits(&mut self, spec: impl Into<FieldSpec>, bits: &Bits, count: i128, max: usize) {
        let spec = spec.into();
        if self.check_count(spec.name(), bits.bits().len(), count, max) {
            let start = self.len();
            bits.save(self);
            let field_type = FieldType {
                name: "bitmap",
                elements: None,
            };
            self.note(spec, field_type, start);
        }
    }

    /// Writes a subsection if it is needed, that is, if it is `Some`.
    pub fn subsection<T: VmState>(&mut self, state: Option<&T>) {
        let Some(state) = state else { return };
        self.put(&[crate::SUBSECTION]);
        // The derive refuses names that do not fit; a cut one is at least never a broken stream.
        let name = T::NAME.as_bytes();
        let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
        self.put(&[len]);
        self.put(name.get(..usize::from(len)).unwrap_or(name));
        self.put(&T::VERSION.to_be_bytes());
        let description = self.description(state);
        if let (Some(parent), Some(description)) = (self.innermost(), description) {
            parent.subsections.push(description);
        }
    }

    /// Writes descriptions back to back as one field.
    pub(crate) fn structures<'a, T: VmState + 'a>(
        &mut self,
        spec: FieldSpec,
        items: impl IntoIterator<Item = &'a T>,
    ) {
        let mut entries = Vec::new();
        for item in items {
            entries.extend(self.structure(spec, item));
        }
        let is_compressed = self.compresses::<T>(spec);
        self.note_entries(entries, is_compressed);
    }

    pub(crate) fn structure<T: VmState>(
        &mut self,
        spec: FieldSpec,
        item: &T,
    ) -> Option<FieldDescription> {
        let start = self.len();
        let description = self.description(item)?;
        let size = self.len() - start;
        Some(FieldDescription::of_struct(spec, description, size))
    }

    /// Whether elements that are alike are described once: that is up to the declaration, so that
    /// the description does not depend on what is in the state.
    pub(crate) fn compresses<T: VmState>(&self, spec: FieldSpec) -> bool {
        self.open.is_some() && !spec.is_tested() && Schema::of::<T>().compresses()
    }

    fn elements<T: Field>(&mut self, spec: FieldSpec, items: &[T]) {
        let start = self.len();
        T::save_slice(items, self);
        self.note(spec, T::slice_type(items.len()), start);
    }
}
