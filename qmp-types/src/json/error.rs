//! What can be wrong with JSON, in QEMU's words.

use std::fmt;

#[cfg(doc)]
use super::Limits;
use crate::text::escaped;

/// What is wrong with a piece of input.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JsonErrorKind {
    /// An object's key should be here.
    ExpectingKey,
    /// The colon after a key should be here.
    ExpectingColon,
    /// A value should be here.
    ExpectingValue,
    /// Another member, or the end of the object, should be here.
    ExpectingMemberOrEnd,
    /// Another element, or the end of the list, should be here.
    ExpectingElementOrEnd,
    /// A word that is none of `true`, `false`, `null`.
    InvalidKeyword(String),
    /// A backslash before something else than JSON has escapes for.
    InvalidEscape,
    /// `\u` without four hexadecimal digits, or with half a surrogate pair.
    NotUnicode(String),
    /// Bytes of a string that are not UTF-8.
    InvalidUtf8,
    /// A number too large for floating point.
    NumberOutOfRange,
    /// The object has the key already.
    DuplicateKey,
    /// Bytes that begin no token.
    Stray(String),
    /// More text than [`Limits::bytes`].
    TooLarge,
    /// More tokens than [`Limits::tokens`].
    TooManyTokens,
    /// More levels than [`Limits::depth`].
    TooDeep,
}

/// A piece of input that is not JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// Line, counted from 1 over everything the reader has seen.
    pub line: u64,
    /// Byte in the line, counted from 1.
    pub column: u64,
    /// What is wrong.
    pub kind: JsonErrorKind,
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // QEMU says of a limit what it is, and of a mistake of grammar where.
        match &self.kind {
            JsonErrorKind::TooLarge => return f.write_str("JSON token size limit exceeded"),
            JsonErrorKind::TooManyTokens => return f.write_str("JSON token count limit exceeded"),
            JsonErrorKind::TooDeep => return f.write_str("JSON nesting depth limit exceeded"),
            _ => write!(f, "{}:{}: JSON parse error, ", self.line, self.column)?,
        }
        match &self.kind {
            JsonErrorKind::ExpectingKey => f.write_str("expecting key"),
            JsonErrorKind::ExpectingColon => f.write_str("expecting ':'"),
            JsonErrorKind::ExpectingValue => f.write_str("expecting value"),
            JsonErrorKind::ExpectingMemberOrEnd => f.write_str("expected ',' or '}'"),
            JsonErrorKind::ExpectingElementOrEnd => f.write_str("expected ',' or ']'"),
            JsonErrorKind::InvalidKeyword(word) => write!(f, "invalid keyword '{}'", escaped(word)),
            JsonErrorKind::InvalidEscape => f.write_str("invalid escape sequence in string"),
            JsonErrorKind::NotUnicode(text) => {
                write!(f, "{} is not a valid Unicode character", escaped(text))
            }
            JsonErrorKind::InvalidUtf8 => f.write_str("invalid UTF-8 sequence in string"),
            JsonErrorKind::NumberOutOfRange => f.write_str("number out of range"),
            JsonErrorKind::DuplicateKey => f.write_str("duplicate key"),
            JsonErrorKind::Stray(text) => write!(f, "stray '{}'", escaped(text)),
            JsonErrorKind::TooLarge | JsonErrorKind::TooManyTokens | JsonErrorKind::TooDeep => {
                Ok(())
            }
        }
    }
}

impl std::error::Error for JsonError {}
