//! Text from outside in messages.

use std::borrow::Cow;

/// Returns `text` without what could do harm on a terminal or in a log: control characters, line breaks,
/// characters that turn text around, and invisible ones are escaped as in Rust's literals.
pub(crate) fn escaped(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_plain) {
        return text.into();
    }
    let mut escaped = String::new();
    for c in text.chars() {
        if is_plain(c) {
            escaped.push(c);
        } else {
            escaped.extend(c.escape_debug());
        }
    }
    escaped.into()
}

/// Whether a character stands for itself. Quotes and backslashes do: nothing is to be read back.
fn is_plain(c: char) -> bool {
    matches!(c, '\'' | '"' | '\\') || c.escape_debug().len() == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_cursor_or_turns_text_around_is_escaped() {
        assert!(matches!(escaped("'a' \"b\" \\ ü"), Cow::Borrowed(_)));
        assert_eq!(
            escaped("a\x1b[2J\u{9b}\r\n\u{202e}"),
            r"a\u{1b}[2J\u{9b}\r\n\u{202e}"
        );
    }
}
