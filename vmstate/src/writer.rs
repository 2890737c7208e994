//! Where state is written.

use crate::error::SaveError;
use crate::field_type::FieldType;
use crate::spec::FieldSpec;
use crate::vmdesc::{Description, FieldDescription};

/// The bytes of a section's body while they are written, and on demand their description.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    /// The first contradiction found; the bytes are worth nothing then.
    error: Option<SaveError>,
    /// The descriptions being written, innermost last; `None` without a description.
    pub(crate) open: Option<Vec<Description>>,
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

    /// Appends bytes as they are, for implementations of [`Field::save`](crate::Field::save).
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

    pub(crate) fn check_max(&mut self, field: &'static str, len: usize, max: usize) -> bool {
        if len > max {
            self.fail(SaveError::TooMany { field, len, max });
            return false;
        }
        true
    }

    pub(crate) fn check_count(
        &mut self,
        field: &'static str,
        len: usize,
        count: i128,
        max: usize,
    ) -> bool {
        if usize::try_from(count) != Ok(len) {
            self.fail(SaveError::Count { field, len, count });
            return false;
        }
        self.check_max(field, len, max)
    }

    pub(crate) fn note(&mut self, spec: FieldSpec, field_type: FieldType, start: usize) {
        let bytes = self.bytes.len() - start;
        if let Some(parent) = self.innermost() {
            parent
                .fields
                .extend(FieldDescription::of_plain(spec, field_type, bytes));
        }
    }

    pub(crate) fn note_inline(
        &mut self,
        spec: FieldSpec,
        type_name: &'static str,
        description: Option<Description>,
        start: usize,
    ) {
        let size = self.bytes.len() - start;
        if let Some(parent) = self.innermost() {
            let field_type = FieldType {
                name: type_name,
                elements: None,
            };
            let type_name = spec.described(field_type, size).name;
            parent.fields.push(FieldDescription::of_inline(
                spec,
                type_name,
                description,
                size,
            ));
        }
    }

    pub(crate) fn note_entries(&mut self, entries: Vec<FieldDescription>, is_compressed: bool) {
        if let Some(parent) = self.innermost() {
            parent.fields.extend(if is_compressed {
                FieldDescription::compressed(entries)
            } else {
                entries
            });
        }
    }

    pub(crate) fn innermost(&mut self) -> Option<&mut Description> {
        self.open.as_mut().and_then(|open| open.last_mut())
    }
}
