//! A guest from its primary, up to the moment at which COLO begins.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use colo_core::{ColoStore, StoreError};
use migration_net::incoming::Incoming;
use migration_stream::io::CancelToken;
use migration_stream::precopy::{Loaded, PageIntake, Target, TargetConfig, TargetError};
use migration_stream::{
    ConfigurationRule, MachineVersion, StreamReader, TailError, TailLimits, TransportError,
};
use multifd::{ChannelError, IncomingPages, RecvChannel, RecvSet};
use ram_cache::{CacheKind, DiscardControl, DiscardInUse};
use stream_relay::guest::{Devices, Guest};
use stream_relay::memory::{HoldError, Memory};

use super::StandbyConfig;
use crate::error_chain::chain;
use crate::migration::Connections;

/// A guest that was taken over and not confirmed: its primary waits.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) guest: Guest,
    pub(super) loaded: Loaded,
    pub(super) pages: IncomingPages<ColoStore>,
}

/// Takes what a primary sends before COLO begins. An error leaves the guest to its primary.
pub(super) fn take(
    connected: Incoming,
    config: &StandbyConfig,
    connections: &Connections,
    is_refused: &Arc<AtomicBool>,
    quit: &CancelToken,
) -> Result<Arrived, TakeError> {
    let Incoming {
        main,
        prefix,
        channels,
        ..
    } = connected;
    let target_config =
        TargetConfig::new(ConfigurationRule::Any).max_devices(config.max_device_state);
    let mut reader = StreamReader::new(main.share(), &prefix);
    reader.set_cancel(quit);
    let return_path = Some(Box::new(main.share()) as _);
    let (mut target, blocks) = Target::from_announcement(target_config, reader, return_path)?;
    if blocks.ignores_shared() {
        return Err(TakeError::SharedMemory);
    }
    if !target.has_return_path() {
        return Err(TakeError::NoReturnPath);
    }
    let configuration = target.configuration().cloned();
    let configuration = configuration.ok_or(TakeError::NoConfiguration)?;
    let memory = Memory::new(blocks, config.max_memory, Arc::default())?;
    // The memory is this process's own, and nobody balloons it.
    let inhibitor = DiscardControl::new().disable()?;
    let store = ColoStore::over(CacheKind::Mirror, memory.ram(), inhibitor)?;
    let mut pages = match &config.multifd {
        None => IncomingPages::plain(store),
        Some(multifd) => {
            let version = MachineVersion::of(&configuration.machine);
            if version.is_some_and(MachineVersion::flushes_each_section) {
                target = target.flushing_each_section();
            }
            let channels = channels.into_iter().map(RecvChannel::from).collect();
            let connections = connections.clone();
            let is_refused = Arc::clone(is_refused);
            let set = RecvSet::start(store, channels, multifd, move |error| {
                // Before the main channel is cut for it, to which the two look alike.
                is_refused.store(!is_loss(error), Ordering::Release);
                connections.stop_reading_for(chain(error));
            });
            IncomingPages::multifd(set.map_err(TakeError::Channels)?)
        }
    };
    let (store, barrier) = pages.parts();
    let limits = TailLimits {
        len: config.max_device_state,
        ..TailLimits::default()
    };
    let early = target.early_sections().clone();
    let (loaded, tail) = target
        .allowing_pauses_of(config.pause_limit)
        .load_opaque(store, barrier, limits)?;
    Ok(Arrived {
        guest: Guest {
            memory: Arc::new(memory),
            configuration: Some(configuration),
            early,
            devices: Devices::without_bitmaps(tail),
        },
        loaded,
        pages,
    })
}

/// Whether a channel has lost its peer, rather than refused what the peer sent.
fn is_loss(error: &TransportError) -> bool {
    use ChannelError::{Ended, Eof, Io, NoFlush, Stalled};

    matches!(
        error.source.downcast_ref(),
        Some(Io { .. } | Eof { .. } | Ended | NoFlush { .. } | Stalled { .. })
    )
}

/// Why a guest could not be taken. It runs on at its primary.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakeError {
    /// The primary's connections did not come.
    #[error("connections of the primary")]
    Accept(#[from] migration_net::incoming::IncomingError),
    /// The stream is not sound, or broke.
    #[error("the primary's stream")]
    Stream(#[source] TargetError),
    /// The guest has more device state than is taken.
    #[error(
        "the guest has more device state than the {max} bytes that are taken: a larger \
         --max-device-state takes it"
    )]
    DeviceState {
        /// The limit, bytes.
        max: usize,
        /// Where it was exceeded.
        source: TargetError,
    },
    /// Multifd's channels.
    #[error("the primary's channels")]
    Channels(#[source] TransportError),
    /// It cannot be held.
    #[error("holding the guest")]
    Hold(#[from] HoldError),
    /// There is no memory for a checkpoint on its way.
    #[error("the ram cache")]
    Cache(#[from] StoreError),
    /// RAM is being discarded.
    #[error("the ram cache")]
    Discard(#[from] DiscardInUse),
    /// No thread or descriptor could be had.
    #[error("the host")]
    Host(#[from] std::io::Error),
    /// No threads for the flush.
    #[error("the host")]
    Pool(#[from] ram_cache::FlushPoolError),
    /// The stream has no configuration section.
    #[error("the stream does not say of which machine type the guest is")]
    NoConfiguration,
    /// Part of memory is not in the stream.
    #[error("the primary leaves shared memory out of the stream (x-ignore-shared)")]
    SharedMemory,
    /// Without a return path there is no COLO.
    #[error("the primary has opened no return path, without which there is no COLO")]
    NoReturnPath,
}

impl From<TargetError> for TakeError {
    fn from(source: TargetError) -> Self {
        match source {
            TargetError::Tail(TailError::TooLong { max, .. })
            | TargetError::DeviceTooLong { max, .. } => Self::DeviceState { max, source },
            source => Self::Stream(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_that_refuses_what_came_has_not_lost_its_peer() {
        let of = |error: ChannelError| is_loss(&TransportError::channel(1, error));
        assert!(of(ChannelError::Ended));
        assert!(of(ChannelError::Stalled { what: "a sync" }));
        assert!(!of(ChannelError::CompressedDeviceState));
        assert!(!is_loss(&TransportError::main("of another kind")));
    }
}
