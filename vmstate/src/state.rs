//! The description of a piece of state.

use crate::error::{LoadError, SaveError};
use crate::reader::Reader;
use crate::schema::SchemaBuilder;
use crate::vmdesc::Description;
use crate::writer::Writer;

/// State with a name and a version: what QEMU calls a `VMStateDescription`.
///
/// On the wire a description is its fields in order, without tags, lengths or padding, followed by
/// those of its subsections that are needed. Use `#[derive(VmState)]` unless the format is one
/// that the derive cannot say.
///
/// # The derive
/// On the struct, as `#[vmstate(name = "serial", version = 3, ..)]`:
///
/// | attribute | meaning |
/// |---|---|
/// | `name = "serial"` | [`NAME`](Self::NAME) |
/// | `version = 3` | [`VERSION`](Self::VERSION) |
/// | `minimum_version = 2` | [`MINIMUM_VERSION`](Self::MINIMUM_VERSION); without it, `version` |
/// | `validate = Serial::check` | `fn(&Serial) -> Result<(), impl Display>`, called when all is read |
/// | `pre_save = Serial::prepare` | `fn(&Serial) -> Result<Serial, impl Display>`: what is written instead |
/// | `pre_load = Serial::accept` | `fn(u32) -> Result<(), impl Display>`, called with the stream's version before anything is read |
/// | `post_load = Serial::complete` | `fn(&mut Serial, u32) -> Result<(), impl Display>`, called with the stream's version when all is read, before `validate` |
///
/// On fields; a field without attributes is a [`Field`](crate::Field):
///
/// | attribute | meaning |
/// |---|---|
/// | `name = "env.regs"` | the name in the self-description, if it is not the Rust one; equal ones get a number |
/// | `info = "int32 le"` | what the self-description calls the type |
/// | `nested` | the type is a [`VmState`], or an array of such: its fields and subsections stand here, at the version that both sides have |
/// | `since = 3` | streams of older versions do not have the field |
/// | `exists = "*mode == 1"` | there are bytes only if this is true; a false one must not depend on what is not sent |
/// | `default = "expr"` | the value of a field that was not there; without it, `Default::default()` |
/// | `equal = expr` | a value other than this is refused |
/// | `nested, version = 2` | a [`VmState`] at that version, whatever its current one is |
/// | `nested, tmp` | a [`VmState`] that stands for other members; differs in the self-description only |
/// | `array` | bytes are described as elements rather than a buffer |
/// | `part = 0..16` | of an array `[T; N]`: only these elements travel, the others get their default |
/// | `len = "count"`, `max = 16` | of a `Vec<T>`: its length is in the earlier field `count`, and is at most `max`. Saving it with another length is an error. `T` is a [`Field`](crate::Field), or with `nested` a [`VmState`] |
/// | `len = expr`, `max = 16` | the same with a length that is worked out; wide enough that it cannot overflow. A number needs no `max` |
/// | `bits = count`, `max = 1024` | of [`Bits`](crate::Bits): as `len`, in bits |
/// | `pointers` | of `[Option<T>; N]`, or of a `Vec<Option<T>>` with `len` and `max`: before each a byte that says whether it is `None`. `T` is a [`VmState`] or a number |
/// | `pointers = closure` | the older form, in which only `None` has that byte: `Fn(usize) -> bool` says of an index whether the element is there |
/// | `queue`, `max = 16` | of a `Vec<T>`: before each a byte 1, behind the last a byte 0. `T` is a [`VmState`] |
/// | `tree`, `max = 16` | of a `BTreeMap<K, V>`: a count and nodes. `K` is `u64` or a [`VmState`], `V` a [`VmState`] |
/// | `subsection` | of an `Option<T>`: `T` follows the fields when it is `Some`; its name must begin with this one's |
/// | `skip` | not on the wire |
///
/// Expressions, as such or in a string, see the fields before theirs by name, as references, and
/// `version: u32`, the one of the stream. Subsections, which come after all fields, are not among
/// them. A `skip` field is what the state has when it is saved, and its `default` while a stream is
/// loaded: an `exists` that depends on one wants a default that both sides agree on.
///
/// ```
/// use vmstate::{VmState, from_bytes, to_bytes};
///
/// #[derive(VmState, Debug, PartialEq)]
/// #[vmstate(name = "board", version = 2, minimum_version = 1, validate = Board::check)]
/// struct Board {
///     mode: u8,
///     #[vmstate(exists = *mode == 1)]
///     limit: u32,
///     count: u16,
///     #[vmstate(nested, len = count, max = 64)]
///     timers: Vec<TimerState>,
///     #[vmstate(since = 2, default = "u64::from(*count)")]
///     ticks: u64,
/// }
///
/// #[derive(VmState, Debug, PartialEq)]
/// #[vmstate(name = "timer", version = 1)]
/// struct TimerState {
///     expiry: vmstate::Timer,
/// }
///
/// impl Board {
///     fn check(&self) -> Result<(), String> {
///         match self.mode {
///             0 | 1 => Ok(()),
///             mode => Err(format!("there is no mode {mode}")),
///         }
///     }
/// }
///
/// let old = from_bytes::<Board>(&[0, 0, 0], 1)?;
/// assert_eq!(old, Board { mode: 0, limit: 0, count: 0, timers: vec![], ticks: 0 });
/// assert_eq!(to_bytes(&old)?, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
///
/// let error = from_bytes::<Board>(&[2, 0, 0], 1).unwrap_err();
/// assert_eq!(error.to_string(), "byte 3: there is no mode 2");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A subsection of another name would never be found again; it does not compile:
///
/// ```compile_fail
/// use vmstate::VmState;
///
/// #[derive(VmState)]
/// #[vmstate(name = "board", version = 1)]
/// struct Board {
///     #[vmstate(subsection)]
///     extra: Option<Extra>,
/// }
///
/// #[derive(VmState)]
/// #[vmstate(name = "bord/extra", version = 1)]
/// struct Extra {}
/// ```
pub trait VmState: Sized {
    /// The name: of the section (or the last part of it), and the prefix of every subsection's.
    const NAME: &'static str;
    /// The version that is written, and the newest that can be loaded.
    const VERSION: u32;
    /// The oldest version that can be loaded.
    const MINIMUM_VERSION: u32;

    /// Writes the fields and then the needed subsections.
    fn save(&self, out: &mut Writer);

    /// Writes what a sender of `version` would, for a field with `#[vmstate(nested, version = ..)]`.
    /// Without an implementation only the current version can be written.
    fn save_at(&self, out: &mut Writer, version: u32) {
        if version == Self::VERSION {
            self.save(out);
        } else {
            out.fail(SaveError::Version {
                name: Self::NAME,
                version,
            });
        }
    }

    /// Reads what a sender of `version` wrote. The caller has checked that `version` lies within
    /// [`MINIMUM_VERSION`](Self::MINIMUM_VERSION) and [`VERSION`](Self::VERSION), as
    /// [`Reader::description`] does.
    ///
    /// # Errors
    /// The bytes are not such state, or end too early.
    fn load(input: &mut Reader<'_>, version: u32) -> Result<Self, LoadError>;

    /// Names the fields and subsections as declared, for a [`Dump`](crate::Dump). Without an
    /// implementation the description has none to tell.
    fn describe(schema: &mut SchemaBuilder) {
        let _ = schema;
    }
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
