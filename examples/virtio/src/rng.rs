//! An entropy device: every buffer of its one queue is filled with random bytes of the host.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemory;
use vmstate::VmState;

use crate::device::{BATCH, Context, Model, Progress};
use crate::ring::RingError;
use crate::state::TransportState;
use crate::transport::Identity;

/// The most bytes that one request gets. A driver asks again for more.
pub const MAX_BYTES: usize = 4096;

/// The features of rings that all devices offer.
pub(crate) const RING_FEATURES: u64 =
    1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The entropy device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rng;

/// The state of an entropy device.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "virtio-rng", version = 1)]
pub struct RngState {
    /// Registers and queues.
    #[vmstate(nested)]
    pub transport: TransportState,
}

impl Model for Rng {
    type State = RngState;

    fn identity(&self) -> Identity {
        Identity {
            device_id: virtio_bindings::virtio_ids::VIRTIO_ID_RNG,
            features: RING_FEATURES,
            dependencies: &[],
            queue_sizes: &[64],
        }
    }

    fn reset(&mut self) {}

    fn process<M: GuestMemory>(
        &mut self,
        queue: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        let Some(Some(ring)) = context.rings.get_mut(queue) else {
            return Ok(Progress::Done);
        };
        ring.disarm(context.memory)?;
        for _ in 0..BATCH {
            let Some(chain) = ring.pop(context.memory)? else {
                return Ok(Progress::Done);
            };
            let mut bytes = [0; MAX_BYTES];
            let wanted = usize::try_from(chain.writable.len()).unwrap_or(MAX_BYTES);
            let bytes = &mut bytes[..wanted.min(MAX_BYTES)];
            // A buffer without room, or a host without entropy yet, gets none: never bytes that
            // are not random.
            let random = getrandom(&mut *bytes, GetRandomFlags::NONBLOCK).unwrap_or(0);
            let written = chain.writable.write(context.memory, &bytes[..random])?;
            ring.push(
                context.memory,
                chain.head,
                u32::try_from(written).unwrap_or(0),
            )?;
        }
        Ok(Progress::More)
    }

    fn save(&self, transport: TransportState) -> RngState {
        RngState { transport }
    }

    fn transport(state: &RngState) -> &TransportState {
        &state.transport
    }
}
