//! What a field is called.

/// What a field is, in the words of the stream's self-description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldType {
    /// QEMU's name of the type, such as `uint32`.
    pub name: &'static str,
    /// Number of elements of an array, `None` if it is not one.
    pub elements: Option<usize>,
}
