//! JSON out: one line a value, ASCII only, ended by CRLF.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

/// Spaces and escapes as in QEMU's output.
struct QmpFormatter;

impl Formatter for QmpFormatter {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c: char| !c.is_ascii() || c == '\x7f') {
            let (plain, others) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut characters = others.chars();
            if let Some(character) = characters.next() {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04X}")?;
                }
            }
            rest = characters.as_str();
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        let text = match escape {
            CharEscape::Quote => "\\\"",
            CharEscape::ReverseSolidus => "\\\\",
            CharEscape::Solidus => "/",
            CharEscape::Backspace => "\\b",
            CharEscape::FormFeed => "\\f",
            CharEscape::LineFeed => "\\n",
            CharEscape::CarriageReturn => "\\r",
            CharEscape::Tab => "\\t",
            CharEscape::AsciiControl(byte) => return write!(writer, "\\u{byte:04X}"),
        };
        writer.write_all(text.as_bytes())
    }
}

/// Appends a value and a line end.
///
/// A value that has no JSON form leaves `output` as it was: those of this crate all have one.
pub(crate) fn write_line<T: Serialize>(output: &mut Vec<u8>, value: &T) {
    let start = output.len();
    let mut serializer = Serializer::with_formatter(&mut *output, QmpFormatter);
    match value.serialize(&mut serializer) {
        Ok(()) => output.extend_from_slice(b"\r\n"),
        Err(_) => output.truncate(start),
    }
}

/// A value and a line end.
pub(crate) fn line<T: Serialize>(value: &T) -> Vec<u8> {
    let mut output = Vec::new();
    write_line(&mut output, value);
    output
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn output_is_ascii_with_upper_case_escapes_and_ends_with_crlf() {
        let value = json!({"id": ["é€😀x\u{7f}\u{1}", "</>&\u{8}\u{c}\n\r\t\"\\", 1, null]});
        assert_eq!(
            String::from_utf8(line(&value)).unwrap(),
            concat!(
                r#"{"id": ["\u00E9\u20AC\uD83D\uDE00x\u007F\u0001", "#,
                r#""</>&\b\f\n\r\t\"\\", 1, null]}"#,
                "\r\n"
            )
        );
    }
}
