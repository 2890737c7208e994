//! The description of the device sections: JSON after a stream's end (`migration/vmstate.c`,
//! QEMU 11.1). It names them in their order and says how long each field is, which is the only
//! place where the length of a section can be learned without knowing its device.

use serde::Deserialize;

use crate::{IdStr, IdStrError, InstanceId};

/// What a description says of the sections' frames. The fields' names and types stay in the JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDescription {
    /// The target's page size, bytes.
    pub page_size: u64,
    /// The FULL sections, in the order of the stream.
    pub devices: Vec<DeviceDescription>,
}

/// What a description says of one FULL section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceDescription {
    /// Its idstr.
    pub idstr: IdStr,
    /// Its instance id.
    pub instance: InstanceId,
    /// Its version; absent for handlers that describe no fields.
    pub version: Option<u32>,
    /// The length of its body, bytes, summed up over fields and subsections. It is not exact where
    /// an array of unlike elements is described by its first one.
    pub body_len: u64,
}

impl VmDescription {
    /// Reads a description. What it takes up is in proportion to the text, whose length is the
    /// caller's to bound.
    ///
    /// # Errors
    /// The text is no description.
    pub fn parse(json: &[u8]) -> Result<Self, DescriptionError> {
        let raw: Raw = serde_json::from_slice(json)?;
        let devices = raw
            .devices
            .into_iter()
            .map(|device| {
                let idstr = IdStr::new(device.name).map_err(DescriptionError::Name)?;
                let body_len = device
                    .fields
                    .len()
                    .zip(len_of_subsections(&device.subsections))
                    .and_then(|(fields, subsections)| fields.checked_add(subsections));
                match body_len {
                    Some(body_len) => Ok(DeviceDescription {
                        idstr,
                        instance: InstanceId(device.instance_id),
                        version: device.version,
                        body_len,
                    }),
                    None => Err(DescriptionError::Length { idstr }),
                }
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            page_size: raw.page_size,
            devices,
        })
    }
}

#[derive(Deserialize)]
struct Raw {
    page_size: u64,
    devices: Vec<RawDevice>,
}

#[derive(Deserialize)]
struct RawDevice {
    name: String,
    instance_id: u32,
    version: Option<u32>,
    #[serde(default)]
    fields: RawFields,
    #[serde(default)]
    subsections: Vec<RawSubsection>,
}

#[derive(Deserialize)]
struct RawSubsection {
    vmsd_name: String,
    #[serde(default)]
    fields: RawFields,
    #[serde(default)]
    subsections: Vec<RawSubsection>,
}

#[derive(Default, Deserialize)]
struct RawFields(Vec<RawField>);

#[derive(Deserialize)]
struct RawField {
    /// Bytes of one element; of a structure with all that is in it.
    size: u64,
    array_len: Option<u64>,
}

impl RawFields {
    fn len(&self) -> Option<u64> {
        self.0.iter().try_fold(0u64, |sum, field| {
            sum.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?)
        })
    }
}

/// Each has a type byte, a counted name and a be32 version before its fields.
fn len_of_subsections(subsections: &[RawSubsection]) -> Option<u64> {
    subsections.iter().try_fold(0u64, |sum, s| {
        let head = 2 + s.vmsd_name.len() as u64 + 4;
        sum.checked_add(head)?
            .checked_add(s.fields.len()?)?
            .checked_add(len_of_subsections(&s.subsections)?)
    })
}

/// Why a text is no description.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptionError {
    /// It is not JSON of the shape expected.
    #[error("vm description is not the json expected")]
    Json(#[from] serde_json::Error),
    /// A device's name is no idstr.
    #[error("vm description has a device without a proper name")]
    Name(#[source] IdStrError),
    /// The lengths of a device's fields do not add up within 64 bits.
    #[error("vm description: device '{idstr}' is longer than 64 bits can say")]
    Length {
        /// The device.
        idstr: IdStr,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_add_up_over_fields_arrays_and_subsections() {
        let json =
            br#"{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": []},
            "page_size": 4096, "devices": [
            {"name": "cpu", "instance_id": 1, "vmsd_name": "cpu", "version": 12, "fields": [
                {"name": "env.regs", "array_len": 16, "type": "uint64", "size": 8},
                {"name": "env.eip", "type": "struct", "struct": {"vmsd_name": "x", "version": 1,
                    "fields": [{"name": "y", "type": "uint64", "size": 8}]}, "size": 8}],
             "subsections": [{"vmsd_name": "cpu/msr", "version": 1,
                "fields": [{"name": "msr", "type": "uint64", "size": 8}]}]},
            {"name": "old", "instance_id": 0, "size": 5,
             "fields": [{"name": "data", "size": 5, "type": "buffer"}]}]}"#;
        let device = |name, instance, version, body_len| DeviceDescription {
            idstr: IdStr::new(name).unwrap(),
            instance: InstanceId(instance),
            version,
            body_len,
        };
        assert_eq!(
            VmDescription::parse(json).unwrap(),
            VmDescription {
                page_size: 4096,
                devices: vec![
                    device("cpu", 1, Some(12), 16 * 8 + 8 + 2 + 7 + 4 + 8),
                    device("old", 0, None, 5)
                ],
            }
        );
    }

    #[test]
    fn what_is_no_description_is_refused() {
        for json in [
            "",
            "{}",
            "[]",
            r#"{"page_size": 4096, "devices": 1}"#,
            r#"{"page_size": 4096, "devices": [{"name": "", "instance_id": 0}]}"#,
            r#"{"page_size": 4096, "devices": [{"name": "a", "instance_id": -1}]}"#,
            r#"{"page_size": 4096, "devices": [{"name": "a", "instance_id": 0,
                "fields": [{"size": 18446744073709551615, "array_len": 2}]}]}"#,
        ] {
            assert!(VmDescription::parse(json.as_bytes()).is_err(), "{json}");
        }
        // Nesting is bounded: the stack is not the peer's to use up.
        let deep = "[".repeat(100_000);
        assert!(VmDescription::parse(deep.as_bytes()).is_err());
    }
}
