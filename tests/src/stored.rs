//! Guests in files.

use std::sync::Arc;

use stream_relay::Access;
use stream_relay::guest::Guest;
use stream_relay::incoming::{Incoming, IncomingConfig};

use crate::{PATIENCE, Result};

/// The guest that a QEMU, or whoever writes such streams, has migrated to `address`, which is a `file:`.
///
/// # Errors
/// There is none, or not all of it.
pub fn read(address: &str) -> Result<Guest> {
    let incoming = Incoming::open(IncomingConfig {
        from: address.parse()?,
        channels: None,
        access: Access::default(),
        xbzrle: false,
        machine_version: None,
        uuid: [0; 16],
        max_memory: 1 << 30,
        max_device_state: 64 << 20,
        without_return_path: true,
        timeout: PATIENCE,
        pause_timeout: PATIENCE,
    })?;
    Ok(incoming.receive(&Arc::default())?.guest)
}
