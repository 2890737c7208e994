//! Postcopy as codecs: the order of its commands, what stands inside a package, bitmaps of received
//! pages, requests for pages and the records that answer them (`migration/savevm.c`,
//! `migration/postcopy-ram.c` and `migration/ram.c`, QEMU 11.1). Nothing here runs a guest.
//!
//! ```text
//! main stream  ADVISE  START ram  PART ram …  RAM_DISCARD …  PACKAGED  PART ram …  END ram  EOF
//! package      LISTEN  FULL …  PING 3  PING 0x42  RUN
//! return path  REQ_PAGES_ID  REQ_PAGES …
//! recovery     RECV_BITMAP (answered with the bitmap) …  RESUME (answered with RESUME_ACK)
//! ```
//!
//! A package is a stream inside the main stream, without a header of its own: the length of its
//! command is all that bounds it. No description follows the EOF of a stream that went over to
//! postcopy.
//!
//! | type | what |
//! |---|---|
//! | [`PostcopyOrder`] | which command may come when |
//! | [`PackageDecoder`], [`PackageEncoder`] | the stream inside a package |
//! | [`ReceivedBitmap`] | which pages of a block the destination has |
//! | [`RequestDecoder`], [`RequestEncoder`] | which pages it wants next |
//! | [`PostcopyRecords`] | pages that come after the switch, on the main stream or the preempt channel |

mod bitmap;
mod error;
mod order;
mod package;
mod records;
mod requests;
mod state;

pub use bitmap::ReceivedBitmap;
pub use error::{BitmapError, OrderError, PackageError};
pub use order::{EndOfStream, PostcopyOrder};
pub use package::{PackageDecoder, PackageEncoder, PackageItem, PackageStep};
pub use records::PostcopyRecords;
pub use requests::{PageRequest, RequestDecoder, RequestEncoder, RequestError};
pub use state::PostcopyState;
