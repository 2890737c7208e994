//! What a state may consist of, whatever a value of it contains: the description as declared, and
//! the text of QEMU's `-dump-vmstate`.

use std::any::type_name;

use crate::field::{Field, FieldType};
use crate::json::JsonWriter;
use crate::nested::Nested;
use crate::pointee::Pointee;
use crate::spec::FieldSpec;
use crate::{Reader, VmState};

/// A description as declared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    name: &'static str,
    version: u32,
    minimum_version: u32,
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
    /// The description of `T`.
    #[must_use]
    pub fn of<T: VmState>() -> Self {
        SchemaBuilder { open: Vec::new() }
            .build::<T>()
            .unwrap_or_else(|| Self::empty::<T>())
    }

    const fn empty<T: VmState>() -> Self {
        Self {
            name: T::NAME,
            version: T::VERSION,
            minimum_version: T::MINIMUM_VERSION,
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

    fn members(&self, json: &mut JsonWriter) {
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
#[derive(Debug)]
pub struct SchemaBuilder {
    /// The descriptions being taken down, innermost last, with their Rust types: a type that
    /// contains itself is described once.
    open: Vec<(&'static str, Schema)>,
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
        if let Some(schema) = self.build::<T>()
            && let Some((_, parent)) = self.open.last_mut()
        {
            parent.subsections.push(schema);
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

    /// A field of a type that has `size` bytes, of an array for each element.
    fn plain(&mut self, spec: FieldSpec, since: u32, field_type: FieldType, size: usize) {
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

    fn push(&mut self, field: SchemaField) {
        if let Some((_, open)) = self.open.last_mut() {
            open.fields.push(field);
        }
    }

    fn build<T: VmState>(&mut self) -> Option<Schema> {
        let this = type_name::<T>();
        if self.open.len() == Reader::MAX_DEPTH || self.open.iter().any(|(open, _)| *open == this) {
            return None;
        }
        self.open.push((this, Schema::empty::<T>()));
        T::describe(self);
        self.open.pop().map(|(_, schema)| schema)
    }
}

/// Descriptions as declared, in the shape of QEMU's `-dump-vmstate`: what a newer build can be
/// held against, to see whether it still loads the streams of this one.
///
/// ```
/// use vmstate::{Dump, VmState};
///
/// #[derive(VmState)]
/// #[vmstate(name = "pit", version = 3, minimum_version = 2)]
/// struct Pit {
///     count: u32,
/// }
///
/// let dump = Dump::new("board-1").section::<Pit>("pit").to_json();
/// assert!(dump.starts_with(r#"{"vmschkmachine": {"Name": "board-1"}, "pit": {"Name": "pit""#));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump {
    machine: String,
    sections: Vec<(String, Schema)>,
}

impl Dump {
    /// The dump of a machine without devices.
    pub fn new(machine: impl Into<String>) -> Self {
        Self {
            machine: machine.into(),
            sections: Vec::new(),
        }
    }

    /// Adds a kind of device, by the name that stands for it in the dump.
    #[must_use]
    pub fn section<T: VmState>(mut self, device: impl Into<String>) -> Self {
        self.sections.push((device.into(), Schema::of::<T>()));
        self
    }

    /// The JSON text.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut json = JsonWriter::default();
        json.object(|json| {
            json.key("vmschkmachine")
                .object(|json| json.key("Name").string(&self.machine));
            for (device, schema) in &self.sections {
                json.key(device).object(|json| {
                    json.key("Name").string(device);
                    json.key("version_id").number(schema.version);
                    json.key("minimum_version_id")
                        .number(schema.minimum_version);
                    json.key("Description").object(|json| schema.members(json));
                });
            }
        });
        json.finish()
    }
}
