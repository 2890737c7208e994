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

mod address;
mod codec;

use std::time::{Duration, Instant};

use super::register::{Content, ENTRY_LEN, Register};
use super::{ArbiterError, RegisterArbiter};

pub use address::{AddressError, EtcdAddress};
pub use codec::CodecError;

/// An arbiter in etcd.
pub type Etcd = RegisterArbiter<Gateway>;

/// The most that an answer may have, bytes: an entry in base64, and what etcd says beside it.
const ANSWER: u64 = 8 * 1024;
const _: () = assert!((ENTRY_LEN as u64) * 4 < ANSWER);

/// The least that an endpoint is given to answer in, where others may be asked after it.
const SHARE: Duration = Duration::from_millis(200);

/// One key of an etcd.
#[derive(Debug)]
pub struct Gateway {
    /// `http://HOST:PORT`, the one to be asked first in front.
    endpoints: Vec<String>,
    key: Vec<u8>,
    agent: ureq::Agent,
    /// What the answers have in common.
    history: History,
}

/// What is known of the cluster from its answers.
#[derive(Clone, Copy, Debug, Default)]
struct History {
    cluster: Option<u64>,
    revision: u64,
}

/// Why etcd has given no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// No connection, or no answer in time.
    #[error("no answer")]
    Transport(#[source] ureq::Error),
    /// It refused the request.
    #[error("refused with status {status}: {message}")]
    Refused {
        /// Of HTTP.
        status: u16,
        /// The beginning of what it said.
        message: String,
    },
    /// The answer is none.
    #[error("an answer that is none")]
    Codec(#[from] CodecError),
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

impl Gateway {
    /// The key `key` at these endpoints. Nothing is sent yet.
    #[must_use]
    pub fn new(address: &EtcdAddress, key: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            // Whatever the environment says: these are the addresses.
            .proxy(None)
            .max_redirects(0)
            .http_status_as_error(false)
            .max_idle_connections(0)
            .max_response_header_size(4096)
            .build()
            .into();
        Self {
            endpoints: address.urls(),
            key: key.as_bytes().to_vec(),
            agent,
            history: History::default(),
        }
    }

    /// Asks one endpoint after the other.
    fn ask<T>(
        &mut self,
        path: &str,
        body: &str,
        deadline: Instant,
        decode: impl Fn(&[u8]) -> Result<(codec::Header, T), CodecError>,
    ) -> Result<T, ArbiterError> {
        let mut failure = None;
        for left in (1..=self.endpoints.len()).rev() {
            let now = Instant::now();
            let whole = deadline.saturating_duration_since(now);
            if whole.is_zero() {
                break;
            }
            let share = whole / u32::try_from(left).unwrap_or(u32::MAX);
            let Some(endpoint) = self.endpoints.first() else {
                break;
            };
            let answer = self
                .post(
                    &format!("{endpoint}{path}"),
                    body,
                    share.max(SHARE).min(whole),
                )
                .and_then(|answer| Ok(decode(&answer)?))
                .and_then(|(header, value)| self.history.follow(header).map(|()| value));
            match answer {
                Ok(value) => return Ok(value),
                Err(error) => {
                    let what = format!("asking etcd at {endpoint}");
                    failure = Some(ArbiterError::because(what, error));
                    self.endpoints.rotate_left(1);
                }
            }
        }
        Err(failure.unwrap_or_else(|| ArbiterError::new("no time is left to ask etcd")))
    }

    fn post(&self, url: &str, body: &str, limit: Duration) -> Result<Vec<u8>, EtcdError> {
        let mut response = self
            .agent
            .post(url)
            .config()
            .timeout_global(Some(limit))
            .build()
            .content_type("application/json")
            .send(body)
            .map_err(EtcdError::Transport)?;
        let status = response.status().as_u16();
        let answer = response
            .body_mut()
            .with_config()
            .limit(ANSWER)
            .read_to_vec()
            .map_err(EtcdError::Transport)?;
        if status == 200 {
            Ok(answer)
        } else {
            let message = codec::refusal(&answer);
            Err(EtcdError::Refused { status, message })
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
