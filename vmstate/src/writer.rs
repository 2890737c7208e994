//! Where state is written.

use crate::field::{Field, FieldType};
use crate::nested::Nested;
use crate::vmdesc::{Description, FieldDescription};
use crate::{SaveError, VmState};

/// The bytes of a section's body while they are written, and on demand their description.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    /// The first contradiction found; the bytes are worth nothing then.
    error: Option<SaveError>,
    /// The descriptions being written, innermost last; `None` when nobody wants to know.
    open: Option<Vec<Description>>,
}

impl Writer {
    /// An empty writer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty writer that also notes what each byte is.
    #[must_use]
    pub fn describing() -> Self {
        Self {
            open: Some(Vec::new()),
            ..Self::default()
        }
    }

    /// Writes a whole description, and returns what it consisted of if this is a
    /// [`describing`](Self::describing) writer.
    pub fn description<T: VmState>(&mut self, state: &T) -> Option<Description> {
        if let Some(open) = &mut self.open {
            open.push(Description::new(T::NAME, T::VERSION));
        }
        state.save(self);
        self.open.as_mut().and_then(Vec::pop)
    }

    /// Writes a plain field.
    pub fn field<T: Field>(&mut self, name: &'static str, value: &T) {
        let start = self.bytes.len();
        value.save(self);
        self.note(name, T::field_type(), start);
    }

    /// Writes a field that is a description of its own, or an array of such.
    pub fn nested<T: Nested>(&mut self, name: &'static str, value: &T) {
        value.save_nested(name, self);
    }

    /// Writes a list of plain elements that an earlier field counted.
    pub fn list<T: Field>(&mut self, name: &'static str, items: &[T], count: i128, max: usize) {
        if self.check_count(name, items.len(), count, max) {
            let start = self.bytes.len();
            T::save_slice(items, self);
            self.note(name, T::slice_type(items.len()), start);
        }
    }

    /// Writes a list of descriptions that an earlier field counted.
    pub fn nested_list<T: VmState>(
        &mut self,
        name: &'static str,
        items: &[T],
        count: i128,
        max: usize,
    ) {
        if self.check_count(name, items.len(), count, max) {
            self.nested_slice(name, items);
        }
    }

    /// Writes a subsection if it is needed, that is, if it is `Some`.
    pub fn subsection<T: VmState>(&mut self, state: Option<&T>) {
        let Some(state) = state else { return };
        self.bytes.push(crate::SUBSECTION);
        // The derive refuses names that do not fit; a cut one is at least never a broken stream.
        let name = T::NAME.as_bytes();
        let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
        self.bytes.push(len);
        self.bytes
            .extend_from_slice(name.get(..usize::from(len)).unwrap_or(name));
        self.bytes.extend_from_slice(&T::VERSION.to_be_bytes());
        let description = self.description(state);
        if let (Some(parent), Some(description)) = (self.innermost(), description) {
            parent.subsections.push(description);
        }
    }

    /// Appends bytes as they are, for implementations of [`Field::save`].
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends `len` bytes that `fill` sets; they are zero before.
    pub fn put_with(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) {
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        fill(&mut self.bytes[start..]);
    }

    /// Remembers that what is being saved contradicts itself; the first error stays.
    pub fn fail(&mut self, error: SaveError) {
        self.error.get_or_insert(error);
    }

    /// Number of bytes written.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes.
    ///
    /// # Errors
    /// The first contradiction that was found while they were written.
    pub fn finish(self) -> Result<Vec<u8>, SaveError> {
        self.error.map_or(Ok(self.bytes), Err)
    }

    /// Writes descriptions back to back as one field.
    pub(crate) fn nested_slice<T: VmState>(&mut self, name: &'static str, items: &[T]) {
        let mut written = Vec::new();
        for item in items {
            let start = self.bytes.len();
            if let Some(description) = self.description(item) {
                written.push((description, self.bytes.len() - start));
            }
        }
        if let Some(parent) = self.innermost() {
            parent
                .fields
                .extend(FieldDescription::of_structs(name, written));
        }
    }

    /// Writes one description as a field.
    pub(crate) fn nested_one<T: VmState>(&mut self, name: &'static str, item: &T) {
        let start = self.bytes.len();
        let description = self.description(item);
        let size = self.bytes.len() - start;
        if let (Some(parent), Some(description)) = (self.innermost(), description) {
            parent
                .fields
                .push(FieldDescription::of_struct(name, description, size));
        }
    }

    fn check_count(&mut self, field: &'static str, len: usize, count: i128, max: usize) -> bool {
        if usize::try_from(count) != Ok(len) {
            self.fail(SaveError::Count { field, len, count });
            return false;
        }
        if len > max {
            self.fail(SaveError::TooMany { field, len, max });
            return false;
        }
        true
    }

    fn note(&mut self, name: &'static str, field_type: FieldType, start: usize) {
        let bytes = self.bytes.len() - start;
        if let Some(parent) = self.innermost() {
            parent
                .fields
                .extend(FieldDescription::of_plain(name, field_type, bytes));
        }
    }

    fn innermost(&mut self) -> Option<&mut Description> {
        self.open.as_mut().and_then(|open| open.last_mut())
    }
}
