//! Where state is read from.

use std::fmt;
use std::fmt::Write as _;

use crate::error::{LoadError, Location};

/// One step on the way to the thing that is being read.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Section { idstr: String, instance_id: u32 },
    Subsection(&'static str),
    Field(&'static str),
    Index(usize),
}

/// A subsection's header, found after the fields of a description.
#[derive(Debug, Clone, Copy)]
pub struct SubsectionHeader<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) version: u32,
}

/// The bytes of a section's body while they are read.
///
/// A section carries no length. After each description the reader therefore looks whether a
/// subsection follows, which needs bytes behind the description: in a stream there always is at
/// least the section's footer. A reader made with [`Reader::partial`] reports
/// [`LoadError::Truncated`] when it cannot tell yet; one made with [`Reader::complete`] takes the
/// end of its bytes for the end of the body.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    complete: bool,
    path: Vec<Step>,
}

impl<'a> Reader<'a> {
    /// The most fields, elements and subsections that may be inside one another.
    pub const MAX_DEPTH: usize = 64;

    /// A reader of bytes that nothing follows.
    #[must_use]
    pub const fn complete(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            complete: true,
            path: Vec::new(),
        }
    }

    /// A reader of what has arrived so far of a longer stream.
    #[must_use]
    pub const fn partial(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            complete: false,
            path: Vec::new(),
        }
    }

    /// The items of a list that has the length of an array.
    ///
    /// # Errors
    /// It has not.
    pub fn array<T, const N: usize>(&self, items: Vec<T>) -> Result<[T; N], LoadError> {
        items
            .try_into()
            .map_err(|items: Vec<T>| self.invalid(format_args!("{} of {N} elements", items.len())))
    }

    /// The next `n` bytes as they are, for implementations of [`Field::load`](crate::Field::load).
    ///
    /// # Errors
    /// There are fewer.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], LoadError> {
        let rest = self.rest();
        let Some(taken) = rest.get(..n) else {
            return Err(self.truncated(n));
        };
        self.at += n;
        Ok(taken)
    }

    /// The next `N` bytes as they are.
    ///
    /// # Errors
    /// There are fewer.
    pub fn take_array<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        let Some(taken) = self.rest().first_chunk() else {
            return Err(self.truncated(N));
        };
        self.at += N;
        Ok(*taken)
    }

    /// Reads `count` things one after the other, each under its index.
    ///
    /// # Errors
    /// `load`'s.
    pub fn elements<T>(
        &mut self,
        count: usize,
        mut load: impl FnMut(&mut Self) -> Result<T, LoadError>,
    ) -> Result<Vec<T>, LoadError> {
        // Grown as elements are read, so that a count alone takes no memory.
        (0..count)
            .map(|i| self.within(Step::Index(i), &mut load))
            .collect()
    }

    /// The error of a value that must not be, for [`Field::load`](crate::Field::load) and
    /// [`VmState::load`](crate::VmState::load).
    #[must_use]
    pub fn invalid(&self, what: impl fmt::Display) -> LoadError {
        LoadError::Invalid {
            at: self.location(),
            what: what.to_string(),
        }
    }

    /// Number of bytes read.
    #[must_use]
    pub const fn offset(&self) -> usize {
        self.at
    }

    /// Number of bytes not yet read.
    #[must_use]
    pub const fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Ends the reading of a body that is all there is.
    ///
    /// # Errors
    /// Bytes are left over.
    pub fn finish(self) -> Result<(), LoadError> {
        match self.remaining() {
            0 => Ok(()),
            extra => Err(LoadError::Trailing {
                at: self.location(),
                extra,
            }),
        }
    }

    /// Errors name this section from here on.
    pub(crate) fn in_section(mut self, idstr: &str, instance_id: u32) -> Self {
        self.path.push(Step::Section {
            idstr: idstr.to_owned(),
            instance_id,
        });
        self
    }

    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    pub(crate) fn within<T>(
        &mut self,
        step: Step,
        load: impl FnOnce(&mut Self) -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        if self.path.len() == Self::MAX_DEPTH {
            return Err(LoadError::TooDeep {
                at: self.location(),
                limit: Self::MAX_DEPTH,
            });
        }
        self.path.push(step);
        let loaded = load(self);
        self.path.pop();
        loaded
    }

    pub(crate) fn check_count(&self, count: i128, max: usize) -> Result<usize, LoadError> {
        usize::try_from(count)
            .ok()
            .filter(|n| *n <= max)
            .ok_or_else(|| LoadError::Count {
                at: self.location(),
                count,
                max,
            })
    }

    /// The header of a subsection of `parent`, if one is next. Bytes that are not one belong to
    /// somebody else and stay.
    pub(crate) fn subsection_header(
        &mut self,
        parent: &str,
    ) -> Result<Option<SubsectionHeader<'a>>, LoadError> {
        let rest = self.rest();
        let undecided = |needed| {
            if self.complete {
                Ok(None)
            } else {
                Err(self.truncated(needed))
            }
        };
        let Some((&marker, after)) = rest.split_first() else {
            return undecided(1);
        };
        if marker != crate::SUBSECTION {
            return Ok(None);
        }
        let Some((&len, after)) = after.split_first() else {
            return undecided(2);
        };
        let (parent, len) = (parent.as_bytes(), usize::from(len));
        if len <= parent.len() {
            return Ok(None);
        }
        // What is there of the prefix may rule the name out before all of it has arrived. Waiting
        // for the rest could be waiting for bytes that the peer will send only later.
        let seen = after.len().min(parent.len());
        if after[..seen] != parent[..seen] {
            return Ok(None);
        }
        if seen < parent.len() {
            return undecided(2 + len);
        }
        // It begins with our name: nothing else is meant, even if the body is said to end here.
        let name = after.get(..len).ok_or_else(|| self.truncated(2 + len))?;
        self.at += 2 + len;
        let version = u32::from_be_bytes(self.take_array()?);
        Ok(Some(SubsectionHeader { name, version }))
    }

    fn truncated(&self, needed: usize) -> LoadError {
        LoadError::Truncated {
            at: self.location(),
            needed,
            available: self.remaining(),
        }
    }

    pub(crate) fn location(&self) -> Location {
        let mut path = String::new();
        for step in &self.path {
            if !path.is_empty() && !matches!(step, Step::Index(_)) {
                path.push_str(if path.ends_with(':') { " " } else { "." });
            }
            // Writing to a String cannot fail.
            let _ = match step {
                Step::Section { idstr, instance_id } => write!(path, "{idstr} {instance_id}:"),
                Step::Subsection(name) => write!(path, "<{name}>"),
                Step::Field(name) => write!(path, "{name}"),
                Step::Index(i) => write!(path, "[{i}]"),
            };
        }
        if path.ends_with(':') {
            path.pop();
        }
        Location {
            path,
            offset: self.at,
        }
    }
}
