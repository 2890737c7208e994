//! Unused bytes, which stand for as many bytes of fields of the other side.

use super::Check;
use crate::fields::{Fields, stream_bytes};
use crate::renames;

impl Check<'_> {
    /// Goes past unused bytes on one side and as many bytes of fields on the other. False if they
    /// do not end together.
    pub(super) fn pass_unused<'f>(
        &self,
        description: &str,
        source: &mut Fields<'f>,
        destination: &mut Fields<'f>,
    ) -> bool {
        let mut s = Passed::new(self.counts_elements.0);
        let mut d = Passed::new(self.counts_elements.1);
        loop {
            let next = if s.bytes > d.bytes {
                d.pass(destination)
            } else {
                s.pass(source)
            };
            if next.is_none() || (s.has_named && d.has_named) {
                return false;
            }
            if s.bytes == d.bytes {
                return true;
            }
            // A field may be an array of more elements than the dump says: the names tell then
            // where the unused bytes end.
            let is_short = (s.bytes < d.bytes && s.may_be_longer())
                || (d.bytes < s.bytes && d.may_be_longer());
            let is_in_step = match (source.peek(), destination.peek()) {
                (Some(s), Some(d)) => renames::is_same_field(description, s.name(), d.name()),
                (None, None) => true,
                _ => false,
            };
            if is_short && is_in_step {
                return true;
            }
        }
    }
}

/// What of one side was passed beside unused bytes.
struct Passed {
    bytes: u64,
    /// Whether it was not only unused bytes.
    has_named: bool,
    counts_elements: bool,
}

impl Passed {
    const fn new(counts_elements: bool) -> Self {
        Self {
            bytes: 0,
            has_named: false,
            counts_elements,
        }
    }

    /// Passes the next field. `None` if there is none, or nobody knows how long it is.
    fn pass(&mut self, fields: &mut Fields<'_>) -> Option<()> {
        let field = fields.peek()?;
        self.bytes = self.bytes.checked_add(stream_bytes(field)?)?;
        self.has_named |= !field.is_unused();
        fields.skip(1);
        Some(())
    }

    const fn may_be_longer(&self) -> bool {
        self.has_named && !self.counts_elements
    }
}
