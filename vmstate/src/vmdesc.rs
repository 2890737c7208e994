//! What a section consists of: the self-description that follows a stream.

use crate::field::FieldType;

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
