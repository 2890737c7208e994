//! Guest memory for tests, and a way to set both ends up.
// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::error::Error;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use migration_stream::io::FdChannel;
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::{GuestRam, GuestRamMmap, PAGE_SIZE, TransportError};
use multifd::{ChannelError, MultifdConfig, RecvChannel, RecvSet};

pub const PAGE: usize = 4096;
/// Far longer than anything here takes, and short enough for a test to fail.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Blocks of memory, at either end.
pub fn memory(pages: &[u64]) -> GuestRamMmap {
    let names = ["pc.ram", "vga.vram", "pc.bios"];
    let blocks = names
        .iter()
        .zip(pages)
        .map(|(name, pages)| RamBlock::new(*name, pages * PAGE_SIZE).unwrap())
        .collect();
    GuestRamMmap::anonymous(RamBlockTable::new(blocks).unwrap()).unwrap()
}

/// The same memory, of which one block is shared with the source and not migrated.
pub fn sharing(ram: &GuestRamMmap, name: &str) -> GuestRamMmap {
    let blocks = ram.blocks().iter().map(|(_, block)| {
        if block.name() == name {
            block.clone().shared()
        } else {
            block.clone()
        }
    });
    let table = RamBlockTable::new(blocks.collect()).unwrap();
    GuestRamMmap::new(table.ignoring_shared(), ram.regions().to_vec()).unwrap()
}

/// Memory page by page.
pub trait Pages {
    /// Writes a page that no other `(block, page, round)` has.
    fn fill(&self, block: u32, page: u64, round: u8);
    fn put(&self, block: u32, page: u64, bytes: &[u8]);
    fn page(&self, block: u32, page: u64) -> Vec<u8>;
    fn differing_pages(&self, other: &Self) -> Vec<(u32, u64)>;
}

impl Pages for GuestRamMmap {
    fn fill(&self, block: u32, page: u64, round: u8) {
        let mut x = (u64::from(block) << 40 | page << 8 | u64::from(round)) * 2 + 1;
        let bytes: Vec<u8> = (0..PAGE / 8)
            .flat_map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x.to_le_bytes()
            })
            .collect();
        self.put(block, page, &bytes);
    }

    fn put(&self, block: u32, page: u64, bytes: &[u8]) {
        self.slice(BlockId::new(block), page * PAGE_SIZE, bytes.len())
            .unwrap()
            .copy_from(bytes);
    }

    fn page(&self, block: u32, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        self.slice(BlockId::new(block), page * PAGE_SIZE, PAGE)
            .unwrap()
            .copy_to(&mut bytes);
        bytes
    }

    fn differing_pages(&self, other: &Self) -> Vec<(u32, u64)> {
        let mut differing = Vec::new();
        for (block, (_, b)) in (0..).zip(self.blocks().iter()) {
            let pages = 0..b.pages();
            differing.extend(
                pages
                    .filter(|p| self.page(block, *p) != other.page(block, *p))
                    .map(|p| (block, p)),
            );
        }
        differing
    }
}

/// A receiving set and the other ends of its channels.
pub struct Receiver {
    pub set: RecvSet<GuestRamMmap>,
    pub peers: Vec<UnixStream>,
    /// What the error hook was called with.
    pub errors: mpsc::Receiver<String>,
}

pub fn receiver(config: &MultifdConfig, pages: &[u64]) -> Receiver {
    receiver_into(memory(pages), config)
}

pub fn receiver_into(ram: GuestRamMmap, config: &MultifdConfig) -> Receiver {
    let (peers, channels): (Vec<_>, Vec<_>) = config
        .channels
        .ids()
        .map(|_| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (
                theirs,
                RecvChannel::from(FdChannel::new(ours, LIMIT).unwrap()),
            )
        })
        .unzip();
    let (tell, errors) = mpsc::channel();
    let set = RecvSet::start(ram, channels, config, move |e| {
        tell.send(text(e)).unwrap();
    })
    .unwrap();
    Receiver { set, peers, errors }
}

/// The channel an error came from, and the error.
pub fn cause(e: &TransportError) -> (Option<u8>, &ChannelError) {
    (
        e.channel,
        e.source
            .downcast_ref()
            .expect("every error of the crate is a ChannelError"),
    )
}

/// An error and its causes.
pub fn text(e: &TransportError) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

pub fn write(stream: &UnixStream, bytes: &[u8]) {
    let mut stream = stream;
    stream.write_all(bytes).unwrap();
}
