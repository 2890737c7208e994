//! Text from outside in messages.

use std::fmt::{self, Write};

/// Displays a text that came from outside (a name in a stream, a path, a peer's message) without what
/// could do harm on a terminal or in a log: control characters, line breaks, characters that turn text
/// around, and invisible ones are escaped as in Rust's literals. Width and alignment apply to the result.
///
/// ```
/// use migration_stream::Escaped;
///
/// assert_eq!(Escaped("pc.ram").to_string(), "pc.ram");
/// assert_eq!(Escaped("pc\u{1b}[2J\n").to_string(), r"pc\u{1b}[2J\n");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escaped<'a>(pub &'a str);

/// Whether a character stands for itself. A backslash does too: what is escaped is not meant to be
/// read back.
fn is_plain(c: char) -> bool {
    matches!(c, '\'' | '"' | '\\') || c.escape_debug().len() == 1
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.chars().all(is_plain) {
            return f.pad(self.0);
        }
        let mut escaped = String::new();
        for c in self.0.chars() {
            if is_plain(c) {
                escaped.push(c);
            } else {
                write!(escaped, "{}", c.escape_debug())?;
            }
        }
        f.pad(&escaped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_cursor_or_turns_text_around_is_escaped() {
        for (text, shown) in [
            (
                "/machine/pc.ram 'a' \"b\" \\ ü 例",
                "/machine/pc.ram 'a' \"b\" \\ ü 例",
            ),
            ("\x1b[31m", r"\u{1b}[31m"),
            ("\u{9b}31m", r"\u{9b}31m"),
            ("a\r\n\tb\x07\x08\x7f", r"a\r\n\tb\u{7}\u{8}\u{7f}"),
            (
                "\u{202e}\u{2066}\u{200f}\u{feff}\u{2028}",
                r"\u{202e}\u{2066}\u{200f}\u{feff}\u{2028}",
            ),
        ] {
            assert_eq!(Escaped(text).to_string(), shown);
        }
        assert_eq!(
            format!("{:<6}|{:>8}", Escaped("ab"), Escaped("\x1b")),
            "ab    |  \\u{1b}"
        );
    }
}
