//! A block device: one queue, and a disk behind a [`BlockBackend`].
//!
//! ```text
//! queue --checked--> request --copy of the data--> backend (threads, io_uring)
//!   ^                                                 |
//!   +--- status, data of a read <--- event <----------+
//! ```
//!
//! The data of a request passes through memory of the VMM's, once: what is written to the disk is
//! what was read from guest memory, whatever the guest does with its buffer meanwhile. Data reaches
//! guest memory through `vm-memory`, whose dirty bitmap sees it.

mod backend;
mod engine;
mod file;
mod pool;
mod request;
mod stats;
#[cfg(feature = "io-uring")]
mod uring;

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::Instant;

pub use backend::{
    ALIGNMENT, BlockBackend, Buffer, Completion, Geometry, Operation, RequestId, SECTOR,
};
pub use engine::{Engine, Started};
pub use file::{DiskError, DiskFile, DiskOptions};
pub use pool::ThreadPool;
use request::{Kind, Request, Status};
pub use request::{MAX_DATA, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};
pub use stats::{BlockStats, KindStats, RequestKind};
#[cfg(feature = "io-uring")]
pub use uring::{IoUring, UringError};
use virtio_bindings::virtio_blk as spec;
use vm_memory::GuestMemory;
use vmstate::VmState;

use crate::device::{BATCH, BATCH_BYTES, Context, Model, Progress, Source};
use crate::ring::{Ring, RingError, Segments};
use crate::rng::RING_FEATURES;
use crate::state::{StateError, TransportState};
use crate::transport::Identity;

/// The most descriptors in the queue.
const QUEUE_SIZE: u16 = 256;
/// The most data of one descriptor that a driver is told to use, bytes.
const MAX_SEGMENT: u32 = 64 << 10;
/// The most data under way at once, bytes. A request that would be beyond waits in its queue.
pub const MAX_UNDER_WAY: u64 = 4 * MAX_DATA;

const DEPENDENCIES: &[(u64, u64)] = &[(
    bit(spec::VIRTIO_BLK_F_CONFIG_WCE),
    bit(spec::VIRTIO_BLK_F_FLUSH),
)];

/// Offset of the switch of the write cache in the configuration space.
const CONFIG_WRITEBACK: u64 = 32;
const CONFIG_BYTES: usize = 60;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Told of what a disk fails. It is called under the device's lock: it must neither wait nor call
/// the device.
pub trait BlockObserver: Debug + Send {
    /// A request failed, and the guest gets an error: the event `BLOCK_IO_ERROR`, action `report`.
    fn io_error(&mut self, kind: RequestKind, error: &io::Error);
}

/// The serial number that a driver can read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Serial([u8; spec::VIRTIO_BLK_ID_BYTES as usize]);

impl Serial {
    /// Returns a serial number of at most 20 printable ASCII characters.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let mut serial = Self::default();
        let place = serial.0.get_mut(..text.len())?;
        place.copy_from_slice(text.as_bytes());
        text.bytes()
            .all(|byte| byte == b' ' || byte.is_ascii_graphic())
            .then_some(serial)
    }
}

/// The block device.
#[derive(Debug)]
pub struct Blk {
    backend: Box<dyn BlockBackend>,
    geometry: Geometry,
    serial: Serial,
    observer: Option<Box<dyn BlockObserver>>,
    stats: BlockStats,
    features: u64,
    /// What the driver has set; it counts if it can set it.
    writeback: bool,
    /// Which driver the requests are of: counted up by a reset.
    driver: u64,
    next_id: u64,
    under_way: HashMap<RequestId, UnderWay>,
    bytes_under_way: u64,
    /// Ended by the backend, and not told to the driver yet.
    ended: VecDeque<Completion>,
}

/// A request that the backend has.
#[derive(Debug)]
struct UnderWay {
    driver: u64,
    head: u16,
    kind: RequestKind,
    data: Segments,
    status: Segments,
    writable: u32,
    bytes: u64,
    /// Memory that it takes up here.
    held: u64,
    begun: Instant,
}

impl Blk {
    /// Returns a device of the disk behind `backend`.
    #[must_use]
    pub fn new(backend: Box<dyn BlockBackend>, serial: Serial) -> Self {
        Self {
            geometry: backend.geometry(),
            backend,
            serial,
            observer: None,
            stats: BlockStats::default(),
            features: 0,
            writeback: true,
            driver: 0,
            next_id: 0,
            under_way: HashMap::new(),
            bytes_under_way: 0,
            ended: VecDeque::new(),
        }
    }

    /// Has an observer told of failed requests.
    pub fn set_observer(&mut self, observer: Box<dyn BlockObserver>) {
        self.observer = Some(observer);
    }

    /// Returns the counters.
    #[must_use]
    pub const fn stats(&self) -> BlockStats {
        self.stats
    }

    /// Returns what the disk is like.
    #[must_use]
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether a write may stay in a cache until the driver flushes. A driver that cannot flush has
    /// every write stable when it completes.
    const fn write_cache(&self) -> bool {
        if self.features & bit(spec::VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            self.writeback
        } else {
            self.features & bit(spec::VIRTIO_BLK_F_FLUSH) != 0
        }
    }

    /// Whether requests of a driver before this one have not ended: they come first.
    fn has_old_requests(&self) -> bool {
        (self.under_way.values()).any(|request| request.driver != self.driver)
    }

    /// Takes requests from the queue.
    fn take<M: GuestMemory>(&mut self, ring: &mut Ring, memory: &M) -> Result<Progress, RingError> {
        ring.disarm(memory)?;
        let mut copied = 0;
        for _ in 0..BATCH {
            if copied >= BATCH_BYTES {
                break;
            }
            if self.under_way.len() >= ring.size().into() {
                // An end of one of them is what is waited for.
                return Ok(Progress::Done);
            }
            let Some(chain) = ring.pop(memory)? else {
                return Ok(Progress::Done);
            };
            let request = Request::parse(chain, self.geometry, memory)?;
            let held = request.data.len();
            if self.bytes_under_way > 0 && self.bytes_under_way.saturating_add(held) > MAX_UNDER_WAY
            {
                ring.undo_pop();
                return Ok(Progress::Done);
            }
            copied += held;
            self.begin(request, ring, memory)?;
        }
        Ok(Progress::More)
    }

    fn begin<M: GuestMemory>(
        &mut self,
        request: Request,
        ring: &mut Ring,
        memory: &M,
    ) -> Result<(), RingError> {
        let fua = !self.write_cache();
        let len = request.data.len();
        let buffer = || Buffer::new(usize::try_from(len).unwrap_or(usize::MAX));
        let (kind, bytes, operation) = match request.kind {
            Kind::Read { offset } => {
                let buffer = buffer();
                (RequestKind::Read, len, Operation::Read { offset, buffer })
            }
            Kind::Write { offset } => {
                let mut data = buffer();
                request.data.read(memory, data.bytes_mut())?;
                let data = Arc::new(data);
                let write = Operation::Write { offset, data, fua };
                (RequestKind::Write, len, write)
            }
            Kind::Flush => (RequestKind::Flush, 0, Operation::Flush),
            Kind::Discard { offset, len } => {
                (RequestKind::Unmap, len, Operation::Discard { offset, len })
            }
            Kind::Zero { offset, len, unmap } => {
                let zero = Operation::Zero {
                    offset,
                    len,
                    unmap,
                    fua,
                };
                (RequestKind::Write, len, zero)
            }
            Kind::Id => {
                request.data.write(memory, &self.serial.0)?;
                return answer(ring, memory, &request, Status::Ok);
            }
            Kind::Invalid(status, counted) => {
                if let Some(kind) = counted {
                    self.stats.of(kind).invalid_operations += 1;
                }
                return answer(ring, memory, &request, status);
            }
        };
        let held = request.data.len();
        let id = RequestId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.bytes_under_way += held;
        let under_way = UnderWay {
            driver: self.driver,
            head: request.head,
            kind,
            data: request.data,
            status: request.status,
            writable: request.writable,
            bytes,
            held,
            begun: Instant::now(),
        };
        self.under_way.insert(id, under_way);
        self.backend.submit(id, operation);
        Ok(())
    }

    /// Ends a request that the backend has ended.
    fn end<M: GuestMemory>(
        &mut self,
        completion: &Completion,
        ring: Option<&mut Ring>,
        memory: &M,
    ) -> Result<(), RingError> {
        let Some(request) = self.under_way.remove(&completion.id) else {
            tracing::error!(id = completion.id.0, "a disk has ended a request twice");
            return Ok(());
        };
        self.bytes_under_way = self.bytes_under_way.saturating_sub(request.held);
        let counters = self.stats.of(request.kind);
        let status = match &completion.result {
            Ok(()) => {
                counters.done(request.bytes, request.begun.elapsed());
                Status::Ok
            }
            Err(error) => {
                counters.failed_operations += 1;
                if let Some(observer) = &mut self.observer {
                    observer.io_error(request.kind, error);
                }
                if error.kind() == io::ErrorKind::Unsupported {
                    Status::Unsupported
                } else {
                    Status::IoError
                }
            }
        };
        // A driver before this one is not told: the memory is not its own any more.
        let Some(ring) = ring.filter(|_| request.driver == self.driver) else {
            return Ok(());
        };
        if status == Status::Ok
            && request.kind == RequestKind::Read
            && let Some(buffer) = &completion.buffer
        {
            request.data.write(memory, buffer.bytes())?;
        }
        request.status.write(memory, &[status.byte()])?;
        ring.push(memory, request.head, request.writable)
    }
}

fn answer<M: GuestMemory>(
    ring: &mut Ring,
    memory: &M,
    request: &Request,
    status: Status,
) -> Result<(), RingError> {
    request.status.write(memory, &[status.byte()])?;
    ring.push(memory, request.head, request.writable)
}

/// The state of a block device. The disk's contents are not part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "virtio-blk", version = 1)]
pub struct BlkState {
    /// Registers and queues.
    #[vmstate(nested)]
    pub transport: TransportState,
    /// Length of the disk, sectors.
    pub capacity: u64,
    /// Whether the driver wants a write cache.
    pub writeback: bool,
}

impl Model for Blk {
    type State = BlkState;

    fn identity(&self) -> Identity {
        let mut features = RING_FEATURES
            | bit(spec::VIRTIO_BLK_F_SIZE_MAX)
            | bit(spec::VIRTIO_BLK_F_SEG_MAX)
            | bit(spec::VIRTIO_BLK_F_BLK_SIZE)
            | bit(spec::VIRTIO_BLK_F_TOPOLOGY)
            | bit(spec::VIRTIO_BLK_F_FLUSH);
        features |= if self.geometry.read_only {
            bit(spec::VIRTIO_BLK_F_RO)
        } else {
            bit(spec::VIRTIO_BLK_F_CONFIG_WCE)
                | bit(spec::VIRTIO_BLK_F_DISCARD)
                | bit(spec::VIRTIO_BLK_F_WRITE_ZEROES)
        };
        Identity {
            device_id: virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
            features,
            dependencies: DEPENDENCIES,
            queue_sizes: &[QUEUE_SIZE],
        }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.geometry.length / SECTOR).to_le_bytes());
        put(8, &MAX_SEGMENT.to_le_bytes());
        // Header and status are descriptors as well.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &512u32.to_le_bytes());
        let block = u64::from(self.geometry.physical_block) / SECTOR;
        let exponent = block.checked_ilog2().unwrap_or(0);
        put(24, &[u8::try_from(exponent).unwrap_or(0)]);
        put(26, &u16::try_from(block).unwrap_or(1).to_le_bytes());
        put(32, &[self.writeback.into()]);
        put(34, &1u16.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &u32::try_from(block).unwrap_or(1).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (CONFIG_WRITEBACK, [value]) = (offset, data) {
            self.writeback = *value != 0;
        }
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        self.features = features;
        Ok(())
    }

    fn reset(&mut self) {
        self.driver = self.driver.wrapping_add(1);
        self.features = 0;
        self.writeback = true;
    }

    fn process<M: GuestMemory>(
        &mut self,
        queue: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        let Some(Some(ring)) = context.rings.get_mut(queue) else {
            return Ok(Progress::Done);
        };
        if self.has_old_requests() {
            return Ok(Progress::Done);
        }
        self.take(ring, context.memory)
    }

    fn sources(&self, _live: bool) -> Vec<Source> {
        vec![Source {
            fd: self.backend.event(),
            readable: true,
            writable: false,
            token: 0,
        }]
    }

    fn ready<M: GuestMemory>(
        &mut self,
        _token: u32,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        let mut ended = Vec::new();
        self.backend.completions(&mut ended);
        self.ended.extend(ended);
        let mut copied = 0;
        let mut result = Ok(());
        while (copied < BATCH_BYTES || result.is_err())
            && let Some(completion) = self.ended.pop_front()
        {
            copied += completion.buffer.as_ref().map_or(0, Buffer::len) as u64;
            // Each is ended, also when the driver has broken the queue for one: without the driver.
            let ring = context.rings.get_mut(0).and_then(Option::as_mut);
            let ring = ring.filter(|_| result.is_ok());
            result = result.and(self.end(&completion, ring, context.memory));
        }
        result?;
        Ok(if self.ended.is_empty() {
            Progress::Done
        } else {
            Progress::More
        })
    }

    fn in_flight(&self) -> usize {
        self.under_way.len()
    }

    fn save(&self, transport: TransportState) -> BlkState {
        BlkState {
            transport,
            capacity: self.geometry.length / SECTOR,
            writeback: self.writeback,
        }
    }

    fn transport(state: &BlkState) -> &TransportState {
        &state.transport
    }

    fn check(&self, state: &BlkState) -> Result<(), StateError> {
        if state.capacity == self.geometry.length / SECTOR {
            Ok(())
        } else {
            Err(StateError::Value {
                field: "capacity",
                value: state.capacity,
            })
        }
    }

    fn install(&mut self, state: BlkState) {
        self.writeback = state.writeback;
    }
}
