//! What a section consists of: the self-description that follows a stream.
//!
//! It is noted while the state is written, so that it says what is there rather than what should
//! be. The text is QEMU's vmdesc JSON, which `analyze-migration.py` reads.

use crate::field_type::FieldType;
use crate::json::JsonWriter;
use crate::spec::FieldSpec;

/// The self-description of a stream: its text goes into the VMDESCRIPTION section after the end of
/// the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmdesc {
    configuration: Option<Description>,
    devices: Vec<DeviceDescription>,
}

impl Vmdesc {
    pub(crate) const fn new(devices: Vec<DeviceDescription>) -> Self {
        Self {
            configuration: None,
            devices,
        }
    }

    /// Adds what the configuration section at the start of the stream consists of.
    #[must_use]
    pub fn with_configuration(mut self, configuration: Description) -> Self {
        self.configuration = Some(configuration);
        self
    }

    /// Puts the sections of `early` before these: what was sent when the migration was set up.
    #[must_use]
    pub fn after(mut self, early: Self) -> Self {
        let later = std::mem::replace(&mut self.devices, early.devices);
        self.devices.extend(later);
        self
    }

    /// The JSON text. `page_size` is that of the guest, in bytes.
    #[must_use]
    pub fn to_json(&self, page_size: u64) -> String {
        let mut json = JsonWriter::default();
        json.object(|json| {
            if let Some(configuration) = &self.configuration {
                json.key("configuration")
                    .object(|json| configuration.members(json));
            }
            json.key("page_size").number(page_size);
            json.key("devices").array(&self.devices, |json, device| {
                json.object(|json| {
                    json.key("name").string(&device.idstr);
                    json.key("instance_id").number(device.instance_id);
                    device.description.members(json);
                });
            });
        });
        json.finish()
    }
}

/// What the section of one device consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceDescription {
    pub(crate) idstr: String,
    pub(crate) instance_id: u32,
    pub(crate) description: Description,
}

/// What was written for one description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub(crate) name: String,
    pub(crate) version: u32,
    pub(crate) fields: Vec<FieldDescription>,
    pub(crate) subsections: Vec<Self>,
}

impl Description {
    pub(crate) fn new(name: &str, version: u32) -> Self {
        Self {
            name: name.to_owned(),
            version,
            fields: Vec::new(),
            subsections: Vec::new(),
        }
    }

    fn members(&self, json: &mut JsonWriter) {
        json.key("vmsd_name").string(&self.name);
        json.key("version").number(self.version);
        json.key("fields")
            .array(&self.fields, |json, field| field.object(json));
        if !self.subsections.is_empty() {
            json.key("subsections")
                .array(&self.subsections, |json, subsection| {
                    json.object(|json| subsection.members(json));
                });
        }
    }
}

/// What was written for one field, or for some elements of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FieldDescription {
    name: &'static str,
    type_name: &'static str,
    /// How many elements this stands for, all alike.
    array_len: usize,
    structure: Structure,
    /// Bytes of one element.
    size: usize,
}

/// The description inside a field.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Structure {
    None,
    /// A member `struct` of the field.
    Member(Description),
    /// Its members are the field's own: so QEMU describes what it writes by a type of its own.
    Inline(Description),
}

impl FieldDescription {
    fn object(&self, json: &mut JsonWriter) {
        json.object(|json| {
            json.key("name").string(self.name);
            if self.array_len > 1 {
                json.key("array_len").number(as_u64(self.array_len));
            }
            json.key("type").string(self.type_name);
            match &self.structure {
                Structure::None => {}
                Structure::Member(description) => {
                    json.key("struct").object(|json| description.members(json))
                }
                Structure::Inline(description) => description.members(json),
            }
            json.key("size").number(as_u64(self.size));
        });
    }

    /// A plain field of `bytes` bytes in all: nothing for a list without elements, one entry for
    /// elements that are alike, else one for each.
    pub(crate) fn of_plain(
        spec: FieldSpec,
        field_type: FieldType,
        bytes: usize,
    ) -> impl Iterator<Item = Self> {
        let described = spec.described(field_type, bytes);
        let elements = described.elements.unwrap_or(1);
        let (entries, array_len) = match elements {
            0 => (0, 0),
            n if spec.is_tested() => (n, 1),
            n => (1, n),
        };
        let entry = Self {
            name: spec.name(),
            type_name: described.name,
            array_len,
            structure: Structure::None,
            size: bytes.checked_div(elements).unwrap_or(0),
        };
        std::iter::repeat_n(entry, entries)
    }

    /// The marker of a pointer.
    pub(crate) const fn of_marker(spec: FieldSpec) -> Self {
        Self {
            name: spec.name(),
            type_name: "ptr-marker",
            array_len: 1,
            structure: Structure::None,
            size: 1,
        }
    }

    pub(crate) const fn of_struct(spec: FieldSpec, structure: Description, size: usize) -> Self {
        Self {
            name: spec.name(),
            type_name: "struct",
            array_len: 1,
            structure: Structure::Member(structure),
            size,
        }
    }

    /// A field that writes descriptions under a type of its own, of which the last one is told.
    pub(crate) fn of_inline(
        spec: FieldSpec,
        type_name: &'static str,
        structure: Option<Description>,
        size: usize,
    ) -> Self {
        Self {
            name: spec.name(),
            type_name,
            array_len: 1,
            structure: structure.map_or(Structure::None, Structure::Inline),
            size,
        }
    }

    /// Puts runs of equal entries together, as QEMU does where a description allows for it.
    pub(crate) fn compressed(entries: Vec<Self>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for entry in entries {
            match runs.last_mut() {
                Some(run)
                    if (run.size, run.type_name) == (entry.size, entry.type_name)
                        && run.structure == entry.structure =>
                {
                    run.array_len += 1;
                }
                _ => runs.push(entry),
            }
        }
        runs
    }
}

/// `usize` has at most 64 bits wherever there is a VMM.
const fn as_u64(n: usize) -> u64 {
    n as u64
}
