//! What the description of a state says of a field, in addition to its bytes.

use crate::field_type::FieldType;

/// A field's name and how a stream's self-description puts it. A name alone will do:
/// `out.field("count", &self.count)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldSpec {
    name: &'static str,
    info: Option<&'static str>,
    is_tested: bool,
    is_equal: bool,
    is_array: bool,
}

impl FieldSpec {
    /// A field of this name.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            info: None,
            is_tested: false,
            is_equal: false,
            is_array: false,
        }
    }

    /// The name of its type, in place of the one that follows from the Rust type.
    #[must_use]
    pub const fn info(mut self, info: &'static str) -> Self {
        self.info = Some(info);
        self
    }

    /// Whether the field is there is decided by a test (QEMU's `field_exists`).
    #[must_use]
    pub const fn tested(mut self) -> Self {
        self.is_tested = true;
        self
    }

    /// The value must equal the receiver's.
    #[must_use]
    pub const fn equal(mut self) -> Self {
        self.is_equal = true;
        self
    }

    /// Bytes are elements of their own rather than a buffer.
    #[must_use]
    pub const fn array(mut self) -> Self {
        self.is_array = true;
        self
    }

    /// The field's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) const fn is_tested(&self) -> bool {
        self.is_tested
    }

    /// The type as described, of a value whose Rust type says `field_type` and that has `bytes`
    /// bytes.
    pub(crate) fn described(&self, field_type: FieldType, bytes: usize) -> FieldType {
        let mut described = field_type;
        if self.is_array && field_type.name == "buffer" {
            described = FieldType {
                name: "uint8",
                elements: Some(bytes),
            };
        }
        if self.is_equal {
            described.name = match described.name {
                "uint8" => "uint8 equal",
                "uint16" => "uint16 equal",
                "uint32" => "uint32 equal",
                "int32" => "int32 equal",
                // QEMU compares unsigned ones with this type as well.
                "int64" | "uint64" => "int64 equal",
                other => other,
            };
        }
        if let Some(info) = self.info {
            described.name = info;
        }
        described
    }
}

impl From<&'static str> for FieldSpec {
    fn from(name: &'static str) -> Self {
        Self::new(name)
    }
}
