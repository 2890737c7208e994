//! The heartbeat of a pair: its options, and what `x-query-colo-heartbeat` answers.

use std::error::Error;
use std::sync::{Arc, Weak};
use std::time::Duration;

use clap::Args;
use colo_heartbeat::arbiter::Owner;
use colo_heartbeat::{
    Endpoint, Guest, Heartbeat, HeartbeatReport, OnHeartbeatLoss, PeerState, Phase, Rhythm, Role,
    StopReason,
};
use migration_net::Address;
use qmp_types::ColoHeartbeat;
use uuid::Uuid;

use crate::arbiter::ArbiterArgs;
use crate::migration::Migration;

/// How the other side's life is watched.
#[derive(Clone, Debug, Args)]
pub struct HeartbeatArgs {
    /// Exchange heartbeats here, tcp:HOST:PORT or unix:PATH: with --incoming this side listens,
    /// otherwise it connects. Needs --uuid, the same on both sides.
    #[arg(long = "heartbeat", value_name = "ADDRESS", requires = "uuid")]
    address: Option<Address>,
    /// Between two beats, ms.
    #[arg(long, value_name = "MS", default_value_t = 50, requires = "address",
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    heartbeat_interval: u64,
    /// How many beats have to be missing for the other side to be lost.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "address",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    heartbeat_missed: u32,
    /// What to do then: take over (one side at most, the other stops), ask the arbiter (both sides),
    /// or stop for good.
    #[arg(
        long,
        default_value = "stop",
        value_name = "take-over|ask|stop",
        requires = "address"
    )]
    on_heartbeat_loss: LossArg,
    #[command(flatten)]
    arbiter: ArbiterArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LossArg {
    TakeOver,
    Ask,
    Stop,
}

impl HeartbeatArgs {
    /// Is the other side's life watched?
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.address.is_some()
    }

    /// Is an arbiter asked who goes on?
    #[must_use]
    pub fn asks(&self) -> bool {
        self.address.is_some() && self.on_heartbeat_loss == LossArg::Ask
    }

    /// Starts what was asked for.
    ///
    /// # Errors
    /// The address cannot be listened on, or the arbiter cannot be had.
    pub fn start(
        &self,
        migration: &Arc<Migration>,
        uuid: Option<Uuid>,
        incoming: bool,
    ) -> Result<(), Box<dyn Error>> {
        let (Some(address), Some(uuid)) = (&self.address, uuid) else {
            if self.arbiter.is_named() {
                return Err(
                    "--arbiter is asked when --heartbeat misses the other side: it needs one"
                        .into(),
                );
            }
            return Ok(());
        };
        let session = uuid.into_bytes();
        let (role, endpoint) = if incoming {
            (Role::Secondary, Endpoint::Listen(address.clone()))
        } else {
            (Role::Primary, Endpoint::Connect(address.clone()))
        };
        let on_loss = match self.on_heartbeat_loss {
            LossArg::TakeOver => OnHeartbeatLoss::TakeOver,
            LossArg::Ask => OnHeartbeatLoss::Ask,
            LossArg::Stop => OnHeartbeatLoss::Stop,
        };
        let rhythm = Rhythm::new(role, session, on_loss)?
            .interval(Duration::from_millis(self.heartbeat_interval))
            .missed(self.heartbeat_missed);
        let arbiter = self.arbiter.arbiter(uuid, Owner::new(rhythm.process))?;
        let guest = Arc::new(Fence(Arc::downgrade(migration)));
        let heartbeat = Heartbeat::start(
            rhythm,
            endpoint,
            migration.failover().clone(),
            arbiter,
            guest,
        )
        .map_err(|error| format!("heartbeat at {address}: {error}"))?;
        migration.set_heartbeat(heartbeat);
        Ok(())
    }
}

struct Fence(Weak<Migration>);

impl Guest for Fence {
    fn stop_for_good(&self, reason: StopReason) {
        // COLO has seen to a guest that is not fit to run, or whose process ends.
        if reason == StopReason::Unfit {
            return;
        }
        if let Some(migration) = self.0.upgrade() {
            migration.fence(&reason.to_string());
        }
    }

    fn suspend(&self) {
        if let Some(migration) = self.0.upgrade() {
            migration.suspend();
        }
    }

    fn resume(&self) {
        if let Some(migration) = self.0.upgrade() {
            migration.let_run();
        }
    }
}

/// What QMP says of a heartbeat.
#[must_use]
pub fn describe(report: &HeartbeatReport) -> ColoHeartbeat {
    let whole = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
    let (address, listening) = match &report.endpoint {
        Endpoint::Listen(address) => (address, true),
        Endpoint::Connect(address) => (address, false),
    };
    ColoHeartbeat {
        peer: match report.peer {
            PeerState::Unheard => "unheard",
            PeerState::Alive => "alive",
            PeerState::Lost => "lost",
        }
        .to_owned(),
        peer_age_us: report.peer_age.map(|age| whole(age.as_micros())),
        connected: report.connected,
        address: address.to_string(),
        listening,
        interval: whole(report.rhythm.interval.as_millis()),
        missed: report.rhythm.missed,
        policy: report.rhythm.on_loss.to_string(),
        state: match report.phase {
            Phase::Paired => "paired",
            Phase::Asking => "asking",
            Phase::Alone => "alone",
            Phase::Stopped => "stopped",
            Phase::Suspended => "suspended",
        }
        .to_owned(),
        stop_reason: report.stop.map(|reason| reason.to_string()),
        arbiter: report.arbiter.to_owned(),
        arbiter_state: report.answer.clone(),
        generation: report.generation,
        refused: report.refused.clone(),
    }
}
