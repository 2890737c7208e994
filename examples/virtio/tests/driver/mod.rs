//! The driver's side: sets a device up as a guest does, and gives it requests, good and bad.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod blk;

use std::sync::Arc;
use std::time::{Duration, Instant};

use colo_virtio::{Device, MmioDevice, Model, register};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory that knows what was written.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Bytes of guest memory.
pub const RAM: u64 = 32 << 20;
/// Where a queue's parts lie, one queue per step.
const QUEUES: u64 = 0x1_0000;
const QUEUE_STEP: u64 = 0x1_0000;
/// Where the ring of used buffers of the first queue lies.
pub const USED_RING: u64 = QUEUES + 0x8000;
/// Where buffers lie.
pub const BUFFERS: u64 = 0x20_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;

pub fn memory() -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap())
}

/// A guest with one device.
pub struct Guest<D: Model> {
    pub memory: Arc<Memory>,
    pub device: Device<D, Memory>,
    pub line: EventFd,
    /// Per queue: the next descriptor, the next available, the used that were seen.
    positions: Vec<(u16, u16, u16)>,
    pub size: u16,
}

impl<D: Model> Guest<D> {
    /// A device that runs, and was not touched.
    pub fn new(model: D) -> Self {
        let guest = Self::paused(model, memory());
        guest.device.resume();
        guest
    }

    pub fn paused(model: D, memory: Arc<Memory>) -> Self {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let for_device = Box::new(line.try_clone().unwrap());
        let device = Device::new(model, Arc::clone(&memory), for_device).unwrap();
        Self {
            memory,
            device,
            line,
            positions: vec![(0, 0, 0); 8],
            size: 64,
        }
    }

    /// A device set up with all that it offers, but for the features in `without`.
    pub fn live(model: D, without: u64) -> Self {
        let mut guest = Self::new(model);
        guest.set_up(without);
        guest
    }

    /// Takes another device over the same memory, as a migrated guest does.
    pub fn moved_to(self, model: D) -> Self {
        let other = Self::paused(model, Arc::clone(&self.memory));
        Self {
            positions: self.positions.clone(),
            size: self.size,
            ..other
        }
    }

    pub fn read(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    pub fn offered(&self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 0);
        let low = self.read(register::DEVICE_FEATURES);
        self.write(register::DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(register::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    pub fn choose(&self, features: u64) {
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(register::DRIVER_FEATURES_SEL, half);
            self.write(register::DRIVER_FEATURES, value);
        }
    }

    pub fn set_up(&mut self, without: u64) {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, 1);
        self.write(register::STATUS, 3);
        self.choose(self.offered() & !without);
        self.write(register::STATUS, 11);
        assert_eq!(self.read(register::STATUS), 11);
        for queue in 0..self.device.queue_events().len() {
            self.set_queue_up(queue as u32);
        }
        self.write(register::STATUS, 15);
        assert_eq!(self.read(register::STATUS), 15);
        self.positions.fill((0, 0, 0));
    }

    pub fn set_queue_up(&self, queue: u32) {
        let base = self.base(queue as usize);
        self.memory
            .write_slice(&[0; QUEUE_STEP as usize], GuestAddress(base))
            .unwrap();
        self.write(register::QUEUE_SEL, queue);
        self.write(register::QUEUE_NUM, self.size.into());
        self.write(register::QUEUE_DESC_LOW, base as u32);
        self.write(register::QUEUE_AVAIL_LOW, base as u32 + 0x4000);
        self.write(register::QUEUE_USED_LOW, base as u32 + 0x8000);
        self.write(register::QUEUE_READY, 1);
    }

    fn base(&self, queue: usize) -> u64 {
        QUEUES + QUEUE_STEP * queue as u64
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    pub fn put_descriptor(&self, queue: usize, index: u16, raw: (u64, u32, u16, u16)) {
        let at = self.base(queue) + 16 * u64::from(index % self.size);
        self.put_raw_descriptor(at, raw);
    }

    pub fn put_raw_descriptor(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(at, &bytes);
    }

    /// Makes a chain of these buffers available, `(address, length, whether the device writes)`, and
    /// does not notify. Returns its head.
    pub fn offer(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u16 {
        let first = self.positions[queue].0;
        for (index, (address, len, writes)) in buffers.iter().enumerate() {
            let this = first.wrapping_add(index as u16);
            let last = index + 1 == buffers.len();
            let flags = if *writes { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let next = this.wrapping_add(1) % self.size;
            self.put_descriptor(queue, this, (*address, *len, flags, next));
        }
        self.positions[queue].0 = first.wrapping_add(buffers.len() as u16);
        self.make_available(queue, first % self.size);
        first % self.size
    }

    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = self.base(queue) + 0x4000;
        let at = self.positions[queue].1;
        self.put(
            ring + 4 + 2 * u64::from(at % self.size),
            &head.to_le_bytes(),
        );
        self.positions[queue].1 = at.wrapping_add(1);
        self.memory
            .store(
                at.wrapping_add(1),
                GuestAddress(ring + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    pub fn set_available_index(&self, queue: usize, index: u16) {
        self.put(self.base(queue) + 0x4002, &index.to_le_bytes());
    }

    pub fn kick(&self, queue: u32) {
        self.write(register::QUEUE_NOTIFY, queue);
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        self.memory
            .load(
                GuestAddress(self.base(queue) + 0x8002),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap()
    }

    /// Returns the next used chain, if there is one: its head and the bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let seen = self.positions[queue].2;
        if self.used_index(queue) == seen {
            return None;
        }
        let at = self.base(queue) + 0x8004 + 8 * u64::from(seen % self.size);
        let bytes = self.get(at, 8);
        self.positions[queue].2 = seen.wrapping_add(1);
        let head = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let len = u32::from_le_bytes(bytes[4..].try_into().unwrap());
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Waits for a used chain.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        until("a used buffer", || self.used(queue))
    }

    pub fn status(&self) -> u32 {
        self.read(register::STATUS)
    }

    pub fn wait_needs_reset(&self) {
        until("NEEDS_RESET", || (self.status() & 64 != 0).then_some(()));
    }

    /// Offers a chain, notifies, and waits for its end.
    pub fn request(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> (u16, u32) {
        self.offer(queue, buffers);
        self.kick(queue as u32);
        self.wait_used(queue)
    }
}

/// Waits, not for ever, until something is there.
pub fn until<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = there() {
            return value;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "no {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

pub const LIMIT: Duration = Duration::from_secs(60);
