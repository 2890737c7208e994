//! A disk that a test holds in its hand, and block requests.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use colo_virtio::blk::{Blk, BlockBackend, Completion, Geometry, Operation, RequestId, Serial};
use rustix::event::{EventfdFlags, eventfd};

use super::{BUFFERS, Guest};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const SECTORS: u64 = 2048;

/// What a disk in memory does with its requests, and what it saw.
#[derive(Debug, Default)]
pub struct Hand {
    pub bytes: Vec<u8>,
    /// Requests are kept, and not ended.
    pub hold: bool,
    pub held: Vec<(RequestId, Operation)>,
    /// What every request ends with.
    pub fail: Option<i32>,
    pub seen: Vec<String>,
    pub ended: Vec<Completion>,
    pub read_only: bool,
}

/// A disk in memory.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    pub hand: Arc<Mutex<Hand>>,
    event: Arc<OwnedFd>,
}

impl MemoryDisk {
    pub fn new() -> Self {
        let hand = Hand {
            bytes: vec![0; SECTORS as usize * 512],
            ..Hand::default()
        };
        Self {
            hand: Arc::new(Mutex::new(hand)),
            event: Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()),
        }
    }

    pub fn blk(&self) -> Blk {
        Blk::new(Box::new(self.clone()), Serial::new("colo-disk").unwrap())
    }

    pub fn hold(&self, hold: bool) {
        self.hand.lock().unwrap().hold = hold;
    }

    pub fn held(&self) -> usize {
        self.hand.lock().unwrap().held.len()
    }

    /// Ends the requests that were held.
    pub fn release(&self) {
        let held = std::mem::take(&mut self.hand.lock().unwrap().held);
        for (id, operation) in held {
            self.perform(id, operation);
        }
    }

    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.hand.lock().unwrap().seen)
    }

    fn perform(&self, id: RequestId, operation: Operation) {
        let mut hand = self.hand.lock().unwrap();
        let mut back = None;
        let range = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match operation {
            Operation::Read { offset, mut buffer } => {
                let len = buffer.len() as u64;
                buffer
                    .bytes_mut()
                    .copy_from_slice(&hand.bytes[range(offset, len)]);
                back = Some(buffer);
            }
            Operation::Write { offset, data, .. } if hand.fail.is_none() => {
                let range = range(offset, data.len() as u64);
                hand.bytes[range].copy_from_slice(data.bytes());
            }
            Operation::Zero { offset, len, .. } => hand.bytes[range(offset, len)].fill(0),
            _ => {}
        }
        let result = match hand.fail {
            None => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        };
        hand.ended.push(Completion {
            id,
            buffer: back,
            result,
        });
        drop(hand);
        rustix::io::write(&*self.event, &1u64.to_ne_bytes()).unwrap();
    }
}

impl BlockBackend for MemoryDisk {
    fn geometry(&self) -> Geometry {
        let hand = self.hand.lock().unwrap();
        Geometry {
            length: hand.bytes.len() as u64,
            read_only: hand.read_only,
            physical_block: 4096,
        }
    }

    fn submit(&mut self, id: RequestId, operation: Operation) {
        let mut hand = self.hand.lock().unwrap();
        let what = match &operation {
            Operation::Read { offset, buffer } => format!("read {offset} {}", buffer.len()),
            Operation::Write { offset, data, fua } => {
                format!("write {offset} {} {fua}", data.len())
            }
            Operation::Flush => "flush".to_owned(),
            Operation::Discard { offset, len } => format!("discard {offset} {len}"),
            Operation::Zero {
                offset,
                len,
                unmap,
                fua,
            } => format!("zero {offset} {len} {unmap} {fua}"),
            other => format!("{other:?}"),
        };
        hand.seen.push(what);
        if hand.hold {
            hand.held.push((id, operation));
            return;
        }
        drop(hand);
        self.perform(id, operation);
    }

    fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        done.append(&mut self.hand.lock().unwrap().ended);
    }
}

/// The places of a request's parts.
pub const HEADER: u64 = BUFFERS;
pub const STATUS: u64 = BUFFERS + 0x100;
pub const DATA: u64 = BUFFERS + 0x1000;

/// Puts the header of a request at `at`.
pub fn put_header(guest: &Guest<Blk>, at: u64, kind: u32, sector: u64) {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    guest.put(at, &header);
}

/// Does one request; its data is at [`DATA`]. Returns the status byte and the bytes said to be
/// written.
pub fn request(guest: &mut Guest<Blk>, kind: u32, sector: u64, len: u32) -> (u8, u32) {
    put_header(guest, HEADER, kind, sector);
    guest.put(STATUS, &[0xee]);
    let mut chain = vec![(HEADER, 16, false)];
    if len > 0 {
        chain.push((DATA, len, matches!(kind, IN | GET_ID)));
    }
    chain.push((STATUS, 1, true));
    let (_, written) = guest.request(0, &chain);
    (guest.get(STATUS, 1)[0], written)
}

/// Puts the range of a discard or a write of zeroes at [`DATA`].
pub fn put_range(guest: &Guest<Blk>, sector: u64, sectors: u32, flags: u32) {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    guest.put(DATA, &range);
}
