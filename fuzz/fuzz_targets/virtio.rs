//! A driver of a virtio device: register accesses, descriptors, requests and states that are made up. The
//! disk gets requests that lie in it alone, the network packets that have a frame; nothing is accessed
//! beyond guest memory; a reset gives a device that a driver can set up.
#![no_main]
#![allow(missing_docs)] // a target has no API

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};

use colo_virtio::blk::{
    Blk, BlockBackend, Completion, Geometry, MAX_DATA, Operation, RequestId, Serial,
};
use colo_virtio::device::{BATCH, Context, Progress};
use colo_virtio::net::{HEADER_BYTES, MAX_PACKET, Mac, Net, NetBackend, Offloads};
use colo_virtio::ring::Ring;
use colo_virtio::rng::Rng;
use colo_virtio::transport::{REGION_BYTES, status};
use colo_virtio::{Action, Interrupt, IrqLine, Model, Transport, register};
use fuzz as _; // its bound on memory
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmstate::{VmState, from_bytes, to_bytes};

const RAM: u64 = 1 << 20;
const DISK: u64 = 1 << 20;
/// Where a driver that does as it should has its queues, and their size.
const QUEUES: u64 = 0x1_0000;
const SIZE: u32 = 16;

#[derive(Debug)]
struct NoLine;

impl IrqLine for NoLine {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A descriptor that nobody waits for.
fn descriptor() -> Arc<OwnedFd> {
    static FD: OnceLock<Arc<OwnedFd>> = OnceLock::new();
    let open = || Arc::new(std::fs::File::open("/dev/null").expect("/dev/null").into());
    Arc::clone(FD.get_or_init(open))
}

/// Ends requests when it is asked for completions.
#[derive(Debug, Default)]
struct Disk {
    held: VecDeque<(RequestId, Operation)>,
}

impl BlockBackend for Disk {
    fn geometry(&self) -> Geometry {
        Geometry {
            length: DISK,
            read_only: false,
            physical_block: 4096,
        }
    }

    fn submit(&mut self, id: RequestId, operation: Operation) {
        let (offset, len) = match &operation {
            Operation::Read { offset, buffer } => (*offset, buffer.len() as u64),
            Operation::Write { offset, data, .. } => (*offset, data.len() as u64),
            Operation::Discard { offset, len } | Operation::Zero { offset, len, .. } => {
                (*offset, *len)
            }
            _ => (0, 512),
        };
        assert!(len > 0 && len <= MAX_DATA && len.is_multiple_of(512));
        assert!(offset.checked_add(len).is_some_and(|end| end <= DISK));
        self.held.push_back((id, operation));
        assert!(self.held.len() <= 256);
    }

    fn event(&self) -> Arc<OwnedFd> {
        descriptor()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        for (id, operation) in self.held.drain(..) {
            let result = if id.0.is_multiple_of(7) {
                Err(io::ErrorKind::Other.into())
            } else {
                Ok(())
            };
            let buffer = match operation {
                Operation::Read { buffer, .. } => Some(buffer),
                _ => None,
            };
            done.push(Completion { id, buffer, result });
        }
    }
}

/// Gives packets of the lengths that the input says, and takes every third.
#[derive(Debug, Default)]
struct Network {
    lengths: Arc<Mutex<VecDeque<usize>>>,
    header: bool,
    sent: u32,
}

impl NetBackend for Network {
    fn has_vnet_header(&self) -> bool {
        self.header
    }

    fn fd(&self) -> Arc<OwnedFd> {
        descriptor()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let segments = offloads.tso4 || offloads.tso6;
        assert!(offloads.checksum || !segments);
        assert!(segments || !offloads.ecn);
        Ok(())
    }

    fn receive(&mut self, packet: &mut [u8; MAX_PACKET]) -> io::Result<usize> {
        let next = self.lengths.lock().expect("no panic before").pop_front();
        let length = next.ok_or(io::ErrorKind::WouldBlock)?.min(MAX_PACKET);
        packet[..length].fill(0xa5);
        Ok(length)
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        assert!(packet.len() > HEADER_BYTES && packet.len() <= MAX_PACKET);
        self.sent += 1;
        if self.sent.is_multiple_of(3) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }
}

struct Machine<D> {
    transport: Transport,
    model: D,
    rings: Vec<Option<Ring>>,
    memory: GuestMemoryMmap,
}

impl<D: Model> Machine<D> {
    fn new(model: D) -> Self {
        let interrupt = Arc::new(Interrupt::new(Box::new(NoLine)));
        let transport = Transport::new(model.identity(), model.config(), interrupt);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]);
        Self {
            rings: transport.queues().iter().map(|_| None).collect(),
            transport,
            model,
            memory: memory.expect("guest memory"),
        }
    }

    fn stop(&mut self) {
        self.rings.fill_with(|| None);
        self.model.reset();
    }

    fn open(&mut self) -> bool {
        let features = self.transport.features();
        for (ring, setup) in self.rings.iter_mut().zip(self.transport.queues()) {
            *ring = None;
            if setup.ready {
                match setup.open(features, &self.memory) {
                    Ok(queue) => *ring = Some(Ring::new(queue)),
                    Err(_) => return false,
                }
            }
        }
        self.model.activate(features).is_ok()
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match self.transport.write(offset, data) {
            Action::Activate if !self.open() => self.give_up(),
            Action::Reset | Action::Fail => self.stop(),
            Action::StopQueue(index) => self.rings[usize::from(index)] = None,
            Action::Notify(index) => self.process(index.into()),
            Action::Config(at) => self.model.write_config(at, data),
            _ => {}
        }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.write(register, &value.to_le_bytes());
    }

    fn give_up(&mut self) {
        self.stop();
        self.transport.needs_reset();
    }

    fn step(
        &mut self,
        work: impl FnOnce(
            &mut D,
            &mut Context<'_, GuestMemoryMmap>,
        ) -> Result<Progress, colo_virtio::ring::RingError>,
    ) {
        let mut context = Context {
            memory: &self.memory,
            rings: &mut self.rings,
            running: true,
            config_changed: false,
        };
        let mut done = work(&mut self.model, &mut context).map(drop);
        for ring in self.rings.iter_mut().flatten() {
            done = done.and(ring.wants_interrupt(&self.memory).map(drop));
        }
        if done.is_err() {
            self.give_up();
        }
    }

    fn process(&mut self, index: usize) {
        let before: Vec<_> = self.rings.iter().map(position).collect();
        self.step(|model, context| model.process(index, context));
        for (before, after) in before.iter().zip(self.rings.iter().map(position)) {
            // The work for one notification is bounded.
            assert!(usize::from(after.wrapping_sub(*before)) <= BATCH || after == 0);
        }
    }

    fn set_up(&mut self) {
        self.set(register::STATUS, 0);
        self.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let features = self.transport.identity().features;
        for half in 0..2 {
            self.set(register::DRIVER_FEATURES_SEL, half);
            let value = u32::try_from(features >> (32 * half) & 0xffff_ffff);
            self.set(register::DRIVER_FEATURES, value.expect("32 bits"));
        }
        self.set(register::STATUS, 11);
        for queue in 0..self.rings.len() {
            let queue = u32::try_from(queue).expect("few queues");
            let base = u32::try_from(QUEUES).expect("low") + 0x1000 * queue;
            self.set(register::QUEUE_SEL, queue);
            self.set(register::QUEUE_NUM, SIZE);
            for (register, at) in [
                (register::QUEUE_DESC_LOW, base),
                (register::QUEUE_AVAIL_LOW, base + 0x400),
                (register::QUEUE_USED_LOW, base + 0x800),
            ] {
                self.set(register, at);
            }
            self.set(register::QUEUE_READY, 1);
        }
        self.set(register::STATUS, 15);
        assert_eq!(self.transport.status(), 15);
        assert!(self.rings.iter().all(Option::is_some));
    }

    /// Saves, spoils one byte, and loads what is not refused.
    fn migrate(&mut self, at: usize, value: u8) {
        if self.model.in_flight() > 0 {
            return;
        }
        let mut transport = self.transport.save();
        for (setup, ring) in transport.queues.iter_mut().zip(&self.rings) {
            if let Some(ring) = ring {
                (setup.next_avail, setup.next_used) = ring.positions();
            }
        }
        let Ok(mut bytes) = to_bytes(&self.model.save(transport)) else {
            panic!("a state cannot be written");
        };
        let at = at % bytes.len();
        bytes[at] ^= value;
        let Ok(state) = from_bytes::<D::State>(&bytes, D::State::VERSION) else {
            return;
        };
        let transport = D::transport(&state);
        let checked = self.transport.check(transport);
        let checked = checked.and_then(|()| transport.queues_lie_in(&self.memory));
        if checked.and_then(|()| self.model.check(&state)).is_err() {
            assert_ne!(value, 0, "a state is refused as it was saved");
            return;
        }
        self.stop();
        self.transport.power_on();
        self.transport.install(transport);
        self.model.install(state);
        if self.transport.is_live() {
            assert!(self.open(), "a state that was checked cannot be used");
        }
    }
}

fn position(ring: &Option<Ring>) -> u16 {
    ring.as_ref().map_or(0, |ring| ring.positions().0)
}

/// The input, bytes at a time; zeroes behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }
}

fn run<D: Model>(model: D, mut input: Input<'_>, lengths: &Mutex<VecDeque<usize>>) {
    let mut machine = Machine::new(model);
    machine.set_up();
    while !input.0.is_empty() {
        let operation = input.byte();
        match operation % 10 {
            0 => {
                let offset = u64::from(input.byte()) * 4 % REGION_BYTES;
                let value = input.word();
                machine.set(offset, value);
            }
            1 => {
                let offset = u64::from(input.byte());
                let data: [u8; 8] = input.bytes();
                let len = usize::from(input.byte() % 9);
                machine.write(offset + register::CONFIG * (offset & 1), &data[..len]);
                machine.transport.read(offset, &mut [0; 8][..len]);
            }
            2 => {
                let at = u64::from(input.word()) % (RAM - 32);
                let data: [u8; 32] = input.bytes();
                let put = machine.memory.write_slice(&data, GuestAddress(at));
                put.expect("in memory");
            }
            // A descriptor; often one that lies in memory.
            3 => {
                let queue = u64::from(input.byte() % 3);
                let index = u64::from(input.byte()) % 16;
                let mut raw: [u8; 16] = input.bytes();
                if raw[7] & 1 == 0 {
                    raw[3..8].fill(0);
                }
                if raw[11] & 1 == 0 {
                    raw[10..12].fill(0);
                }
                let at = QUEUES + 0x1000 * queue + 16 * index;
                let put = machine.memory.write_slice(&raw, GuestAddress(at));
                put.expect("in memory");
            }
            // A head that is available.
            4 | 5 => {
                let queue = u64::from(input.byte() % 3);
                let ring = GuestAddress(QUEUES + 0x1000 * queue + 0x400);
                let index = GuestAddress(ring.0 + 2);
                let next: u16 = machine.memory.read_obj(index).expect("in memory");
                let slot = GuestAddress(ring.0 + 4 + 2 * u64::from(next % 16));
                let head = u16::from(input.byte());
                let put = machine.memory.write_obj(head, slot);
                put.expect("in memory");
                let put = machine.memory.write_obj(next.wrapping_add(1), index);
                put.expect("in memory");
                machine.set(register::QUEUE_NOTIFY, u32::from(input.byte() % 4));
            }
            6 => {
                let length = usize::from(u16::from_le_bytes(input.bytes()));
                let mut lengths = lengths.lock().expect("no panic before");
                if lengths.len() < 64 {
                    lengths.push_back(length);
                }
            }
            7 => {
                machine.step(|model, context| model.ready(0, context));
                for queue in 0..machine.rings.len() {
                    machine.process(queue);
                }
            }
            8 => {
                let at = usize::from(input.byte());
                let value = input.byte();
                machine.migrate(at, value);
            }
            _ => machine.set_up(),
        }
    }
    machine.set_up();
}

fuzz_target!(|data: &[u8]| {
    let Some((device, script)) = data.split_first() else {
        return;
    };
    let input = Input(script);
    let lengths = Arc::new(Mutex::default());
    match device % 4 {
        0 => run(Rng, input, &lengths),
        1 => {
            let serial = Serial::new("fuzz").expect("a serial number");
            run(Blk::new(Box::new(Disk::default()), serial), input, &lengths);
        }
        kind => {
            let network = Network {
                lengths: Arc::clone(&lengths),
                header: kind == 2,
                sent: 0,
            };
            let net = Net::new(Box::new(network), Mac([2; 6]), 1500).expect("an mtu");
            run(net, input, &lengths);
        }
    }
});
