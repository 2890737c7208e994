//! Where state is read from.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fmt::Write as _;
use std::ops::Range;

use crate::field::Field;
use crate::nested::Nested;
use crate::pointee::Pointee;
use crate::types::Bits;
use crate::{LoadError, Location, VmState, Writer};

/// One step on the way to the thing that is being read.
#[derive(Debug, Clone)]
enum Step {
    Section { idstr: String, instance_id: u32 },
    Subsection(&'static str),
    Field(&'static str),
    Index(usize),
}

/// A subsection's header, found after the fields of a description.
#[derive(Debug, Clone, Copy)]
pub struct SubsectionHeader<'a> {
    name: &'a [u8],
    version: u32,
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

    /// Reads a whole description of `version`.
    ///
    /// # Errors
    /// The version is not one that `T` can load, or [`VmState::load`]'s.
    pub fn description<T: VmState>(&mut self, version: u32) -> Result<T, LoadError> {
        if version > T::VERSION {
            return Err(LoadError::VersionTooNew {
                at: self.location(),
                name: T::NAME,
                version,
                newest: T::VERSION,
            });
        }
        if version < T::MINIMUM_VERSION {
            return Err(LoadError::VersionTooOld {
                at: self.location(),
                name: T::NAME,
                version,
                oldest: T::MINIMUM_VERSION,
            });
        }
        T::load(self, version)
    }

    /// Reads a plain field.
    ///
    /// # Errors
    /// [`Field::load`]'s.
    pub fn field<T: Field>(&mut self, name: &'static str) -> Result<T, LoadError> {
        self.within(Step::Field(name), |input| T::load(input))
    }

    /// Reads a field that is a description of its own, or an array of such, at its own version.
    ///
    /// # Errors
    /// [`VmState::load`]'s.
    pub fn nested<T: Nested>(&mut self, name: &'static str) -> Result<T, LoadError> {
        self.within(Step::Field(name), |input| T::load_nested(input))
    }

    /// Reads `count` plain elements. Memory is taken for elements whose bytes are there.
    ///
    /// # Errors
    /// `count` is negative or more than `max`; [`Field::load`]'s.
    pub fn list<T: Field>(
        &mut self,
        name: &'static str,
        count: i128,
        max: usize,
    ) -> Result<Vec<T>, LoadError> {
        self.within(Step::Field(name), |input| {
            let count = input.check_count(count, max)?;
            T::load_vec(count, input)
        })
    }

    /// Reads `count` descriptions at their own version.
    ///
    /// # Errors
    /// `count` is negative or more than `max`; [`VmState::load`]'s.
    pub fn nested_list<T: VmState>(
        &mut self,
        name: &'static str,
        count: i128,
        max: usize,
    ) -> Result<Vec<T>, LoadError> {
        self.within(Step::Field(name), |input| {
            let count = input.check_count(count, max)?;
            input.elements(count, |input| T::load(input, T::VERSION))
        })
    }

    /// Reads elements `range` of an array; the others get their default.
    ///
    /// # Errors
    /// [`Field::load`]'s.
    pub fn part<T: Field + Default + Copy, const N: usize>(
        &mut self,
        name: &'static str,
        range: Range<usize>,
    ) -> Result<[T; N], LoadError> {
        self.within(Step::Field(name), |input| {
            let mut array = [T::default(); N];
            let Some(part) = array.get_mut(range) else {
                return Err(input.invalid("the part lies beyond the array"));
            };
            let items = T::load_vec(part.len(), input)?;
            for (slot, item) in part.iter_mut().zip(items) {
                *slot = item;
            }
            Ok(array)
        })
    }

    /// Reads a description in the form of `version`, whatever the current one is.
    ///
    /// # Errors
    /// As for [`Reader::description`].
    pub fn nested_at<T: VmState>(
        &mut self,
        name: &'static str,
        version: u32,
    ) -> Result<T, LoadError> {
        self.within(Step::Field(name), |input| input.description(version))
    }

    /// Reads an array of pointers to descriptions or numbers. With `present`, only those that it says are
    /// NULL have a marker; without, every one has.
    ///
    /// # Errors
    /// `count` is negative or more than `max`, a marker is none; [`VmState::load`]'s.
    pub fn pointers<T: Pointee>(
        &mut self,
        name: &'static str,
        count: i128,
        max: usize,
        present: Option<&dyn Fn(usize) -> bool>,
    ) -> Result<Vec<Option<T>>, LoadError> {
        self.within(Step::Field(name), |input| {
            let count = input.check_count(count, max)?;
            let mut index = 0;
            input.elements(count, |input| {
                let i = index;
                index += 1;
                let is_there = match present {
                    Some(present) if present(i) => true,
                    _ => {
                        let at = input.location();
                        match input.take_array()? {
                            [crate::NULL_POINTER] => false,
                            [crate::VALID_POINTER] if present.is_none() => true,
                            [marker] => return Err(LoadError::PointerMarker { at, marker }),
                        }
                    }
                };
                is_there.then(|| T::load_pointee(input)).transpose()
            })
        })
    }

    /// Reads a list whose elements have a byte 1 before them, up to a byte 0 (QEMU's QTAILQ and
    /// QLIST).
    ///
    /// # Errors
    /// There are more than `max` elements; [`VmState::load`]'s.
    pub fn queue<T: VmState>(
        &mut self,
        name: &'static str,
        max: usize,
    ) -> Result<Vec<T>, LoadError> {
        self.within(Step::Field(name), |input| {
            let mut items = Vec::new();
            while input.has_next()? {
                let index = items.len();
                input.check_count(index as i128 + 1, max)?;
                items.push(input.within(Step::Index(index), |input| T::load(input, T::VERSION))?);
            }
            Ok(items)
        })
    }

    /// Reads a sorted tree: a be32 count, for each node a byte 1, key and value, then a byte 0
    /// (QEMU's GTree).
    ///
    /// # Errors
    /// There are more than `max` nodes, others than the count says, or a key is there twice;
    /// [`VmState::load`]'s.
    pub fn tree<K: TreeKey + Ord, V: VmState>(
        &mut self,
        name: &'static str,
        max: usize,
    ) -> Result<BTreeMap<K, V>, LoadError> {
        self.within(Step::Field(name), |input| {
            let count = u32::load(input)?;
            let count = input.check_count(count.into(), max)?;
            let mut tree = BTreeMap::new();
            while input.has_next()? {
                let index = tree.len();
                if index == count {
                    return Err(input.inconsistent_tree(count));
                }
                input.within(Step::Index(index), |input| {
                    let key = K::load_key(input)?;
                    match tree.entry(key) {
                        Entry::Vacant(slot) => {
                            slot.insert(V::load(input, V::VERSION)?);
                            Ok(())
                        }
                        Entry::Occupied(_) => Err(input.invalid("a key that was there before")),
                    }
                })?;
            }
            if tree.len() == count {
                Ok(tree)
            } else {
                Err(input.inconsistent_tree(count))
            }
        })
    }

    /// Reads `count` bits.
    ///
    /// # Errors
    /// `count` is negative or more than `max`, or the bits are not all there.
    pub fn bits(&mut self, name: &'static str, count: i128, max: usize) -> Result<Bits, LoadError> {
        self.within(Step::Field(name), |input| {
            let count = input.check_count(count, max)?;
            Bits::load(count, input)
        })
    }

    /// Checks that a value which was read is the receiver's.
    ///
    /// # Errors
    /// It is not.
    pub fn equal<T: PartialEq + fmt::Debug>(
        &mut self,
        name: &'static str,
        found: &T,
        expected: &T,
    ) -> Result<(), LoadError> {
        if found == expected {
            return Ok(());
        }
        self.within(Step::Field(name), |input| {
            Err(LoadError::NotEqual {
                at: input.location(),
                found: format!("{found:?}"),
                expected: format!("{expected:?}"),
            })
        })
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

    /// Reads the byte before an element of a list, or behind the last.
    fn has_next(&mut self) -> Result<bool, LoadError> {
        match self.take_array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.invalid(format_args!(
                "{other:#04x}, expected 1 before an element or 0 behind the last"
            ))),
        }
    }

    fn inconsistent_tree(&self, count: usize) -> LoadError {
        self.invalid(format_args!(
            "the tree has not the {count} nodes it should have"
        ))
    }

    /// Reads the subsections that follow the fields of `T`. Each header is offered to `take`,
    /// which hands it to [`Reader::subsection`] for every subsection that `T` has, and returns
    /// whether it was one of them.
    ///
    /// # Errors
    /// A subsection that is not known but has `T`'s name as prefix; `take`'s.
    pub fn subsections<T: VmState>(
        &mut self,
        mut take: impl FnMut(&mut Self, SubsectionHeader<'a>) -> Result<bool, LoadError>,
    ) -> Result<(), LoadError> {
        while let Some(header) = self.subsection_header(T::NAME)? {
            let at = self.location();
            if !take(self, header)? {
                return Err(LoadError::UnknownSubsection {
                    at,
                    name: String::from_utf8_lossy(header.name).into_owned(),
                    parent: T::NAME,
                });
            }
        }
        Ok(())
    }

    /// Reads the body of a subsection into `slot` if the header's name is that of `T`, and says
    /// whether it was. A repeated subsection replaces the earlier one.
    ///
    /// # Errors
    /// As for [`Reader::description`].
    pub fn subsection<T: VmState>(
        &mut self,
        header: SubsectionHeader<'a>,
        slot: &mut Option<T>,
    ) -> Result<bool, LoadError> {
        if header.name != T::NAME.as_bytes() {
            return Ok(false);
        }
        *slot = Some(self.within(Step::Subsection(T::NAME), |input| {
            input.description(header.version)
        })?);
        Ok(true)
    }

    /// The next `n` bytes as they are, for implementations of [`Field::load`].
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

    /// The error of a value that must not be, for [`Field::load`] and [`VmState::load`].
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

    fn within<T>(
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
    fn subsection_header(
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

    fn location(&self) -> Location {
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

/// The key of a node in a tree ([`Reader::tree`]): a [`VmState`], or `u64` for what QEMU calls a
/// direct key.
pub trait TreeKey: Sized {
    /// Writes the key.
    fn save_key(&self, out: &mut Writer);

    /// Reads a key.
    ///
    /// # Errors
    /// [`VmState::load`]'s.
    fn load_key(input: &mut Reader<'_>) -> Result<Self, LoadError>;
}

impl TreeKey for u64 {
    fn save_key(&self, out: &mut Writer) {
        self.save(out);
    }

    fn load_key(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        Self::load(input)
    }
}

impl<T: VmState> TreeKey for T {
    fn save_key(&self, out: &mut Writer) {
        out.description(self);
    }

    fn load_key(input: &mut Reader<'_>) -> Result<Self, LoadError> {
        T::load(input, T::VERSION)
    }
}
