//! From JSON arguments to values, with QEMU's texts for everything that can be wrong with them.
//!
//! serde could decode the same arguments, but not say "Invalid parameter type for
//! 'capabilities\[0\].state', expected: boolean".

use serde_json::{Map, Value};

use crate::error::QmpError;

/// Where in the arguments a value is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// The arguments themselves.
    Root,
    /// A member of the object at the other place.
    Member(&'a Place<'a>, &'a str),
    /// An element of the list at the other place.
    Element(&'a Place<'a>, usize),
}

impl Place<'_> {
    /// The path from the arguments down: `capabilities[0].state`.
    pub(crate) fn path(&self) -> String {
        match self {
            Self::Root => String::new(),
            Self::Member(Place::Root, name) => (*name).to_owned(),
            Self::Member(parent, name) => format!("{}.{name}", parent.path()),
            Self::Element(parent, index) => format!("{}[{index}]", parent.path()),
        }
    }

    /// The last member's name; an element of a list has none, and QEMU says "null".
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Member(_, name) => name,
            Self::Root | Self::Element(..) => "null",
        }
    }
}

/// A value that can be an argument, or part of one.
pub(crate) trait FromQapi: Sized {
    /// The value in JSON form.
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError>;

    /// What it means that the member is absent.
    fn absent(place: &Place<'_>) -> Result<Self, QmpError> {
        Err(QmpError::missing(&place.path()))
    }
}

/// An object whose members are taken out one after the other, until none may be left.
pub(crate) struct Members<'a> {
    place: &'a Place<'a>,
    members: Map<String, Value>,
}

impl<'a> Members<'a> {
    pub(crate) fn new(value: Value, place: &'a Place<'a>) -> Result<Self, QmpError> {
        match value {
            Value::Object(members) => Ok(Self { place, members }),
            _ => Err(QmpError::wrong_type(&place.path(), "object")),
        }
    }

    pub(crate) fn arguments(members: Map<String, Value>) -> Self {
        Self {
            place: &Place::Root,
            members,
        }
    }

    pub(crate) fn take<T: FromQapi>(&mut self, name: &str) -> Result<T, QmpError> {
        let place = Place::Member(self.place, name);
        match self.members.remove(name) {
            Some(value) => T::from_qapi(value, &place),
            None => T::absent(&place),
        }
    }

    pub(crate) fn finish(self) -> Result<(), QmpError> {
        match self.members.keys().next() {
            Some(name) => Err(QmpError::unexpected(
                &Place::Member(self.place, name).path(),
            )),
            None => Ok(()),
        }
    }
}

impl<T: FromQapi> FromQapi for Option<T> {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        T::from_qapi(value, place).map(Some)
    }

    fn absent(_: &Place<'_>) -> Result<Self, QmpError> {
        Ok(None)
    }
}

impl<T: FromQapi> FromQapi for Vec<T> {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        let Value::Array(elements) = value else {
            return Err(QmpError::wrong_type(&place.path(), "array"));
        };
        elements
            .into_iter()
            .enumerate()
            .map(|(index, element)| T::from_qapi(element, &Place::Element(place, index)))
            .collect()
    }
}

impl FromQapi for bool {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        value
            .as_bool()
            .ok_or_else(|| QmpError::wrong_type(&place.path(), "boolean"))
    }
}

impl FromQapi for String {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        match value {
            Value::String(text) => Ok(text),
            _ => Err(QmpError::wrong_type(&place.path(), "string")),
        }
    }
}

impl FromQapi for u64 {
    /// Unlike QEMU, which takes -1 for 18446744073709551615, negative numbers are refused.
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        value
            .as_u64()
            .ok_or_else(|| QmpError::expects(&place.path(), "uint64"))
    }
}

/// Narrower integers: QEMU names the C type when an integer does not fit it.
macro_rules! narrow_integer {
    ($($type:ty = $c_type:literal),+) => {$(
        impl FromQapi for $type {
            fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
                if !(value.is_u64() || value.is_i64()) {
                    return Err(QmpError::expects(&place.path(), "uint64"));
                }
                value
                    .as_u64()
                    .and_then(|number| Self::try_from(number).ok())
                    .ok_or_else(|| QmpError::expects(place.name(), $c_type))
            }
        }
    )+};
}
narrow_integer!(u8 = "uint8_t", u16 = "uint16_t", u32 = "uint32_t");

/// An enumeration of the schema: the variants, and how each is spelled on the wire.
macro_rules! qapi_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident {
            $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash,
            ::serde::Serialize, ::serde::Deserialize,
        )]
        pub enum $name {
            $($(#[$variant_meta])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every value, in the schema's order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// How the value is spelled on the wire.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// The value that is spelled so.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($text => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl $crate::visit::FromQapi for $name {
            fn from_qapi(
                value: ::serde_json::Value,
                place: &$crate::visit::Place<'_>,
            ) -> Result<Self, $crate::error::QmpError> {
                let text = <String as $crate::visit::FromQapi>::from_qapi(value, place)?;
                Self::from_name(&text)
                    .ok_or_else(|| $crate::error::QmpError::invalid_value(place.name(), &text))
            }
        }
    };
}

/// Decoding of a struct, member by member.
macro_rules! from_qapi_struct {
    ($name:ident { $($field:ident = $text:literal),+ $(,)? }) => {
        impl $crate::visit::FromQapi for $name {
            fn from_qapi(
                value: ::serde_json::Value,
                place: &$crate::visit::Place<'_>,
            ) -> Result<Self, $crate::error::QmpError> {
                Self::take($crate::visit::Members::new(value, place)?)
            }
        }

        impl $name {
            /// The struct of these members, none of which may be left.
            pub(crate) fn take(
                mut members: $crate::visit::Members<'_>,
            ) -> Result<Self, $crate::error::QmpError> {
                let this = Self { $($field: members.take($text)?,)+ };
                members.finish()?;
                Ok(this)
            }
        }
    };
}
