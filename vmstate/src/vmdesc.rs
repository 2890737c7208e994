//! What a section consists of: the self-description that follows a stream.
//!
//! It is noted while the state is written, so that it says what is there rather than what should
//! be. The text is QEMU's vmdesc JSON, which `analyze-migration.py` reads.

use crate::field::FieldType;
use crate::json::JsonWriter;

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

/// What was written for one field, or for one element of an array whose elements differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FieldDescription {
    name: &'static str,
    type_name: &'static str,
    array_len: Option<usize>,
    index: Option<usize>,
    structure: Option<Description>,
    /// Bytes of one element.
    size: usize,
}

impl FieldDescription {
    fn object(&self, json: &mut JsonWriter) {
        json.object(|json| {
            json.key("name").string(self.name);
            if let Some(len) = self.array_len {
                json.key("array_len").number(as_u64(len));
            }
            if let Some(index) = self.index {
                json.key("index").number(as_u64(index));
            }
            json.key("type").string(self.type_name);
            if let Some(structure) = &self.structure {
                json.key("struct").object(|json| structure.members(json));
            }
            json.key("size").number(as_u64(self.size));
        });
    }

    /// A plain field of `bytes` bytes in all; none for a list without elements.
    pub(crate) fn of_plain(
        name: &'static str,
        field_type: FieldType,
        bytes: usize,
    ) -> Option<Self> {
        let size = match field_type.elements {
            Some(n) => bytes.checked_div(n)?,
            None => bytes,
        };
        Some(Self {
            name,
            type_name: field_type.name,
            array_len: field_type.elements,
            index: None,
            structure: None,
            size,
        })
    }

    pub(crate) const fn of_struct(name: &'static str, structure: Description, size: usize) -> Self {
        Self {
            name,
            type_name: "struct",
            array_len: None,
            index: None,
            structure: Some(structure),
            size,
        }
    }

    /// An array of descriptions: one entry for all if they are alike, else one for each.
    pub(crate) fn of_structs(
        name: &'static str,
        mut written: Vec<(Description, usize)>,
    ) -> Vec<Self> {
        let len = written.len();
        if written.windows(2).all(|pair| pair[0] == pair[1]) {
            return written
                .pop()
                .map(|(structure, size)| Self {
                    array_len: Some(len),
                    ..Self::of_struct(name, structure, size)
                })
                .into_iter()
                .collect();
        }
        written
            .into_iter()
            .enumerate()
            .map(|(index, (structure, size))| Self {
                index: Some(index),
                ..Self::of_struct(name, structure, size)
            })
            .collect()
    }
}

/// `usize` has at most 64 bits wherever there is a VMM.
const fn as_u64(n: usize) -> u64 {
    n as u64
}
