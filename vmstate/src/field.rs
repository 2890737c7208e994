//! Plain fields: what has bytes but no name, version or subsections of its own.

use byteorder::{BigEndian, ByteOrder as _};

use crate::error::LoadError;
use crate::field_type::FieldType;
use crate::reader::Reader;
use crate::writer::Writer;

/// A plain field: integers (big endian), `bool`, arrays of them, and the types of
/// [`types`](crate::types). Implement it for an enumeration or a newtype of a device.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a plain field",
    note = "a `VmState` is a field with `#[vmstate(nested)]`; implement `vmstate::Field` for an enum or a newtype"
)]
pub trait Field: Sized {
    /// The type, for the description of a stream.
    fn field_type() -> FieldType;

    /// Bytes of the value, of an array those of one element; 0 if they vary. Only for the
    /// description as declared.
    #[must_use]
    fn size() -> usize {
        0
    }

    /// Writes the value.
    fn save(&self, out: &mut Writer);

    /// Reads a value.
    ///
    /// # Errors
    /// The bytes are no such value ([`Reader::invalid`]), or end too early.
    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError>;

    /// The type of `count` values back to back.
    #[must_use]
    fn slice_type(count: usize) -> FieldType {
        let element = Self::field_type();
        FieldType {
            name: element.name,
            elements: Some(count.saturating_mul(element.elements.unwrap_or(1))),
        }
    }

    /// Writes values back to back.
    fn save_slice(items: &[Self], out: &mut Writer) {
        for item in items {
            item.save(out);
        }
    }

    /// Reads `count` values back to back.
    ///
    /// # Errors
    /// As for [`Field::load`].
    fn load_vec(count: usize, input: &mut Reader<'_>) -> Result<Vec<Self>, LoadError> {
        input.elements(count, Self::load)
    }
}

macro_rules! integer {
    ($($int:ident, $name:literal, $write_into:ident, $read_into:ident;)*) => {$(
        impl Field for $int {
            fn field_type() -> FieldType {
                FieldType { name: $name, elements: None }
            }
            fn size() -> usize {
                size_of::<Self>()
            }
            fn save(&self, out: &mut Writer) {
                out.put(&self.to_be_bytes());
            }
            fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
                input.take_array().map(Self::from_be_bytes)
            }
            fn save_slice(items: &[Self], out: &mut Writer) {
                out.put_with(size_of_val(items), |bytes| BigEndian::$write_into(items, bytes));
            }
            fn load_vec(count: usize, input: &mut Reader<'_>) -> Result<Vec<Self>, LoadError> {
                let bytes = input.take(count.saturating_mul(size_of::<Self>()))?;
                let mut items = vec![0; count];
                BigEndian::$read_into(bytes, &mut items);
                Ok(items)
            }
        }
    )*};
}

integer! {
    u16, "uint16", write_u16_into, read_u16_into;
    u32, "uint32", write_u32_into, read_u32_into;
    u64, "uint64", write_u64_into, read_u64_into;
    i16, "int16", write_i16_into, read_i16_into;
    i32, "int32", write_i32_into, read_i32_into;
    i64, "int64", write_i64_into, read_i64_into;
}

impl Field for i8 {
    fn field_type() -> FieldType {
        FieldType {
            name: "int8",
            elements: None,
        }
    }

    fn size() -> usize {
        1
    }

    fn save(&self, out: &mut Writer) {
        out.put(&self.to_be_bytes());
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        input.take_array().map(Self::from_be_bytes)
    }
}

impl Field for u8 {
    fn field_type() -> FieldType {
        FieldType {
            name: "uint8",
            elements: None,
        }
    }

    fn size() -> usize {
        1
    }

    fn save(&self, out: &mut Writer) {
        out.put(&[*self]);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        input.take_array().map(|[byte]| byte)
    }

    /// Bytes back to back are one buffer.
    fn slice_type(_count: usize) -> FieldType {
        FieldType {
            name: "buffer",
            elements: None,
        }
    }

    fn save_slice(items: &[Self], out: &mut Writer) {
        out.put(items);
    }

    fn load_vec(count: usize, input: &mut Reader<'_>) -> Result<Vec<Self>, LoadError> {
        input.take(count).map(<[u8]>::to_vec)
    }
}

/// One byte; every value but 0 is read as true.
impl Field for bool {
    fn field_type() -> FieldType {
        FieldType {
            name: "bool",
            elements: None,
        }
    }

    fn size() -> usize {
        1
    }

    fn save(&self, out: &mut Writer) {
        out.put(&[u8::from(*self)]);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        input.take_array().map(|[byte]| byte != 0)
    }
}

/// The elements back to back.
impl<T: Field, const N: usize> Field for [T; N] {
    fn field_type() -> FieldType {
        T::slice_type(N)
    }

    fn size() -> usize {
        match T::slice_type(N).elements {
            Some(_) => T::size(),
            None => T::size().saturating_mul(N),
        }
    }

    fn save(&self, out: &mut Writer) {
        T::save_slice(self, out);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        let items = T::load_vec(N, input)?;
        input.array(items)
    }
}

/// Eight bytes, big endian.
impl Field for f64 {
    fn field_type() -> FieldType {
        FieldType {
            name: "float64",
            elements: None,
        }
    }

    fn size() -> usize {
        size_of::<Self>()
    }

    fn save(&self, out: &mut Writer) {
        self.to_bits().save(out);
    }

    fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        u64::load(input).map(Self::from_bits)
    }
}
