//! The heartbeat of a COLO pair. Not part of QEMU's schema: QEMU has none.

use serde::{Deserialize, Serialize};

/// The answer to `x-query-colo-heartbeat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ColoHeartbeat {
    /// The other side: `unheard`, `alive` or `lost`.
    pub peer: String,
    /// How long ago it was last heard, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_age_us: Option<u64>,
    /// Whether there is a connection on which it was heard.
    pub connected: bool,
    /// Where beats are exchanged, as a URI, and whether this side listens there.
    pub address: String,
    /// See `address`.
    pub listening: bool,
    /// Between two beats, ms.
    pub interval: u64,
    /// How many beats have to be missing for the other side to be lost.
    pub missed: u32,
    /// What is done then: `take-over`, `ask` or `stop`.
    pub policy: String,
    /// This side: `paired`, `asking`, `alone`, `stopped` or `suspended`.
    pub state: String,
    /// Why its guest was stopped for good, or stands still until the arbiter has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// Which arbiter is asked: `none`, `file`, `etcd`.
    pub arbiter: String,
    /// What it has last answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter_state: Option<String>,
    /// How often the right to run had changed hands when this side was last given it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Why beats were last refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}
