//! The fields of a description in the order of their bytes, with structures that can be entered.

use crate::dump::{Description, Field};
use crate::renames;

/// The fields that a stream has, or a loader reads, from left to right.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    /// What is to come, the next one last.
    rest: Vec<&'a Field>,
}

impl<'a> Fields<'a> {
    /// Those of `description` that are there in `version`.
    pub(crate) fn of(description: &'a Description, version: i64) -> Self {
        let mut fields = Self { rest: Vec::new() };
        fields.push(description, version);
        fields
    }

    fn push(&mut self, description: &'a Description, version: i64) {
        let there = description.fields().iter().filter(|f| f.is_in(version));
        self.rest.extend(there.rev());
    }

    /// The next field, which stays.
    pub(crate) fn peek(&self) -> Option<&'a Field> {
        self.rest.last().copied()
    }

    /// Goes past `count` fields.
    pub(crate) fn skip(&mut self, count: usize) {
        self.rest.truncate(self.rest.len().saturating_sub(count));
    }

    /// Whether the next field is a structure, and `name` is the first field of it (or of the
    /// structure that begins it): the same bytes, bundled.
    pub(crate) fn begins_with(&self, name: &str) -> bool {
        self.peek().is_some_and(|field| begins_with(field, name))
    }

    /// Replaces the next field, a structure, by its fields.
    pub(crate) fn enter(&mut self) {
        if let Some(structure) = self.rest.pop().and_then(Field::structure) {
            self.push(structure, structure.version());
        }
    }

    /// The conditional fields before one that `is_it`, if there is one and nothing else before it.
    pub(crate) fn conditional_before(
        &self,
        is_it: impl Fn(&Field) -> bool,
    ) -> Option<&[&'a Field]> {
        let at = self.rest.iter().rposition(|field| is_it(field))?;
        let (_, before) = self.rest.get(at..)?.split_first()?;
        before.iter().all(|f| f.is_conditional()).then_some(before)
    }
}

fn begins_with(field: &Field, name: &str) -> bool {
    let Some(structure) = field.structure() else {
        return false;
    };
    let there = |f: &&Field| f.is_in(structure.version());
    field.elements().unwrap_or(1) == 1
        && structure.fields().iter().find(there).is_some_and(|first| {
            renames::is_same_field(structure.name(), first.name(), name) || begins_with(first, name)
        })
}

/// Bytes that a field takes in a stream; `None` if that depends on what is in them.
pub(crate) fn stream_bytes(field: &Field) -> Option<u64> {
    if field.is_conditional() {
        return None;
    }
    match field.structure() {
        None => Some(field.bytes()).filter(|&bytes| bytes > 0),
        Some(s) if !s.subsections().is_empty() => None,
        Some(s) => {
            let mut there = s.fields().iter().filter(|f| f.is_in(s.version()));
            let one = there.try_fold(0_u64, |sum, f| Some(sum.saturating_add(stream_bytes(f)?)))?;
            Some(one.saturating_mul(field.elements().unwrap_or(1)))
        }
    }
}
