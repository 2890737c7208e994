//! A dump of device state as declared: the JSON that QEMU writes for `-dump-vmstate`
//! (`migration/savevm.c`, `dump_vmstate_json_to_file`), read and checked.
//!
//! Unknown keys are passed over. Nesting is bounded by the JSON reader (128 levels, three of which
//! make one nested description), so what reads a [`Dump`] may descend without counting.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

/// The key under which the machine type stands among the devices.
const MACHINE: &str = "vmschkmachine";

/// The longest dump that is read from a file, bytes; QEMU 11.1's for x86 has one million.
const MAX_LENGTH: u64 = 64 << 20;

/// What the devices of a build declare of their state.
#[derive(Clone, Debug)]
pub struct Dump {
    machine: Option<String>,
    devices: Vec<(String, Device)>,
    counts_elements: bool,
}

/// What a kind of device declares.
#[derive(Clone, Debug, Deserialize)]
pub struct Device {
    #[serde(rename = "version_id")]
    version: i64,
    #[serde(rename = "minimum_version_id", default)]
    minimum_version: i64,
    #[serde(rename = "Description")]
    description: Option<Description>,
}

/// A description: fields and then subsections.
#[derive(Clone, Debug, Deserialize)]
pub struct Description {
    name: String,
    #[serde(rename = "version_id")]
    version: i64,
    #[serde(rename = "minimum_version_id", default)]
    minimum_version: i64,
    #[serde(rename = "Fields", default)]
    fields: Vec<Field>,
    #[serde(rename = "Subsections", default)]
    subsections: Vec<Self>,
}

/// A field of a description.
#[derive(Clone, Debug, Deserialize)]
pub struct Field {
    #[serde(rename = "field")]
    name: String,
    #[serde(rename = "version_id")]
    since: i64,
    #[serde(rename = "field_exists", default)]
    is_conditional: bool,
    size: u64,
    #[serde(rename = "num")]
    elements: Option<u64>,
    #[serde(rename = "Description")]
    structure: Option<Box<Description>>,
}

impl Dump {
    /// Reads the JSON text of a dump.
    ///
    /// # Errors
    /// It is not JSON, has not a dump's form, or names a kind of device twice.
    pub fn from_json(json: &[u8]) -> Result<Self, DumpError> {
        serde_json::from_slice(json).map_err(DumpError::Json)
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is longer than 64 MiB, or [`Dump::from_json`]'s.
    pub fn read(path: &Path) -> Result<Self, DumpError> {
        let of_file = |source| DumpError::File {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let read = || {
            let mut json = Vec::new();
            let mut file = File::open(path)?.take(MAX_LENGTH + 1);
            file.read_to_end(&mut json)?;
            Ok(json)
        };
        let json = read().map_err(|e| of_file(DumpError::Read(e)))?;
        if json.len() as u64 > MAX_LENGTH {
            return Err(of_file(DumpError::TooLong { max: MAX_LENGTH }));
        }
        Self::from_json(&json).map_err(of_file)
    }

    /// The machine type, if it is said.
    #[must_use]
    pub fn machine(&self) -> Option<&str> {
        self.machine.as_deref()
    }

    /// The kinds of device with what they declare, in the dump's order.
    pub fn devices(&self) -> impl Iterator<Item = (&str, &Device)> {
        self.devices.iter().map(|(name, device)| (&**name, device))
    }

    /// The kind of device called `name`.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices()
            .find_map(|(n, device)| (n == name).then_some(device))
    }

    /// Leaves only the kinds of device that `keep` names: a QEMU declares all that it was built
    /// with, a guest has few of them.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.devices.retain(|(name, _)| keep(name));
    }

    /// Whether it says of arrays how many elements they have. QEMU 10.0 does, 7.2 did not.
    #[must_use]
    pub const fn counts_elements(&self) -> bool {
        self.counts_elements
    }
}

impl Device {
    /// The version of its sections.
    #[must_use]
    pub const fn version(&self) -> i64 {
        self.version
    }

    /// The oldest version that it loads.
    #[must_use]
    pub const fn minimum_version(&self) -> i64 {
        self.minimum_version
    }

    /// Its state.
    #[must_use]
    pub const fn description(&self) -> Option<&Description> {
        self.description.as_ref()
    }
}

impl Description {
    /// The name, which for the outermost one and for subsections is in the stream.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version that is saved.
    #[must_use]
    pub const fn version(&self) -> i64 {
        self.version
    }

    /// The oldest version that is loaded.
    #[must_use]
    pub const fn minimum_version(&self) -> i64 {
        self.minimum_version
    }

    /// The fields, in the order of their bytes.
    #[must_use]
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The subsections, each of which may or may not be sent.
    #[must_use]
    pub fn subsections(&self) -> &[Self] {
        &self.subsections
    }

    fn counts_elements(&self) -> bool {
        self.fields.iter().any(|field| {
            field.elements.is_some()
                || field
                    .structure
                    .as_ref()
                    .is_some_and(|s| s.counts_elements())
        }) || self.subsections.iter().any(Self::counts_elements)
    }
}

impl Field {
    /// The name, which is not in the stream.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first version that has it, unless it is conditional.
    #[must_use]
    pub const fn since(&self) -> i64 {
        self.since
    }

    /// Whether a test of the device's decides if it is there, whatever the version.
    #[must_use]
    pub const fn is_conditional(&self) -> bool {
        self.is_conditional
    }

    /// Bytes of one element; of a structure, bytes in the program's memory.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// How many elements an array has that always has as many. `None` if it is no such array, or
    /// the dump does not say.
    #[must_use]
    pub const fn elements(&self) -> Option<u64> {
        self.elements
    }

    /// The description that it consists of.
    #[must_use]
    pub fn structure(&self) -> Option<&Description> {
        self.structure.as_deref()
    }

    /// Whether it is bytes without meaning, which stand for any others.
    pub(crate) fn is_unused(&self) -> bool {
        self.name == "unused"
    }

    /// Whether it is in a stream of `version`, as far as the version decides it.
    pub(crate) const fn is_in(&self, version: i64) -> bool {
        self.is_conditional || self.since <= version
    }

    /// Bytes of all elements of a plain field, as far as the dump says.
    pub(crate) fn bytes(&self) -> u64 {
        self.size.saturating_mul(self.elements.unwrap_or(1))
    }
}

/// What `vmstate` declares. It always says how many elements an array has.
impl TryFrom<&vmstate::Dump> for Dump {
    type Error = DumpError;

    fn try_from(declared: &vmstate::Dump) -> Result<Self, DumpError> {
        Ok(Self {
            counts_elements: true,
            ..Self::from_json(declared.to_json().as_bytes())?
        })
    }
}

impl<'de> Deserialize<'de> for Dump {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Members)
    }
}

/// The members of a dump, whose order is kept.
struct Members;

#[derive(Deserialize)]
struct Machine {
    #[serde(rename = "Name")]
    name: String,
}

impl<'de> Visitor<'de> for Members {
    type Value = Dump;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of kinds of device")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Dump, A::Error> {
        let mut machine = None;
        let mut devices: Vec<(String, Device)> = Vec::new();
        let mut names = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("'{name}' stands there twice")));
            }
            if name == MACHINE {
                machine = Some(map.next_value::<Machine>()?.name);
            } else {
                devices.push((name, map.next_value()?));
            }
        }
        let counts_elements = devices
            .iter()
            .filter_map(|(_, device)| device.description())
            .any(Description::counts_elements);
        Ok(Dump {
            machine,
            devices,
            counts_elements,
        })
    }
}

/// Why a dump cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    /// The file at fault.
    #[error("{}", .path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<DumpError>,
    },
    /// The file system's error.
    #[error("it cannot be read")]
    Read(#[source] std::io::Error),
    /// More than any dump has.
    #[error("it is longer than {max} bytes")]
    TooLong {
        /// The most that is read, bytes.
        max: u64,
    },
    /// No JSON, or not that of a dump.
    #[error("it is no dump of device state")]
    Json(#[source] serde_json::Error),
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn reason(json: &str) -> String {
        let error = Dump::from_json(json.as_bytes()).unwrap_err();
        error.source().unwrap().to_string()
    }

    #[test]
    fn what_qemu_writes_is_read_in_its_order_and_unknown_keys_are_passed_over() {
        let dump = Dump::from_json(
            br#"{
                "vmschkmachine": {"Name": "pc", "more": 1},
                "z": {"Name": "z", "version_id": 3, "minimum_version_id": 2, "new": [{}],
                    "Description": {"name": "zed", "version_id": 3, "minimum_version_id": 2, "x": 0,
                        "Fields": [{"field": "f", "version_id": 2, "field_exists": true, "num": 4,
                            "size": 2, "y": null}]}},
                "a": {"Name": "a", "version_id": 1}
            }"#,
        )
        .unwrap();
        assert_eq!(dump.machine(), Some("pc"));
        assert!(dump.counts_elements());
        let names: Vec<_> = dump.devices().map(|(name, _)| name).collect();
        assert_eq!(names, ["z", "a"]);
        let zed = dump.device("z").unwrap();
        assert_eq!((zed.version(), zed.minimum_version()), (3, 2));
        let zed = zed.description().unwrap();
        assert_eq!(
            (zed.name(), zed.version(), zed.minimum_version()),
            ("zed", 3, 2)
        );
        assert!(zed.subsections().is_empty());
        let field = &zed.fields()[0];
        assert_eq!((field.name(), field.since(), field.size()), ("f", 2, 2));
        assert!(field.is_conditional() && field.structure().is_none());
        assert_eq!((field.elements(), field.bytes()), (Some(4), 8));
        let a = dump.device("a").unwrap();
        assert!(a.description().is_none());
    }

    #[test]
    fn what_is_no_dump_is_refused_with_a_reason() {
        assert!(reason("[]").starts_with("invalid type: sequence, expected an object of kinds"));
        assert!(reason("{").starts_with("EOF"));
        assert!(reason(r#"{"a": {}}"#).starts_with("missing field `version_id`"));
        assert!(reason(r#"{"vmschkmachine": {}}"#).starts_with("missing field `Name`"));
        let twice = r#"{"a": {"version_id": 1}, "a": {"version_id": 1}}"#;
        assert!(reason(twice).starts_with("'a' stands there twice"));
        let negative = r#"{"a": {"version_id": 1, "Description": {"name": "a", "version_id": 1,
            "Fields": [{"field": "f", "version_id": 0, "size": -1}]}}}"#;
        assert!(reason(negative).starts_with("invalid value: integer `-1`, expected u64"));
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| {
            let open = r#"{"name": "d", "version_id": 1, "Fields": [{"field": "f", "version_id": 0,
                "size": 1, "Description": "#;
            format!(
                r#"{{"a": {{"version_id": 1, "Description": {}{}{} }} }}"#,
                open.repeat(depth),
                r#"{"name": "d", "version_id": 1}"#,
                "}]}".repeat(depth)
            )
        };
        assert!(Dump::from_json(nested(40).as_bytes()).is_ok());
        assert!(reason(&nested(50)).starts_with("recursion limit exceeded"));
        assert!(reason(&nested(100_000)).starts_with("recursion limit exceeded"));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = Dump::read(Path::new("no/such.json")).unwrap_err();
        assert_eq!(error.to_string(), "no/such.json");
        assert_eq!(error.source().unwrap().to_string(), "it cannot be read");
    }
}
