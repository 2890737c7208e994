//! A driver against a peer that plays a script, in memory, with a VM that only keeps books.
//!
//! The script is made of bytes: they choose whole messages and checkpoints, parts of them, what is
//! changed in them, and what happens meanwhile (see [`script`]). Whatever it is, what [`secondary`]
//! and [`primary`] assert has to hold. Both are called by the tests here and by the fuzz targets.

mod channel;
mod oracle;
mod primary;
mod script;
mod secondary;
mod vm;
mod world;

pub use self::primary::primary;
pub use self::secondary::secondary;
