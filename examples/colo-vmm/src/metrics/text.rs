//! Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write};

/// What kind of values a family has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Counts below bounds, with their sum.
    Histogram,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Families, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Text(String);

/// A name and the value that goes with it.
pub(super) type Label<'a> = (&'a str, &'a str);

impl Text {
    /// Begins a family: all samples of its name follow.
    pub(super) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = kind.name();
        // Writing into a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A value of the family that was begun.
    pub(super) fn sample(&mut self, name: &str, labels: &[Label<'_>], value: impl Display) {
        self.0.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            self.0.push(if i == 0 { '{' } else { ',' });
            self.0.push_str(label);
            self.0.push_str("=\"");
            for c in text.chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    c => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// All of it.
    pub(super) fn into_string(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_quoted() {
        let mut text = Text::default();
        text.family("a_total", Kind::Counter, "All of a.");
        text.sample("a_total", &[("x", "q\"b\\l\n"), ("y", "")], 3);
        text.sample("a_total", &[], 0.25);
        assert_eq!(
            text.into_string(),
            "# HELP a_total All of a.\n# TYPE a_total counter\n\
             a_total{x=\"q\\\"b\\\\l\\n\",y=\"\"} 3\na_total 0.25\n"
        );
    }
}
