//! The fields of a device, by their names: its section is read along its description (wire-format of
//! `migration/vmstate.c`; the result has the shape that `scripts/analyze-migration.py` of QEMU 10.0
//! gives it).
//!
//! | type | becomes |
//! |---|---|
//! | `uint8` … `uint64`, `uint32 equal` | `"0x…"`, all digits |
//! | `int8` … `int64`, `int32 le`, the other `… equal` | the same, and a negative one `"0x… (-n)"` |
//! | `bool` | true or false |
//! | `nullptr` | `"nullptr"` |
//! | `struct` | an object |
//! | anything else | its bytes, `"0a 0b"` |
//!
//! Fields of one name become a list. A subsection is an object under its own name, behind the fields.

use migration_stream::raw::codec::Reader;
use serde::Deserialize;
use serde_json::{Map, Value};

/// More fields than any device has; with it what a description can make us hold is bounded.
pub const MAX_FIELDS: usize = 1 << 20;

const SUBSECTION: u8 = 5;

/// What a description says of a device, a structure or a subsection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Layout {
    #[serde(default)]
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Layout>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Field {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    size: u64,
    array_len: Option<u64>,
    #[serde(rename = "struct")]
    structure: Option<Layout>,
}

/// The fields of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Fields {
    /// An object: names and values.
    pub state: Value,
    /// How many there are; elements of arrays, structures and what is in them count each.
    pub count: usize,
}

impl Layout {
    /// Reads the body of a section, all of it.
    ///
    /// # Errors
    /// The body is not as described.
    pub fn read(&self, body: &[u8]) -> Result<Fields, FieldError> {
        let mut walk = Walk {
            r: Reader::new(body, 0),
            path: Vec::new(),
            count: 0,
        };
        let state = walk.layout(self)?;
        match walk.r.rest().len() {
            0 => Ok(Fields {
                state: Value::Object(state),
                count: walk.count,
            }),
            len => Err(walk.error(Mismatch::Rest { len })),
        }
    }
}

struct Walk<'a, 'd> {
    r: Reader<'a>,
    /// The names of what is being read, from the outside.
    path: Vec<&'d str>,
    count: usize,
}

impl<'a, 'd> Walk<'a, 'd> {
    fn layout(&mut self, layout: &'d Layout) -> Result<Map<String, Value>, FieldError> {
        let mut values = Map::new();
        for field in &layout.fields {
            self.path.push(&field.name);
            for _ in 0..field.array_len.unwrap_or(1) {
                let value = self.field(field)?;
                add(&mut values, &field.name, value);
            }
            self.path.pop();
        }
        for subsection in &layout.subsections {
            self.path.push(&subsection.vmsd_name);
            let value = self.subsection(subsection)?;
            values.insert(subsection.vmsd_name.clone(), value);
            self.path.pop();
        }
        Ok(values)
    }

    fn field(&mut self, field: &'d Field) -> Result<Value, FieldError> {
        self.count += 1;
        if self.count > MAX_FIELDS {
            return Err(self.error(Mismatch::TooMany));
        }
        if let ("struct", Some(layout)) = (field.kind.as_str(), &field.structure) {
            return Ok(Value::Object(self.layout(layout)?));
        }
        let bytes = self.take(field.size)?;
        let text = match field.kind.as_str() {
            "bool" => {
                let Some(value) = bytes.first() else {
                    return Err(self.error(Mismatch::Size { size: field.size }));
                };
                return Ok(Value::Bool(*value != 0));
            }
            "uint8" | "uint16" | "uint32" | "uint32 equal" | "uint64" => number(bytes),
            "int8" | "int16" | "int32" | "int32 equal" | "int32 le" | "int64" | "int64 equal"
            | "uint8 equal" | "uint16 equal" => match negative(bytes) {
                Some(value) => format!("{} ({value})", number(bytes)),
                None => number(bytes),
            },
            "nullptr" => match bytes {
                b"0" => "nullptr".to_owned(),
                _ => return Err(self.error(Mismatch::Marker { found: dump(bytes) })),
            },
            _ => dump(bytes),
        };
        Ok(Value::String(text))
    }

    fn subsection(&mut self, layout: &'d Layout) -> Result<Value, FieldError> {
        let name = if self.take(1)? == [SUBSECTION] {
            let [length] = *self.take(1)? else {
                return Err(self.error(Mismatch::Cut { wanted: 1 }));
            };
            self.take(length.into())?
        } else {
            b""
        };
        if name != layout.vmsd_name.as_bytes() {
            return Err(self.error(Mismatch::Subsection {
                found: String::from_utf8_lossy(name).into_owned(),
            }));
        }
        let _version = self.take(4)?;
        Ok(Value::Object(self.layout(layout)?))
    }

    fn take(&mut self, size: u64) -> Result<&'a [u8], FieldError> {
        let len = usize::try_from(size).ok();
        let here = len.and_then(|len| self.r.take(len).ok());
        here.ok_or_else(|| self.error(Mismatch::Cut { wanted: size }))
    }

    fn error(&self, mismatch: Mismatch) -> FieldError {
        FieldError {
            path: self.path.join("."),
            offset: self.r.consumed(),
            mismatch,
        }
    }
}

/// Adds a value to those of its name.
fn add(values: &mut Map<String, Value>, name: &str, value: Value) {
    match values.get_mut(name) {
        None => {
            values.insert(name.to_owned(), value);
        }
        // Nothing but what was added here is a list.
        Some(Value::Array(list)) => list.push(value),
        Some(first) => {
            let list = vec![first.take(), value];
            *first = Value::Array(list);
        }
    }
}

fn number(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    format!("0x{digits}")
}

/// The number in `bytes`, if it is one below zero.
fn negative(bytes: &[u8]) -> Option<i128> {
    let first = *bytes.first()?;
    let fits = bytes.len() < size_of::<i128>();
    (first >= 0x80 && fits).then(|| bytes.iter().fold(-1, |n, b| n << 8 | i128::from(*b)))
}

fn dump(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    digits.join(" ")
}

/// Why a section cannot be read along its description.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field '{path}' at byte {offset:#x} of the section: {mismatch}", path = tool_support::Escaped(.path))]
pub struct FieldError {
    /// The names of the field and of what it is in, with dots between them.
    pub path: String,
    /// Where in the section's body, bytes.
    pub offset: usize,
    /// What is wrong.
    pub mismatch: Mismatch,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// The section ends before the field does.
    #[error("{wanted} bytes described, and the section ends before that")]
    Cut {
        /// Length of the field, bytes.
        wanted: u64,
    },
    /// The section goes on behind its last field.
    #[error("{len} bytes of the section are not described")]
    Rest {
        /// How many bytes.
        len: usize,
    },
    /// Something else stands where a subsection is described.
    #[error("the subsection of this name expected, found '{found}'", found = tool_support::Escaped(.found))]
    Subsection {
        /// The name that is there, if there is a subsection.
        found: String,
    },
    /// Something else than the marker of a pointer that is null.
    #[error("marker 30 of a pointer that is null expected, found '{found}'", found = tool_support::Escaped(.found))]
    Marker {
        /// What is there.
        found: String,
    },
    /// No field of that type can have that length.
    #[error("a bool of {size} bytes")]
    Size {
        /// The length described, bytes.
        size: u64,
    },
    /// More fields than any device has.
    #[error("more than {MAX_FIELDS} fields")]
    TooMany,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(layout: &Value, body: &[u8]) -> Result<Value, FieldError> {
        let layout: Layout = serde_json::from_value(layout.clone()).unwrap();
        layout.read(body).map(|fields| fields.state)
    }

    fn field(kind: &str, size: u64) -> Value {
        json!({"fields": [{"name": "f", "type": kind, "size": size}]})
    }

    #[test]
    fn each_type_is_written_as_the_script_does() {
        for (kind, body, expected) in [
            ("uint16", &b"\xff\x01"[..], json!("0xff01")),
            (
                "uint64",
                b"\0\0\0\0\0\0\x01\x02",
                json!("0x0000000000000102"),
            ),
            ("int32", b"\xff\xff\xff\xfe", json!("0xfffffffe (-2)")),
            ("int32", b"\0\0\0\x02", json!("0x00000002")),
            ("uint8 equal", b"\x80", json!("0x80 (-128)")),
            ("uint32 equal", b"\x80\0\0\0", json!("0x80000000")),
            (
                "int64 equal",
                b"\x80\0\0\0\0\0\0\0",
                json!("0x8000000000000000 (-9223372036854775808)"),
            ),
            ("bool", b"\0", json!(false)),
            ("bool", b"\x02", json!(true)),
            ("nullptr", b"0", json!("nullptr")),
            ("ptr-marker", b"1", json!("31")),
            ("buffer", b"\x01\xab\0", json!("01 ab 00")),
            ("buffer", b"", json!("")),
            (
                "timer",
                b"\xff\xff\xff\xff\xff\xff\xff\xff",
                json!("ff ff ff ff ff ff ff ff"),
            ),
        ] {
            let found = read(&field(kind, body.len() as u64), body).unwrap();
            assert_eq!(found, json!({"f": expected}), "{kind}");
        }
    }

    #[test]
    fn arrays_names_and_structures_fold_as_the_script_folds_them() {
        let layout = json!({"fields": [
            {"name": "a", "array_len": 2, "type": "uint8", "size": 1},
            {"name": "p", "index": 0, "type": "nullptr", "size": 1},
            {"name": "p", "array_len": 2, "type": "struct", "size": 1, "struct": {
                "vmsd_name": "s", "version": 1,
                "fields": [{"name": "x", "type": "uint8", "size": 1}]}},
            {"name": "one", "array_len": 1, "type": "uint8", "size": 1}],
            "subsections": [{"vmsd_name": "d/sub", "version": 1,
                "fields": [{"name": "y", "type": "bool", "size": 1}]}]});
        let body = b"\x01\x020\x03\x04\x05\x05\x05d/sub\0\0\0\x01\x01";
        assert_eq!(
            read(&layout, body).unwrap(),
            json!({
                "a": ["0x01", "0x02"],
                "p": ["nullptr", {"x": "0x03"}, {"x": "0x04"}],
                "one": "0x05",
                "d/sub": {"y": true}
            })
        );
        // Cut off anywhere it is an error, and so is what is behind it.
        for len in 0..body.len() {
            assert!(read(&layout, &body[..len]).is_err(), "{len} bytes");
        }
        let mut long = body.to_vec();
        long.push(0);
        let error = read(&layout, &long).unwrap_err();
        assert_eq!(error.mismatch, Mismatch::Rest { len: 1 });
    }

    #[test]
    fn what_is_not_as_described_is_named_with_its_place() {
        let layout = json!({"fields": [{"name": "s", "type": "struct", "size": 2, "struct": {
            "fields": [{"name": "n", "type": "nullptr", "size": 1}]}}]});
        let error = read(&layout, b"x").unwrap_err();
        assert_eq!(
            error.to_string(),
            "field 's.n' at byte 0x1 of the section: marker 30 of a pointer that is null expected, found '78'"
        );
        let layout = json!({"fields": [], "subsections": [{"vmsd_name": "d/a", "fields": []}]});
        let error = read(&layout, b"\x05\x03d/b\0\0\0\x01").unwrap_err();
        assert_eq!(
            error.mismatch,
            Mismatch::Subsection {
                found: "d/b".to_owned()
            }
        );
    }

    #[test]
    fn a_hostile_description_is_bounded() {
        let endless = json!({"fields": [
            {"name": "f", "array_len": u64::MAX, "type": "buffer", "size": 0}]});
        assert_eq!(read(&endless, b"").unwrap_err().mismatch, Mismatch::TooMany);
        let wide = field("buffer", u64::MAX);
        let error = read(&wide, b"abc").unwrap_err();
        assert_eq!(error.mismatch, Mismatch::Cut { wanted: u64::MAX });
        assert_eq!(
            read(&field("bool", 0), b"").unwrap_err().mismatch,
            Mismatch::Size { size: 0 }
        );
    }
}
