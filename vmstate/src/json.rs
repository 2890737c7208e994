//! As much of a JSON writer as the self-description needs.

use std::fmt::Write as _;

/// Writes one JSON value from left to right.
#[derive(Debug, Default)]
pub(crate) struct JsonWriter {
    text: String,
    /// Whether the innermost object or array has a member already.
    started: bool,
}

impl JsonWriter {
    /// `{ .. }`, with the members that `members` writes.
    pub(crate) fn object(&mut self, members: impl FnOnce(&mut Self)) {
        self.enclosed('{', members, '}');
    }

    /// `[ .. ]` of what `element` writes for each item.
    pub(crate) fn array<T>(
        &mut self,
        items: impl IntoIterator<Item = T>,
        mut element: impl FnMut(&mut Self, T),
    ) {
        self.enclosed(
            '[',
            |json| {
                for item in items {
                    json.separate();
                    element(json, item);
                }
            },
            ']',
        );
    }

    /// The key of the next member of an object; its value must follow.
    pub(crate) fn key(&mut self, key: &str) -> &mut Self {
        self.separate();
        self.string(key);
        self.text.push_str(": ");
        self
    }

    /// A string, with quotes, backslashes and control characters escaped.
    pub(crate) fn string(&mut self, value: &str) {
        self.text.push('"');
        for c in value.chars() {
            match c {
                '"' | '\\' => self.text.extend(['\\', c]),
                c if c.is_control() => {
                    // Every control character is in the basic plane; writing to a String cannot
                    // fail.
                    let _ = write!(self.text, "\\u{:04x}", u32::from(c));
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }

    /// A whole number.
    pub(crate) fn number(&mut self, value: impl Into<u64>) {
        // As above.
        let _ = write!(self.text, "{}", value.into());
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&mut self, value: bool) {
        self.text.push_str(if value { "true" } else { "false" });
    }

    /// The text of all that was written.
    pub(crate) fn finish(self) -> String {
        self.text
    }

    fn enclosed(&mut self, open: char, inside: impl FnOnce(&mut Self), close: char) {
        self.text.push(open);
        self.started = false;
        inside(self);
        self.started = true;
        self.text.push(close);
    }

    fn separate(&mut self) {
        if self.started {
            self.text.push_str(", ");
        }
        self.started = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_separated_at_every_level() {
        let mut json = JsonWriter::default();
        json.object(|json| {
            json.key("a").array([1u64, 2], |json, n| json.number(n));
            json.key("b").object(|_| ());
            json.key("c").array([(); 2], |json, ()| json.object(|_| ()));
            json.key("d").string("e");
        });
        assert_eq!(
            json.finish(),
            r#"{"a": [1, 2], "b": {}, "c": [{}, {}], "d": "e"}"#
        );
    }

    #[test]
    fn what_json_cannot_hold_is_escaped() {
        let mut json = JsonWriter::default();
        json.string("a\"b\\c\n\0\u{7f}é𝄞");
        assert_eq!(json.finish(), "\"a\\\"b\\\\c\\u000a\\u0000\\u007fé𝄞\"");
    }
}
