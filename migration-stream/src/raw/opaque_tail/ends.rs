//! Where the bodies of sections can end, found in one pass over all sections.
//!
//! A body can end where the footer of its section stands, with the header of a section or the end of
//! the bytes behind it. Each search afterwards costs the logarithm of the number of such places, so
//! that the sections of a hostile stream cost no more than their bytes.

use std::collections::HashMap;

use super::error::TailError;
use super::frame::{FOOTER_LEN, any_header_at};
use crate::raw::decoder::MAX_SECTIONS;
use crate::raw::section::SectionType;
use crate::{IdStr, InstanceId, SectionHeader, SectionId};

/// The most places that are remembered. A stream has one for each section, and few others: 4 bytes of
/// an id, two type bytes and a name have to agree by chance.
pub(super) const MAX_ENDS: usize = 4 * MAX_SECTIONS;

/// What is to follow the footer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Next {
    /// Any section, or the end of the bytes.
    Any,
    /// A section whose header is known, or the end of the bytes.
    Known,
    /// The end of the bytes.
    End,
    /// This section. A description may not say of which version.
    Section(IdStr, InstanceId, Option<u32>),
}

/// The places where bodies can end, by section and by what follows.
#[derive(Debug)]
pub(super) struct Ends(HashMap<(SectionId, Next), Vec<usize>>);

impl Ends {
    /// Finds them in `bytes`, which are whole sections. `is_known` tells which headers are
    /// [`Next::Known`].
    ///
    /// # Errors
    /// [`TailError::TooManyEnds`].
    pub(super) fn of(
        bytes: &[u8],
        is_known: impl Fn(&SectionHeader) -> bool,
    ) -> Result<Self, TailError> {
        let mut ends = Self(HashMap::new());
        let mut count = 0;
        for (at, window) in bytes.windows(FOOTER_LEN).enumerate() {
            let &[footer, a, b, c, d] = window else { break };
            if footer != SectionType::Footer.byte() {
                continue;
            }
            let id = SectionId(u32::from_be_bytes([a, b, c, d]));
            if at + FOOTER_LEN == bytes.len() {
                for next in [Next::Any, Next::Known, Next::End] {
                    ends.0.entry((id, next)).or_default().push(at);
                }
                continue;
            }
            let Ok((header, _)) = any_header_at(bytes, at + FOOTER_LEN) else {
                continue;
            };
            count += 1;
            if count > MAX_ENDS {
                return Err(TailError::TooManyEnds { max: MAX_ENDS });
            }
            let known = is_known(&header).then_some(Next::Known);
            let SectionHeader {
                idstr,
                instance,
                version,
                ..
            } = header;
            let next = [
                Next::Any,
                Next::Section(idstr.clone(), instance, None),
                Next::Section(idstr, instance, Some(version)),
            ];
            for next in next.into_iter().chain(known) {
                ends.0.entry((id, next)).or_default().push(at);
            }
        }
        Ok(ends)
    }

    /// The one place from `start` on where the body of section `id` can end with `next` behind it;
    /// `None` when there is none, or several.
    pub(super) fn only(&self, start: usize, id: SectionId, next: Next) -> Option<usize> {
        let found = self.0.get(&(id, next))?;
        let first = found.partition_point(|at| *at < start);
        match found.get(first..)? {
            [end] => Some(*end),
            _ => None,
        }
    }
}
