//! What a comparison finds.

use std::fmt;

use serde::ser::{Serialize, SerializeMap, Serializer};
use tool_support::Escaped;

/// One difference that matters to streams, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The kind of device, by the source's name; `None` if it is about the whole dump.
    pub device: Option<String>,
    /// The way from the device to the place, outermost first, in the source's names.
    pub path: Vec<Step>,
    /// What differs there.
    pub difference: Difference,
}

/// A step on the way to a place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// A description, of the device or of a field.
    Description(String),
    /// A subsection.
    Subsection(String),
    /// A field.
    Field(String),
}

/// Whether a finding stands against loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Streams load or not, depending on what no dump says.
    Warning,
    /// A stream that has this does not load.
    Error,
}

/// What differs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Difference {
    /// The machine types have different names. Dumps of the same build differ in nothing else, so
    /// this is a hint at the wrong files.
    Machine {
        /// The source's.
        source: String,
        /// The destination's.
        destination: String,
    },
    /// Only one dump says how many elements arrays have; the numbers are not compared.
    ElementsUnknown,
    /// The destination does not have the kind of device.
    DeviceMissing,
    /// The destination says nothing of the device's state.
    DescriptionMissing,
    /// The outermost descriptions have different names, and so have their sections in the stream.
    DescriptionName {
        /// The destination's.
        destination: String,
    },
    /// The source's version is newer than any that the destination loads.
    VersionTooNew {
        /// The source's.
        source: i64,
        /// The destination's.
        destination: i64,
    },
    /// The source's version is older than any that the destination loads.
    VersionTooOld {
        /// The source's.
        source: i64,
        /// The oldest that the destination loads.
        minimum: i64,
    },
    /// Where the source sends this field, the destination reads another one. The rest of the fields
    /// is not compared.
    FieldName {
        /// The destination's.
        destination: String,
    },
    /// The destination has read everything before this field. The rest is not compared.
    FieldNotRead,
    /// The source has sent everything before this field of the destination's. The rest is not
    /// compared.
    FieldNotSent,
    /// The destination may read this field, which the source does not send: a test of the
    /// destination's decides it.
    FieldMayBeRead,
    /// A test decides if the field is there, but on one side only.
    FieldCondition {
        /// Whether it is the source that has the test.
        source: bool,
    },
    /// The field has another number of bytes.
    FieldSize {
        /// In the source, bytes.
        source: u64,
        /// In the destination, bytes.
        destination: u64,
    },
    /// An array of structures has another number of elements.
    FieldElements {
        /// In the source; `None` if it is none, or one of a varying number.
        source: Option<u64>,
        /// In the destination.
        destination: Option<u64>,
    },
    /// The field consists of fields on one side only.
    FieldStructure {
        /// Whether it is the source where it does.
        source: bool,
    },
    /// Bytes that are unused on one side end within a field of the other. The rest is not compared.
    UnusedSize,
    /// The destination does not know the subsection.
    SubsectionMissing,
}

impl Difference {
    /// Whether it stands against loading.
    #[must_use]
    pub const fn severity(&self) -> Severity {
        match self {
            Self::Machine { .. }
            | Self::ElementsUnknown
            | Self::FieldMayBeRead
            | Self::FieldCondition { .. } => Severity::Warning,
            Self::DeviceMissing
            | Self::DescriptionMissing
            | Self::DescriptionName { .. }
            | Self::VersionTooNew { .. }
            | Self::VersionTooOld { .. }
            | Self::FieldName { .. }
            | Self::FieldNotRead
            | Self::FieldNotSent
            | Self::FieldSize { .. }
            | Self::FieldElements { .. }
            | Self::FieldStructure { .. }
            | Self::UnusedSize
            | Self::SubsectionMissing => Severity::Error,
        }
    }
}

impl Finding {
    /// Whether it stands against loading.
    #[must_use]
    pub const fn severity(&self) -> Severity {
        self.difference.severity()
    }
}

/// Whether nothing among the findings stands against loading.
#[must_use]
pub fn is_compatible(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.severity() == Severity::Warning)
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Description(name) => f.write_str(name),
            Self::Subsection(name) => write!(f, "subsection {name}"),
            Self::Field(name) => write!(f, "field {name}"),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elements = |count: &Option<u64>| match count {
            Some(count) => format!("{count} elements"),
            None => "no fixed number of elements".to_owned(),
        };
        match self {
            Self::Machine {
                source,
                destination,
            } => write!(f, "machine {source} in the source, {destination} in the destination"),
            Self::ElementsUnknown => f.write_str(
                "only one dump says how many elements arrays have: the numbers are not compared",
            ),
            Self::DeviceMissing => f.write_str("the destination has no such device"),
            Self::DescriptionMissing => f.write_str("the destination does not describe its state"),
            Self::DescriptionName { destination } => {
                write!(f, "the destination's is called {destination}")
            }
            Self::VersionTooNew {
                source,
                destination,
            } => write!(
                f,
                "version {source} in the source is newer than the destination's {destination}"
            ),
            Self::VersionTooOld { source, minimum } => write!(
                f,
                "version {source} in the source is older than {minimum}, the oldest that the destination loads"
            ),
            Self::FieldName { destination } => write!(
                f,
                "the destination reads {destination} here; the rest is not compared"
            ),
            Self::FieldNotRead => {
                f.write_str("the destination reads nothing more; the rest is not compared")
            }
            Self::FieldNotSent => {
                f.write_str("the destination reads it, the source sends nothing more")
            }
            Self::FieldMayBeRead => {
                f.write_str("the destination reads it if its test says so, the source does not send it")
            }
            Self::FieldCondition { source } => write!(
                f,
                "whether it is there is decided by a test, but only in the {}",
                side(*source)
            ),
            Self::FieldSize {
                source,
                destination,
            } => write!(
                f,
                "{source} bytes in the source, {destination} in the destination"
            ),
            Self::FieldElements {
                source,
                destination,
            } => write!(
                f,
                "{} in the source, {} in the destination",
                elements(source),
                elements(destination)
            ),
            Self::FieldStructure { source } => {
                write!(f, "only in the {} does it consist of fields", side(*source))
            }
            Self::UnusedSize => f.write_str(
                "unused bytes of the one side end within a field of the other; the rest is not compared",
            ),
            Self::SubsectionMissing => f.write_str("the destination does not know it"),
        }
    }
}

const fn side(source: bool) -> &'static str {
    if source { "source" } else { "destination" }
}

impl fmt::Display for Finding {
    /// Writes one line. Names come out of the dumps and are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.severity())?;
        if let Some(device) = &self.device {
            write!(f, "{}", Escaped(device))?;
            for step in &self.path {
                write!(f, " > {}", Escaped(&step.to_string()))?;
            }
            f.write_str(": ")?;
        }
        write!(f, "{}", Escaped(&self.difference.to_string()))
    }
}

impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("severity", &self.severity())?;
        map.serialize_entry("device", &self.device)?;
        map.serialize_entry("path", &self.path)?;
        map.serialize_entry("difference", &self.difference)?;
        map.serialize_entry("message", &self.difference.to_string())?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding() -> Finding {
        Finding {
            device: Some("usb-kbd".into()),
            path: vec![
                Step::Description("usb-kbd".into()),
                Step::Subsection("usb-kbd/leds".into()),
                Step::Field("codes".into()),
            ],
            difference: Difference::FieldSize {
                source: 4,
                destination: 2,
            },
        }
    }

    #[test]
    fn a_finding_is_one_line_with_its_place() {
        assert_eq!(
            finding().to_string(),
            "error: usb-kbd > usb-kbd > subsection usb-kbd/leds > field codes: \
             4 bytes in the source, 2 in the destination"
        );
    }

    #[test]
    fn a_finding_is_an_object_for_programs() {
        assert_eq!(
            serde_json::to_value(finding()).unwrap(),
            serde_json::json!({
                "severity": "error",
                "device": "usb-kbd",
                "path": [
                    {"description": "usb-kbd"},
                    {"subsection": "usb-kbd/leds"},
                    {"field": "codes"},
                ],
                "difference": {"kind": "field-size", "source": 4, "destination": 2},
                "message": "4 bytes in the source, 2 in the destination",
            })
        );
    }

    #[test]
    fn warnings_do_not_stand_against_loading() {
        let warning = Finding {
            difference: Difference::ElementsUnknown,
            ..finding()
        };
        assert!(is_compatible(&[]));
        assert!(is_compatible(std::slice::from_ref(&warning)));
        assert!(!is_compatible(&[warning, finding()]));
    }
}
