//! Reading the members of a description.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::ops::Range;

use crate::error::LoadError;
use crate::field::Field;
use crate::nested::Nested;
use crate::pointee::Pointee;
use crate::reader::{Reader, Step, SubsectionHeader};
use crate::state::VmState;
use crate::tree_key::TreeKey;
use crate::types::Bits;

impl<'a> Reader<'a> {
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

    fn inconsistent_tree(&self, count: usize) -> LoadError {
        self.invalid(format_args!(
            "the tree has not the {count} nodes it should have"
        ))
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
}
