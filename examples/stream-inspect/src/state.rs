//! A stream as JSON, in the shapes of QEMU's `scripts/analyze-migration.py` (10.0) with `-d state`
//! and `-d desc`.

use migration_stream::{Escaped, SectionId};
use serde::{Deserialize, Serialize};
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Map, Value};

use tool_support::output::ascii_json;

use crate::fields::{FieldError, Fields, Layout};
use crate::inspection::{Device, Inspection, Section};

/// The layouts of a stream's devices.
#[derive(Debug)]
pub struct Layouts(Vec<DeviceLayout>);

#[derive(Debug, Deserialize)]
struct DeviceLayout {
    name: String,
    instance_id: u32,
    #[serde(flatten)]
    layout: Layout,
}

#[derive(Deserialize)]
struct Description {
    devices: Vec<DeviceLayout>,
}

impl Layouts {
    /// Those that a description gives.
    ///
    /// # Errors
    /// The text is no description, or there is none.
    pub fn of(inspection: &Inspection) -> Result<Self, StateError> {
        if inspection.description.is_empty() {
            return Err(StateError::NoDescription);
        }
        let description: Description = serde_json::from_str(&inspection.description)?;
        Ok(Self(description.devices))
    }

    /// The fields of a device.
    ///
    /// # Errors
    /// It is not described, or not as it is.
    pub fn fields(&self, device: &Device) -> Result<Fields, StateError> {
        let header = &device.header;
        let idstr = header.idstr.as_str();
        let layout = self
            .0
            .iter()
            .find(|l| l.name == idstr && l.instance_id == header.instance.0)
            .ok_or_else(|| StateError::NotDescribed {
                idstr: idstr.to_owned(),
                instance: header.instance.0,
            })?;
        layout
            .layout
            .read(&device.body)
            .map_err(|source| StateError::Device {
                idstr: idstr.to_owned(),
                instance: header.instance.0,
                source,
            })
    }
}

/// What the script prints with `-d state`: for RAM its blocks and their lengths, for each device its
/// fields.
///
/// # Errors
/// [`StateError`].
pub fn state(inspection: &Inspection) -> Result<Value, StateError> {
    let layouts = Layouts::of(inspection)?;
    let mut all = Map::new();
    for section in &inspection.sections {
        let (key, value) = match section {
            Section::Ram(id) => (key("ram", *id), ram(inspection)),
            Section::Device(device) => (
                key(device.header.idstr.as_str(), device.header.id),
                layouts.fields(device)?.state,
            ),
        };
        all.insert(key, value);
    }
    Ok(Value::Object(all))
}

/// What the script prints with `-d desc`: the description.
///
/// # Errors
/// There is none.
pub fn description(inspection: &Inspection) -> Result<Value, StateError> {
    if inspection.description.is_empty() {
        return Err(StateError::NoDescription);
    }
    Ok(serde_json::from_str(&inspection.description)?)
}

/// JSON as the script writes it, indented by four, in ASCII.
///
/// # Errors
/// None that a value could cause.
pub fn text(value: &Value) -> Result<String, StateError> {
    let mut bytes = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(ascii_json(&String::from_utf8_lossy(&bytes)))
}

fn key(idstr: &str, id: SectionId) -> String {
    format!("{idstr} ({})", id.0)
}

fn ram(inspection: &Inspection) -> Value {
    let sizes: Map<String, Value> = inspection
        .blocks
        .iter()
        .map(|b| {
            let length = format!("0x{:016x}", b.block.used_length());
            (b.block.name().to_owned(), length.into())
        })
        .collect();
    [("section sizes".to_owned(), Value::Object(sizes))]
        .into_iter()
        .collect()
}

/// Why a stream's devices could not be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The source sends none.
    #[error(
        "the stream has no description of its devices (the source's machine has suppress-vmdesc)"
    )]
    NoDescription,
    /// The description is not of the shape expected.
    #[error("the description of the devices")]
    Description(#[from] serde_json::Error),
    /// A section that the description does not know.
    #[error("section '{idstr}' instance {instance} is not described", idstr = Escaped(.idstr))]
    NotDescribed {
        /// The device.
        idstr: String,
        /// Which one of that idstr.
        instance: u32,
    },
    /// A section is not as described.
    #[error("section '{idstr}' instance {instance}", idstr = Escaped(.idstr))]
    Device {
        /// The device.
        idstr: String,
        /// Which one of that idstr.
        instance: u32,
        /// What is wrong.
        source: FieldError,
    },
}
