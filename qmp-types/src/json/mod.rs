//! JSON as QMP carries it: values one after the other, with or without anything between them.
//!
//! [`JsonReader`] takes bytes in pieces of any size and gives values. It holds at most
//! [`Limits::bytes`] of text, [`Limits::tokens`] tokens and [`Limits::depth`] levels of one value,
//! whatever arrives, and looks at each byte once. A mistake is reported at the byte that makes it
//! one. After that the reader finds the next value as QEMU does: behind a mistake of grammar, or a
//! limit, where the brackets end that were open; behind a byte that is no JSON at the next structural
//! character or line.
//!
//! Like QEMU it also takes strings in single quotes, and it refuses an object that has a key twice.

mod error;
mod limits;
mod reader;
mod text;
mod write;

pub use error::{JsonError, JsonErrorKind};
pub use limits::Limits;
pub use reader::JsonReader;
pub(crate) use write::{line, write_line};
