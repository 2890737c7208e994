//! Scripts out of bytes.

use colo_core::Message;
use colo_core::raw::{encode_message, encode_vmstate_size};
use multifd::packet::{HEADER_LEN, Method, PacketFlags, PacketHeader};

/// Bytes that are used up; zeroes where there are no more.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub const fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// What somebody asks of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Failover,
    Quit,
    /// The heartbeat stops this side for good.
    Stop,
    Demand,
}

impl Ask {
    pub fn of(byte: u8) -> Self {
        match byte % 4 {
            0 => Self::Failover,
            1 => Self::Quit,
            2 => Self::Stop,
            _ => Self::Demand,
        }
    }
}

/// What happens next on a channel that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes come.
    Bytes(Vec<u8>),
    /// Nothing comes before the deadline.
    Silence,
    /// The connection breaks.
    Reset,
    /// Bytes come although nothing was asked for.
    Early,
    /// Somebody asks.
    Asked(Ask),
}

/// The pages of the guest's only block.
pub const PAGES: u64 = 4;
/// Its name.
pub const BLOCK: &str = "pc.ram";

const RAM: u8 = 1;
const FLUSH: u64 = 0x200;
const END_OF_SECTION: u64 = 0x10;
const ZERO: u64 = 0x02;
const PAGE: u64 = 0x08;

/// What a device blob has to be.
pub fn device_blob(value: u64) -> Vec<u8> {
    let mut blob = value.to_be_bytes().to_vec();
    blob.push(blob.iter().fold(0x5a, |sum, byte| sum ^ byte));
    blob
}

/// A script: of the main channel, and of multifd's.
#[derive(Default)]
pub struct Script {
    pub main: Vec<Piece>,
    pub channels: Vec<Vec<u8>>,
}

impl Script {
    /// A primary's script.
    pub fn of_primary(input: &mut Input<'_>, channels: usize) -> Self {
        let mut script = Self {
            main: Vec::new(),
            channels: vec![Vec::new(); channels],
        };
        while !input.is_empty() && script.main.len() < 64 {
            script.step(input);
        }
        script
    }

    /// A secondary's script; one that is ready, or whatever else it says.
    pub fn of_secondary(input: &mut Input<'_>, ready: bool) -> Self {
        let mut script = Self::default();
        if ready {
            script.bytes(&encode_message(Message::CheckpointReady));
        }
        while !input.is_empty() && script.main.len() < 64 {
            match input.byte() % 12 {
                0 | 1 => script.bytes(&encode_message(Message::CheckpointReady)),
                2..=5 => {
                    for message in [
                        Message::CheckpointReply,
                        Message::VmstateReceived,
                        Message::VmstateLoaded,
                    ] {
                        script.bytes(&encode_message(message));
                    }
                }
                6 => {
                    script.main.push(Piece::Early);
                    script.message(input);
                }
                _ => script.common(input),
            }
        }
        script
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.main.push(Piece::Bytes(bytes.to_vec()));
    }

    fn message(&mut self, input: &mut Input<'_>) {
        let number = u32::from(input.byte() % 9);
        self.bytes(&number.to_be_bytes());
    }

    /// What both sides may do.
    fn common(&mut self, input: &mut Input<'_>) {
        match input.byte() % 10 {
            0 => self.message(input),
            1 => {
                let len = usize::from(input.byte() % 40);
                let bytes = input.take(len).to_vec();
                self.bytes(&bytes);
            }
            2 => self.main.push(Piece::Silence),
            3 => self.main.push(Piece::Reset),
            4 => self.main.push(Piece::Asked(Ask::of(input.byte()))),
            // What was said last is changed.
            5 => {
                let (at, with) = (input.byte(), input.byte());
                if let Some(Piece::Bytes(bytes)) = self.main.last_mut()
                    && !bytes.is_empty()
                {
                    let at = usize::from(at) % bytes.len();
                    bytes[at] ^= with;
                }
            }
            // It is cut short, said twice, or in another order.
            6 => {
                let len = usize::from(input.byte());
                if let Some(Piece::Bytes(bytes)) = self.main.last_mut() {
                    let left = bytes.len().saturating_sub(len);
                    bytes.truncate(left);
                }
            }
            7 => {
                if let Some(last) = self.main.last().cloned() {
                    self.main.push(last);
                }
            }
            8 => {
                let at = usize::from(input.byte());
                let len = self.main.len();
                if len > 0 {
                    self.main.swap(at % len, len - 1);
                }
            }
            // It comes in two parts.
            _ => {
                let at = usize::from(input.byte());
                if let Some(Piece::Bytes(bytes)) = self.main.last_mut() {
                    let rest = bytes.split_off(at.min(bytes.len()));
                    self.bytes(&rest);
                }
            }
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 12 {
            0..=3 => self.checkpoint(input),
            4 => self.bytes(&encode_message(Message::CheckpointRequest)),
            5 => self.bytes(&encode_message(Message::VmstateSend)),
            6 => {
                let bytes = self.section(input);
                self.bytes(&bytes);
            }
            7 => self.bytes(&[0]),
            8 => {
                let bytes = devices(input);
                self.bytes(&bytes);
            }
            9 => self.on_a_channel(input),
            _ => self.common(input),
        }
    }

    /// All of a checkpoint, as it has to be.
    fn checkpoint(&mut self, input: &mut Input<'_>) {
        self.bytes(&encode_message(Message::CheckpointRequest));
        self.bytes(&encode_message(Message::VmstateSend));
        let mut ram = vec![3, 0, 0, 0, RAM];
        let (count, mut page) = (input.byte() % 4, u64::from(input.byte()));
        for _ in 0..count {
            page = (page * 5 + 1) % PAGES;
            record(&mut ram, page, input.byte());
        }
        for (channel, bytes) in self.channels.iter_mut().enumerate() {
            let page = (page + channel as u64) % PAGES;
            bytes.extend(packet(page, input.byte(), false));
            bytes.extend(sync());
        }
        if !self.channels.is_empty() {
            ram.extend(FLUSH.to_be_bytes());
        }
        ram.extend(END_OF_SECTION.to_be_bytes());
        ram.extend([0x7e, 0, 0, 0, RAM, 0]);
        self.bytes(&ram);
        let blob = device_blob(u64::from(input.byte()));
        self.bytes(&[&encode_vmstate_size(blob.len() as u64)[..], &blob].concat());
    }

    /// A section of RAM that may lack something.
    fn section(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let how = input.byte();
        let mut bytes = vec![if how & 1 == 0 { 3 } else { 2 }, 0, 0, 0];
        bytes.push(if how & 2 == 0 { RAM } else { input.byte() });
        for _ in 0..(how >> 2) % 4 {
            let (page, value) = (u64::from(input.byte()) % (PAGES + 1), input.byte());
            record(&mut bytes, page, value);
        }
        if how & 16 != 0 {
            bytes.extend(FLUSH.to_be_bytes());
        }
        if how & 32 == 0 {
            bytes.extend(END_OF_SECTION.to_be_bytes());
        }
        if how & 64 == 0 {
            bytes.extend([0x7e, 0, 0, 0, RAM]);
        }
        bytes
    }

    /// Something on one of multifd's channels.
    fn on_a_channel(&mut self, input: &mut Input<'_>) {
        let (which, how) = (input.byte(), input.byte());
        let count = self.channels.len();
        if count == 0 {
            return;
        }
        let channel = &mut self.channels[usize::from(which) % count];
        let page = u64::from(input.byte()) % (PAGES + 1);
        match how % 6 {
            0 => channel.extend(sync()),
            1 => channel.extend(packet(page, input.byte(), false)),
            2 => channel.extend(packet(page, input.byte(), true)),
            3 => channel.extend(input.take(usize::from(how) / 4)),
            4 => {
                let len = channel.len().saturating_sub(usize::from(input.byte()));
                channel.truncate(len);
            }
            _ => {
                let at = usize::from(input.byte());
                let len = channel.len();
                if len > 0 {
                    channel[len - 1 - at % len] ^= input.byte();
                }
            }
        }
    }
}

/// A page of one value, sent as zero if it is that.
fn record(out: &mut Vec<u8>, page: u64, value: u8) {
    let kind = if value == 0 { ZERO } else { PAGE };
    out.extend(((page * 4096) | kind).to_be_bytes());
    out.push(u8::try_from(BLOCK.len()).expect("a short name"));
    out.extend(BLOCK.as_bytes());
    if value == 0 {
        out.push(0);
    } else {
        out.extend([value; 4096]);
    }
}

fn devices(input: &mut Input<'_>) -> Vec<u8> {
    let how = input.byte();
    let mut blob = device_blob(u64::from(input.byte()));
    let len = match how % 4 {
        0 => blob.len() as u64,
        1 => u64::MAX >> (how % 64),
        2 => u64::from(how),
        _ => 1000,
    };
    if how & 64 != 0 {
        blob.truncate(usize::from(how) % 9);
    }
    [&encode_vmstate_size(len)[..], &blob].concat()
}

/// A multifd packet with one page, or none.
pub fn packet(page: u64, value: u8, synchronises: bool) -> Vec<u8> {
    let offsets = [page * 4096];
    let header = PacketHeader {
        flags: PacketFlags {
            sync: synchronises,
            method: Method::None,
        },
        number: 0,
        block: BLOCK.as_bytes(),
        normal: if value == 0 { &[] } else { &offsets },
        zero: if value == 0 { &offsets } else { &[] },
        payload_len: if value == 0 { 0 } else { 4096 },
    };
    let mut bytes = [0; HEADER_LEN];
    header.fill(&mut bytes).expect("a packet");
    let payload: &[u8] = if value == 0 { &[] } else { &[value; 4096] };
    [&bytes[..], payload].concat()
}

pub fn sync() -> Vec<u8> {
    let mut bytes = [0; HEADER_LEN];
    PacketHeader::sync(0).fill(&mut bytes).expect("a packet");
    bytes.to_vec()
}
