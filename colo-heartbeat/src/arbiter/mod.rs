//! Who may run the guest when the two sides of a pair have lost each other.
//!
//! Neither side can know whether the other is dead or only unreachable, so both ask a third party.
//! Ownership begins with the primary, which holds the guest by a *lease* from before COLO begins: it
//! renews the lease, and suspends its guest when the lease expires. A side that is to go on alone *claims*
//! the guest for good. The primary is granted it at once as long as it is the owner. The secondary is
//! granted it when the primary's lease has expired, or at once when the primary is known to be gone, and
//! never again when the primary has claimed.
//!
//! ```text
//!           hold (primary)           claim (primary)
//! nobody --------------------> paired -----------------> alone: the primary
//!                                 |  lease has expired,
//!                                 |  claim (secondary)
//!                                 +---------------------> alone: the secondary
//! ```
//! *Alone* has no lease: the survivor does not depend on the arbiter any more.
//!
//! | arbiter | where |
//! |---|---|
//! | [`Manual`] | nowhere: an operator decides |
//! | [`LockFile`] | a file on storage that both hosts have |
//! | [`RegisterArbiter`] | a value on any service that both reach and that can compare and replace |
//! | `Etcd` | that, in etcd (feature `etcd`; by TLS with `etcd-tls`) |
//!
//! The rules are in [`raw`](crate::raw), without I/O.

#[cfg(feature = "etcd")]
pub mod etcd;
#[cfg(feature = "etcd")]
mod foreign;
mod lock_file;
pub(crate) mod record;
pub(crate) mod register;

use std::fmt;
use std::time::{Duration, Instant};

use migration_stream::Escaped;

#[cfg(feature = "etcd")]
pub use etcd::{Etcd, EtcdAddress, EtcdOptions, Gateway};
pub use lock_file::LockFile;
pub use record::Owner;
pub use register::{Content, Register, RegisterArbiter};

/// An arbiter's answer.
#[derive(Debug)]
pub enum Answer {
    /// This side owns the guest.
    Won(Grant),
    /// Another side owns it for good.
    Lost(Owner),
    /// The arbiter did not answer in time, or its answer could not be understood. The owner is unchanged.
    Unreachable(ArbiterError),
}

/// A lease, or ownership for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// How often ownership has changed hands.
    pub generation: u64,
    /// When the guest has to be paused unless the lease was renewed; `None` if ownership is final. It is reckoned
    /// from before the arbiter was asked, and a quarter earlier than the lease's end: the time to stop a guest
    /// in.
    pub until: Option<Instant>,
}

/// Why an arbiter gave no answer.
#[derive(Debug, thiserror::Error)]
#[error("{what}", what = Escaped(.what))]
pub struct ArbiterError {
    /// What was attempted.
    pub what: String,
    /// Why it failed.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ArbiterError {
    /// Returns an error without a cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            source: None,
        }
    }

    /// Returns it and its causes in one line, escaped.
    #[must_use]
    pub fn chain(&self) -> String {
        Escaped(&chain(self)).to_string()
    }

    /// Returns an error with its cause.
    pub fn because(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            what: what.into(),
            source: Some(source.into()),
        }
    }
}

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A third party that says which side of a pair may run the guest.
///
/// Used by one thread, which may wait in it: that thread does nothing else.
pub trait Arbiter: Send {
    /// What it is, for reports: `none`, `file`, `etcd`.
    fn kind(&self) -> &'static str;

    /// How long a lease that is not renewed lasts; `None` for an arbiter that gives none. The holder
    /// stops its guest after three quarters of it ([`Grant::until`]).
    fn term(&self) -> Option<Duration>;

    /// The primary of a pair takes the lease, or renews it.
    fn hold(&mut self, deadline: Instant) -> Answer;

    /// Takes the guest for good, to go on alone. Waits for another's lease to run out, until
    /// `deadline`; [`Answer::Lost`] if that is still being renewed then.
    fn claim(&mut self, deadline: Instant) -> Answer;

    /// Gives the guest up, which stands still for good. What cannot be told is left to run
    /// out.
    fn release(&mut self, deadline: Instant);
}

/// When a guest has to stand still whose lease was last asked for at `asked`: the quarter of the
/// term that is left is to stop it in.
fn until(asked: Instant, term: Duration) -> Instant {
    migration_stream::io::deadline_from(asked, term - term / 4)
}

/// The longest wait between two looks at another's record.
pub(crate) const POLL: Duration = Duration::from_millis(10);

/// No arbiter: only the operator's word (QMP `x-colo-lost-heartbeat`) lets a side go on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manual;

impl Arbiter for Manual {
    fn kind(&self) -> &'static str {
        "none"
    }

    fn term(&self) -> Option<Duration> {
        None
    }

    fn hold(&mut self, _deadline: Instant) -> Answer {
        Answer::Won(Grant {
            generation: 0,
            until: None,
        })
    }

    fn claim(&mut self, _deadline: Instant) -> Answer {
        Answer::Unreachable(ArbiterError::new(
            "there is no arbiter: an operator decides",
        ))
    }

    fn release(&mut self, _deadline: Instant) {}
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Won(grant) => write!(f, "won, generation {}", grant.generation),
            Self::Lost(owner) => write!(f, "lost to {owner}"),
            Self::Unreachable(error) => error.fmt(f),
        }
    }
}
