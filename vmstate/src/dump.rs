//! The text of QEMU's `-dump-vmstate`.

use crate::json::JsonWriter;
use crate::schema::Schema;
use crate::state::VmState;

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
