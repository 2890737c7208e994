//! The heartbeat of a COLO pair. Not part of QEMU's schema: QEMU has none.

use serde::{Deserialize, Serialize};

/// The answer to `x-query-colo-heartbeat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ColoHeartbeat {
    /// The other side's liveness: `unheard`, `alive` or `lost`.
    pub peer: String,
    /// The age of the other side's last beat, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_age_us: Option<u64>,
    /// Whether there is a connection with beats of the other side.
    pub connected: bool,
    /// Where beats are exchanged, as a URI, and whether this side listens there.
    pub address: String,
    /// See `address`.
    pub listening: bool,
    /// Between two beats, ms.
    pub interval: u64,
    /// How many beats have to be missing for the other side to be lost.
    pub missed: u32,
    /// The policy when the other side is lost: `take-over`, `ask` or `stop`.
    pub policy: String,
    /// This side's phase: `paired`, `asking`, `alone`, `stopped` or `suspended`.
    pub state: String,
    /// Why this side's guest was stopped for good, or is suspended until the arbiter answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// Which arbiter is asked: `none`, `file`, `etcd`.
    pub arbiter: String,
    /// The arbiter's last answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter_state: Option<String>,
    /// How often ownership had changed hands at this side's last grant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Why a beat was last refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}
