//! Why etcd has given no answer.

use std::error::Error;

use migration_stream::Escaped;

use super::codec::CodecError;
use crate::arbiter::ArbiterError;
use crate::arbiter::foreign::foreign;

/// Why etcd has given no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// No connection, or no answer in time.
    #[error("no answer")]
    Transport(#[source] Box<dyn Error + Send + Sync>),
    /// There was no time left to ask.
    #[error("no time is left")]
    NoTime,
    /// The certificate that it shows is not one of its authority's for this endpoint, or not any more.
    #[error("its certificate is not accepted")]
    ServerCertificate(#[source] Box<dyn Error + Send + Sync>),
    /// It does not accept the certificate of this side, or that there is none.
    #[error("it does not accept this side, by its certificate or for want of one")]
    Alert(#[source] Box<dyn Error + Send + Sync>),
    /// It has not given a token for the password.
    #[error("user \"{}\" is not authenticated", Escaped(user))]
    Authentication {
        /// Who was to be.
        user: String,
        /// Why not.
        #[source]
        source: Box<EtcdError>,
    },
    /// It refused the request.
    #[error("refused with status {status}: {message}", message = Escaped(.message))]
    Refused {
        /// Of HTTP.
        status: u16,
        /// The beginning of what it said.
        message: String,
    },
    /// The answer is none.
    #[error("an answer that is none")]
    Codec(#[source] Box<dyn Error + Send + Sync>),
    /// The endpoints belong to several clusters, which know nothing of each other.
    #[error("cluster {found:x} answers, and {expected:x} did before")]
    OtherCluster {
        /// The one that has answered now.
        found: u64,
        /// The one that had answered first.
        expected: u64,
    },
    /// It has lost what it had already said.
    #[error("revision {found} follows {last}: etcd has lost data")]
    Backwards {
        /// Of this answer.
        found: u64,
        /// Of an earlier one.
        last: u64,
    },
}

impl From<CodecError> for EtcdError {
    fn from(error: CodecError) -> Self {
        Self::Codec(foreign(&error))
    }
}

impl EtcdError {
    /// The one behind an error of the arbiter's.
    #[must_use]
    pub fn of(error: &ArbiterError) -> Option<&Self> {
        error.source.as_ref()?.downcast_ref()
    }

    /// Will the same request be refused again, until somebody changes something about etcd or about what
    /// this side shows of itself?
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::ServerCertificate(_) | Self::Alert(_) => true,
            // Of HTTP, for what is wrong about a request itself, or about who asks.
            Self::Refused { status, .. } => matches!(status, 400 | 401 | 403 | 404 | 412),
            Self::Authentication { source, .. } => source.is_lasting(),
            _ => false,
        }
    }
}
