//! The members of a description: what generated code calls, for each kind of member, of the reader, the writer and
//! the declaration.

mod reader;
mod schema;
mod writer;
