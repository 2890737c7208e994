//! What a state may consist of, whatever a value of it contains: the description as declared.

use crate::field_type::FieldType;
use crate::json::JsonWriter;
use crate::reader::Reader;
use crate::spec::FieldSpec;

/// A description as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    name: &'static str,
    pub(crate) version: u32,
    pub(crate) minimum_version: u32,
    fields: Vec<SchemaField>,
    subsections: Vec<Self>,
}

/// A field as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SchemaField {
    name: &'static str,
    /// The first version that has it.
    since: u32,
    is_tested: bool,
    /// Bytes of one element; 0 if they vary.
    size: usize,
    /// How many elements an array has that always has as many; `None` if it is no such array.
    array: Option<usize>,
    /// Whether an array of structures that have this field may be described by its first element.
    compresses: bool,
    structure: Option<Schema>,
}

impl Schema {
    pub(crate) const fn empty(name: &'static str, version: u32, minimum_version: u32) -> Self {
        Self {
            name,
            version,
            minimum_version,
            fields: Vec::new(),
            subsections: Vec::new(),
        }
    }

    /// Whether QEMU would describe an array of these by its first element.
    pub(crate) fn compresses(&self) -> bool {
        self.subsections.is_empty() && self.fields.iter().all(|f| f.compresses)
    }

    fn size(&self) -> usize {
        self.fields.iter().fold(0, |sum, field| {
            sum.saturating_add(field.size.saturating_mul(field.array.unwrap_or(1)))
        })
    }

    pub(crate) fn members(&self, json: &mut JsonWriter) {
        json.key("name").string(self.name);
        json.key("version_id").number(self.version);
        json.key("minimum_version_id").number(self.minimum_version);
        if !self.fields.is_empty() {
            json.key("Fields").array(&self.fields, |json, field| {
                json.object(|json| field.members(json));
            });
        }
        if !self.subsections.is_empty() {
            json.key("Subsections").array(&self.subsections, |json, s| {
                json.object(|json| s.members(json));
            });
        }
    }
}

impl SchemaField {
    fn members(&self, json: &mut JsonWriter) {
        json.key("field").string(self.name);
        json.key("version_id").number(self.since);
        json.key("field_exists").boolean(self.is_tested);
        if let Some(elements) = self.array {
            json.key("num").number(elements as u64);
        }
        json.key("size").number(self.size as u64);
        if let Some(structure) = &self.structure {
            json.key("Description")
                .object(|json| structure.members(json));
        }
    }
}

/// Takes down a description as it is declared, for implementations of [`VmState::describe`].
///
/// [`VmState::describe`]: crate::VmState::describe
#[derive(Debug, Default)]
pub struct SchemaBuilder {
    /// The descriptions being taken down, innermost last, with their Rust types: a type that
    /// contains itself is described once.
    open: Vec<(&'static str, Schema)>,
}

impl SchemaBuilder {
    /// A field of a type that has `size` bytes, of an array for each element.
    pub(crate) fn plain(
        &mut self,
        spec: FieldSpec,
        since: u32,
        field_type: FieldType,
        size: usize,
    ) {
        let described = spec.described(field_type, size);
        let (array, size) = match (field_type.elements, described.elements) {
            // A buffer that is described as an array of bytes.
            (None, Some(n)) => (Some(n), 1),
            (_, n) => (n, size),
        };
        self.push(SchemaField {
            name: spec.name(),
            since,
            is_tested: spec.is_tested(),
            size,
            array,
            compresses: !spec.is_tested(),
            structure: None,
        });
    }

    /// A field of descriptions like `structure`, or of a type that is being taken down already.
    pub(crate) fn structure(
        &mut self,
        spec: FieldSpec,
        since: u32,
        array: Option<usize>,
        compresses: bool,
        structure: Option<Schema>,
    ) {
        self.push(SchemaField {
            name: spec.name(),
            since,
            is_tested: spec.is_tested(),
            size: structure.as_ref().map_or(0, Schema::size),
            array,
            compresses: compresses
                && !spec.is_tested()
                && structure.as_ref().is_some_and(Schema::compresses),
            structure,
        });
    }

    pub(crate) fn add_subsection(&mut self, schema: Schema) {
        if let Some((_, parent)) = self.open.last_mut() {
            parent.subsections.push(schema);
        }
    }

    /// Begins a description of a Rust type, unless that is being taken down already.
    pub(crate) fn begin(&mut self, type_name: &'static str, empty: Schema) -> bool {
        let is_new = self.open.len() < Reader::MAX_DEPTH
            && self.open.iter().all(|(open, _)| *open != type_name);
        if is_new {
            self.open.push((type_name, empty));
        }
        is_new
    }

    /// Ends the description that was begun last.
    pub(crate) fn end(&mut self) -> Option<Schema> {
        self.open.pop().map(|(_, schema)| schema)
    }

    fn push(&mut self, field: SchemaField) {
        if let Some((_, open)) = self.open.last_mut() {
            open.fields.push(field);
        }
    }
}
