//! The description of a piece of state.

use crate::{Description, LoadError, Reader, SaveError, Writer};

/// State with a name and a version: what QEMU calls a `VMStateDescription`.
///
/// On the wire a description is its fields in order, without tags, lengths or padding, followed by
/// those of its subsections that are needed. Use `#[derive(VmState)]` unless the format is one
/// that the derive cannot say.
pub trait VmState: Sized {
    /// The name: of the section (or the last part of it), and the prefix of every subsection's.
    const NAME: &'static str;
    /// The version that is written, and the newest that can be loaded.
    const VERSION: u32;
    /// The oldest version that can be loaded.
    const MINIMUM_VERSION: u32;

    /// Writes the fields and then the needed subsections.
    fn save(&self, out: &mut Writer);

    /// Reads what a sender of `version` wrote. The caller has checked that `version` lies within
    /// [`MINIMUM_VERSION`](Self::MINIMUM_VERSION) and [`VERSION`](Self::VERSION), as
    /// [`Reader::description`] does.
    ///
    /// # Errors
    /// The bytes are not such state, or end too early.
    fn load(input: &mut Reader<'_>, version: u32) -> Result<Self, LoadError>;
}

/// The bytes of `state`, at its current version.
///
/// # Errors
/// `state` contradicts itself; see [`SaveError`].
pub fn to_bytes<T: VmState>(state: &T) -> Result<Vec<u8>, SaveError> {
    let mut out = Writer::new();
    out.description(state);
    out.finish()
}

/// As [`to_bytes`], with the description of what was written.
///
/// # Errors
/// As there.
pub fn to_bytes_described<T: VmState>(state: &T) -> Result<(Vec<u8>, Description), SaveError> {
    let mut out = Writer::describing();
    let description = out
        .description(state)
        .unwrap_or_else(|| Description::new(T::NAME, T::VERSION));
    Ok((out.finish()?, description))
}

/// The state that a sender of `version` wrote as `bytes`, all of them.
///
/// # Errors
/// The bytes are not exactly such state.
pub fn from_bytes<T: VmState>(bytes: &[u8], version: u32) -> Result<T, LoadError> {
    let mut input = Reader::complete(bytes);
    let state = input.description(version)?;
    input.finish()?;
    Ok(state)
}

/// Whether a subsection of `parent` may be called `name`: the parent's name and something more.
/// The derive asserts it when the program is compiled.
#[must_use]
pub const fn is_subsection_name(name: &str, parent: &str) -> bool {
    let (name, parent) = (name.as_bytes(), parent.as_bytes());
    if name.len() <= parent.len() || name.len() > 255 {
        return false;
    }
    let mut i = 0;
    while i < parent.len() {
        if name[i] != parent[i] {
            return false;
        }
        i += 1;
    }
    true
}
