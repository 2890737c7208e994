//! A register in etcd: one key, read and replaced through the JSON gateway that every etcd since 3.4
//! has beside its gRPC (`POST /v3/kv/range`, `POST /v3/kv/txn`).
//!
//! A read is one that etcd answers for its whole cluster (`serializable` is left false). A
//! replacement is a transaction that compares the key's `mod_revision`, which etcd counts over all
//! keys and never gives twice; 0 is that of a key that is not there. The key is bound to no lease
//! of etcd's: those last whole seconds, two at least, and one may be revoked that was just renewed.
//!
//! Every request has a connection of its own, so that no answer is taken for that of another
//! request. Of several endpoints the one that answered last is asked first; one that does not
//! answer in its part of the time is left for the next, with the same request: a transaction that
//! was carried out already then finds another revision, and what it has done is read.
//!
//! What [`EtcdOptions`] name is for `https://` endpoints, whose certificate is checked and which may be
//! shown one, and for etcd's own authentication: `POST /v3/auth/authenticate` gives a token for a user's
//! password, which goes with every request. When etcd does not know the token any more the user is
//! authenticated again and the request sent once more, within the same deadline: a request that was
//! refused for its token was not carried out.

mod access;
mod address;
mod codec;
mod error;
mod options;
#[cfg(feature = "etcd-tls")]
mod tls;

use std::time::{Duration, Instant};

use access::Access;
use codec::CodecError;
use migration_stream::Escaped;

use super::register::{Content, Register};
use super::{ArbiterError, RegisterArbiter, chain};

pub use address::{AddressError, EtcdAddress};
pub use error::EtcdError;
pub use options::{Credential, EtcdOptions, OptionsError};

/// An arbiter in etcd.
pub type Etcd = RegisterArbiter<Gateway>;

/// The least that an endpoint is given to answer in, where others may be asked after it.
const SHARE: Duration = Duration::from_millis(200);

/// One key of an etcd.
#[derive(Debug)]
pub struct Gateway {
    /// `http://HOST:PORT` or `https://HOST:PORT`, the one to be asked first in front.
    endpoints: Vec<String>,
    is_https: bool,
    key: Vec<u8>,
    options: EtcdOptions,
    access: Access,
    /// What the answers have in common.
    history: History,
}

/// What is known of the cluster from its answers.
#[derive(Clone, Copy, Debug, Default)]
struct History {
    cluster: Option<u64>,
    revision: u64,
}

impl Gateway {
    /// The key `key` at these endpoints. Nothing is sent yet.
    ///
    /// # Errors
    /// See [`OptionsError`].
    pub fn new(
        address: &EtcdAddress,
        key: &str,
        options: EtcdOptions,
    ) -> Result<Self, OptionsError> {
        let access = Access::new(address.is_https(), &options)?;
        if let (Some(user), false) = (&options.user, address.is_https()) {
            tracing::warn!(
                user = user.name,
                "the password of etcd's user is sent in the clear"
            );
        }
        Ok(Self {
            endpoints: address.urls(),
            is_https: address.is_https(),
            key: key.as_bytes().to_vec(),
            options,
            access,
            history: History::default(),
        })
    }

    /// Asks one endpoint after the other.
    fn ask<T>(
        &mut self,
        path: &str,
        body: &str,
        deadline: Instant,
        decode: impl Fn(&[u8]) -> Result<(codec::Header, T), CodecError>,
    ) -> Result<T, ArbiterError> {
        let mut failure: Option<ArbiterError> = None;
        for left in (1..=self.endpoints.len()).rev() {
            let now = Instant::now();
            let whole = deadline.saturating_duration_since(now);
            if whole.is_zero() {
                break;
            }
            let share = whole / u32::try_from(left).unwrap_or(u32::MAX);
            let until = now + share.max(SHARE).min(whole);
            let Some(endpoint) = self.endpoints.first().cloned() else {
                break;
            };
            let answer = self
                .request(&endpoint, path, body, until)
                .and_then(|answer| Ok(decode(&answer)?))
                .and_then(|(header, value)| self.history.follow(header).map(|()| value));
            match answer {
                Ok(value) => return Ok(value),
                Err(error) => {
                    // What somebody has to see to is not hidden behind an endpoint that is down.
                    let earlier = failure.as_ref().and_then(EtcdError::of);
                    if !earlier.is_some_and(EtcdError::is_lasting) {
                        let what = format!("asking etcd at {endpoint}");
                        failure = Some(ArbiterError::because(what, error));
                    }
                    self.endpoints.rotate_left(1);
                }
            }
        }
        Err(failure.unwrap_or_else(|| ArbiterError::new("no time is left to ask etcd")))
    }

    /// Asks one endpoint, and again if it refuses what has been replaced in the meantime.
    fn request(
        &mut self,
        endpoint: &str,
        path: &str,
        body: &str,
        until: Instant,
    ) -> Result<Vec<u8>, EtcdError> {
        match self.access.request(endpoint, path, body, until) {
            Err(error) if error.is_lasting() && self.read_again() => {
                self.access.request(endpoint, path, body, until)
            }
            result => result,
        }
    }

    /// Are there other certificates, or another password, than there were?
    fn read_again(&mut self) -> bool {
        let changed = self.options.changed().and_then(|changed| {
            let Some(options) = changed else {
                return Ok(None);
            };
            let access = Access::new(self.is_https, &options)?;
            Ok(Some((options, access)))
        });
        match changed {
            Ok(Some((options, access))) => {
                tracing::info!("etcd's certificates or password were replaced");
                (self.options, self.access) = (options, access);
                true
            }
            Ok(None) => false,
            // Certificate and key are not replaced at one moment.
            Err(error) => {
                let error = chain(&error);
                let error = Escaped(&error);
                tracing::warn!(%error, "etcd's certificates or password were replaced by what is none");
                false
            }
        }
    }
}

impl History {
    fn follow(&mut self, header: codec::Header) -> Result<(), EtcdError> {
        let (found, expected) = (header.cluster, *self.cluster.get_or_insert(header.cluster));
        if found != expected {
            return Err(EtcdError::OtherCluster { found, expected });
        }
        if header.revision < self.revision {
            return Err(EtcdError::Backwards {
                found: header.revision,
                last: self.revision,
            });
        }
        self.revision = header.revision;
        Ok(())
    }
}

impl Register for Gateway {
    fn kind(&self) -> &'static str {
        "etcd"
    }

    fn read(&mut self, deadline: Instant) -> Result<Content, ArbiterError> {
        let body = codec::range(&self.key);
        let key = self.key.clone();
        self.ask("/v3/kv/range", &body, deadline, |answer| {
            codec::range_answer(answer, &key)
        })
    }

    fn replace(
        &mut self,
        version: u64,
        text: &str,
        deadline: Instant,
    ) -> Result<bool, ArbiterError> {
        let body = codec::replace(&self.key, version, text.as_bytes());
        self.ask("/v3/kv/txn", &body, deadline, |answer| {
            codec::replace_answer(answer, version)
        })
    }
}

#[cfg(test)]
mod tests;
