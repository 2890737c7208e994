//! A source that is made of choices: the items of a stream in their order, and then spoiled in order,
//! length, content and timing. Shared by a test and by the fuzz target `precopy_target`.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSink, ByteSource, Chunk, Readiness};
use migration_stream::precopy::{Loaded, Settled, Target, TargetConfig, TargetError};
use migration_stream::ram::{NoMultifd, RamBlock, RamBlockTable};
use migration_stream::{
    BoxError, ConfigurationRule, DecoderConfig, GuestRamMmap, PAGE_SIZE, Parsed, SectionHeader,
    StreamReader, TailLimits,
};
use vm_memory::VolatileSlice;

#[path = "loads.rs"]
mod loads;

use loads::{Loads, Only};

/// The most bytes of device state that the target takes.
const MAX_DEVICES: usize = 8192;
/// A source that says nothing for longer than this is cut off.
const LONGEST_STALL: Duration = Duration::from_secs(30);
/// More memory than a stream may announce here, pages.
const MAX_PAGES: u64 = 1024;

/// Choices out of an input. When it is used up all choices are the first one.
#[derive(Debug)]
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, n: usize) -> usize {
        if n <= 256 {
            usize::from(self.byte()) % n.max(1)
        } else {
            ((usize::from(self.byte()) << 8) | usize::from(self.byte())) % n
        }
    }

    /// True once in `n` times.
    fn rarely(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        let fill = self.byte();
        let wanted = usize::from(self.byte());
        let take = n.min(self.0.len()).min(wanted);
        let (taken, rest) = self.0.split_at(take);
        self.0 = rest;
        let mut bytes = taken.to_vec();
        bytes.resize(n, fill);
        bytes
    }
}

fn section(kind: u8, id: u32, name: &str, instance: u32, version: u32) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend(id.to_be_bytes());
    out.extend(counted(name));
    out.extend(instance.to_be_bytes());
    out.extend(version.to_be_bytes());
    out
}

fn counted(name: &str) -> Vec<u8> {
    let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
    [&[len], name.as_bytes()].concat()
}

fn footer(id: u32) -> Vec<u8> {
    [&[0x7e], &id.to_be_bytes()[..]].concat()
}

fn command(number: u16, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    [&[8], &number.to_be_bytes()[..], &len.to_be_bytes(), payload].concat()
}

/// The devices of a stream, for its description.
#[derive(Debug, Default)]
struct Described(Vec<(String, usize)>);

impl Described {
    /// A FULL section. The VMM of this file knows how long its body is: two bytes say so.
    fn device(&mut self, c: &mut Choices<'_>, id: u32, name: &str) -> Vec<u8> {
        let len = match c.below(8) {
            0..5 => c.below(40),
            5 | 6 => c.below(3000),
            _ => c.below(MAX_DEVICES + 100),
        };
        let mut body = u16::try_from(len)
            .unwrap_or(u16::MAX)
            .to_be_bytes()
            .to_vec();
        body.extend(c.bytes(len));
        let described = if c.rarely(8) {
            c.below(5000)
        } else {
            body.len()
        };
        self.0.push((name.to_owned(), described));
        [section(4, id, name, 0, 1), body, footer(id)].concat()
    }

    fn json(&self) -> String {
        let devices = self.0.iter().map(|(name, len)| {
            format!(
                "{{\"name\":\"{name}\",\"instance_id\":0,\"version\":1,\
                 \"fields\":[{{\"name\":\"f\",\"size\":{len}}}]}}"
            )
        });
        let devices: Vec<_> = devices.collect();
        format!("{{\"page_size\":4096,\"devices\":[{}]}}", devices.join(","))
    }
}

fn records(c: &mut Choices<'_>, blocks: &[(&str, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    for i in 0..c.below(6) {
        let (name, pages) = blocks
            .get(c.below(blocks.len()))
            .copied()
            .unwrap_or(("?", 1));
        let outside = usize::from(c.rarely(16));
        let page = c.below(usize::try_from(pages).unwrap_or(1) + outside);
        let flag: u64 = match c.below(16) {
            0..6 => 0x08,
            6..11 => 0x02,
            11..13 => 0x40,
            13 => 0x200,
            14 => 0x04,
            _ => 1 << c.below(12),
        };
        let go_on = if i > 0 && c.below(4) > 0 { 0x20 } else { 0 };
        out.extend(((page as u64 * PAGE_SIZE) | flag | go_on).to_be_bytes());
        if go_on == 0 && flag & 0x4a != 0 {
            out.extend(counted(name));
        }
        match flag {
            0x08 => out.extend(c.bytes(4096)),
            0x02 => out.push(0),
            0x40 => {
                let encoded = c.bytes(1 + c.0.first().map_or(2, |n| usize::from(*n) % 12));
                let len = u16::try_from(encoded.len()).unwrap_or(0);
                out.push(1);
                out.extend(len.to_be_bytes());
                out.extend(encoded);
            }
            _ => {}
        }
    }
    out.extend(0x10_u64.to_be_bytes());
    out
}

/// The items of a stream, in the order in which a source sends them.
fn items(c: &mut Choices<'_>) -> Vec<Vec<u8>> {
    const BLOCKS: &[&[(&str, u64)]] = &[
        &[("pc.ram", 6), ("vga", 2)],
        &[("pc.ram", 6)],
        &[("vga", 2), ("pc.ram", 6)],
        &[("pc.ram", 7), ("other", 1 << 40)],
    ];
    let mut described = Described::default();
    let mut items = vec![b"QEVM\0\0\0\x03".to_vec()];
    items.push([&[7, 0, 0, 0, 4], &b"q35x"[..]].concat());
    if c.below(4) > 0 {
        items.push(command(1, &[]));
        items.push(command(2, &1_u32.to_be_bytes()));
    }
    match c.below(6) {
        0 => items.push(command(3, &[])),
        1 => items.push(command(
            3,
            &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0],
        )),
        _ => {}
    }
    let mut early = Vec::new();
    for i in 0..c.below(4).saturating_sub(1) {
        let id = 30 + u32::try_from(i).unwrap_or(0);
        early.push(described.device(c, id, ["e0", "e1", "e2"][i]));
    }
    let is_before_ram = c.rarely(2);
    if is_before_ram {
        items.append(&mut early);
    }
    let which = if c.rarely(3) {
        c.below(BLOCKS.len())
    } else {
        0
    };
    let blocks = BLOCKS[which];
    let total: u64 = blocks.iter().map(|(_, pages)| pages * PAGE_SIZE).sum();
    let mut ram = section(1, 1, "ram", 0, 4);
    ram.extend((total | 4).to_be_bytes());
    for (name, pages) in blocks {
        ram.extend(counted(name));
        ram.extend((pages * PAGE_SIZE).to_be_bytes());
    }
    ram.extend(0x10_u64.to_be_bytes());
    ram.extend(footer(1));
    items.push(ram);
    items.append(&mut early);
    for _ in 0..c.below(3) {
        let head = [&[2], &1_u32.to_be_bytes()[..]].concat();
        items.push([head, records(c, blocks), footer(1)].concat());
        match c.below(12) {
            0 => items.push(command(2, &c.bytes(4))),
            1 => items.push(command(4, &[])),
            2 => items.push(command(7, &64_u32.to_be_bytes())),
            3 => items.push(command(
                6,
                b"\0\x06pc.ram\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0",
            )),
            _ => {}
        }
    }
    items.push(command(11, &[]));
    let head = [&[3], &1_u32.to_be_bytes()[..]].concat();
    items.push([head, records(c, blocks), footer(1)].concat());
    for i in 0..1 + c.below(3) {
        items.push(described.device(c, 2 + u32::try_from(i).unwrap_or(0), ["d0", "d1", "d2"][i]));
    }
    items.push(vec![0]);
    let json = described.json();
    let len = u32::try_from(json.len()).unwrap_or(0);
    items.push([&[6], &len.to_be_bytes()[..], json.as_bytes()].concat());
    items
}

fn spoil(c: &mut Choices<'_>, items: &mut Vec<Vec<u8>>) {
    for _ in 0..c.below(4) {
        let (i, j) = (c.below(items.len()), c.below(items.len()));
        match c.below(7) {
            0 => items.swap(i, j),
            1 => items.insert(j, items[i].clone()),
            2 => drop(items.remove(i)),
            3 => {
                let at = c.below(items[i].len() + 1);
                items[i].truncate(at);
            }
            4 => {
                let at = c.below(items[i].len().max(1));
                if let Some(byte) = items[i].get_mut(at) {
                    *byte ^= 1 << c.below(8);
                }
            }
            5 => {
                let at = c.below(items[i].len() + 1);
                let bytes = c.bytes(1 + c.0.first().map_or(0, |n| usize::from(*n)));
                items[i].splice(at..at, bytes);
            }
            _ => {
                // A length or an offset, more likely than not.
                let at = c.below(items[i].len().max(1));
                let value = [0, 0xff, 0x7f, 0x80][c.below(4)];
                for byte in items[i].iter_mut().skip(at).take(4) {
                    *byte = value;
                }
            }
        }
        if items.is_empty() {
            items.push(Vec::new());
        }
    }
}

/// How the bytes of a source come.
#[derive(Debug)]
pub struct Scripted {
    bytes: Vec<u8>,
    at: usize,
    piece: usize,
    /// Every so many waits nothing comes in time, as long as all those waits together are no longer
    /// than a stall may be; 0: never.
    dry: usize,
    waited: Duration,
    waits: usize,
    reads: Arc<Mutex<usize>>,
}

impl ByteSource for Scripted {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        *self.reads.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let mut rest = rest.get(..self.piece).unwrap_or(rest);
        let mut read = 0;
        for slice in guest {
            let n = slice.len().min(rest.len());
            slice.copy_from(&rest[..n]);
            rest = &rest[n..];
            read += n;
        }
        let n = buf.len().min(rest.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.at += read + n;
        Ok(read + n)
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        // A source that has said everything waits for the answer.
        let read = self.read_scatter(&[], buf)?;
        Ok((read > 0 || buf.is_empty()).then_some(read))
    }

    fn wait(
        &mut self,
        _: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        self.waits += 1;
        let patience = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let patience = patience.unwrap_or_default();
        if self.dry == 0 || !self.waits.is_multiple_of(self.dry) || self.waited > LONGEST_STALL {
            return Ok(Readiness::Channel);
        }
        self.waited += patience;
        Ok(Readiness::TimedOut)
    }

    fn set_read_deadline(&mut self, _: Option<Instant>) {}
}

/// What the target has answered.
#[derive(Clone, Debug, Default)]
struct Answers(Arc<Mutex<Vec<u8>>>);

impl Answers {
    /// How often the target has said that the guest is there, and that it is not.
    fn shuts(&self) -> (usize, usize) {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |shut: &[u8]| bytes.windows(8).filter(|w| *w == shut).count();
        (
            count(&[0, 1, 0, 4, 0, 0, 0, 0]),
            count(&[0, 1, 0, 4, 0, 0, 0, 1]),
        )
    }
}

impl ByteSink for Answers {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        for chunk in chunks {
            if let Chunk::Bytes(bytes) = chunk {
                let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                all.extend_from_slice(bytes);
            }
        }
        Ok(())
    }

    fn set_write_deadline(&mut self, _: Option<Instant>) {}
}

/// A VMM whose devices say in two bytes how long they are.
#[derive(Debug, Default)]
struct Vmm {
    shown: usize,
}

impl Loads for Vmm {
    fn load_device(
        &mut self,
        section: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<()>, BoxError> {
        if !section.idstr.as_str().starts_with(['d', 'e']) {
            return Err("no such device".into());
        }
        let Some(len) = body.first_chunk() else {
            return Ok(Parsed::NeedMore);
        };
        let len = 2 + usize::from(u16::from_be_bytes(*len));
        self.shown += body.len().min(len);
        Ok(if body.len() < len {
            Parsed::NeedMore
        } else {
            Parsed::Section((), len)
        })
    }
}

/// A guest that was loaded, and not answered for.
enum Held {
    Known(Settled<GuestRamMmap>),
    Opaque(Loaded),
}

impl Held {
    fn refuse(self) {
        match self {
            Self::Known(settled) => settled.refuse(),
            Self::Opaque(loaded) => loaded.refuse(),
        }
    }

    fn confirm(self) -> Result<(), TargetError> {
        match self {
            Self::Known(settled) => settled.confirm().map(drop),
            Self::Opaque(mut loaded) => loaded.confirm(),
        }
    }
}

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest was loaded and confirmed.
    Confirmed,
    /// The guest was loaded and given back.
    Refused,
    /// The stream was not taken.
    Failed,
    /// The stream announced more memory than there is here.
    TooLarge,
}

/// Has a target load the stream that `input` stands for.
///
/// # Panics
/// A promise of the target's is not kept.
pub fn run(input: &[u8]) -> Ending {
    let mut c = Choices(input);
    let mode = c.below(4);
    let piece = match c.below(4) {
        0 => 1 + c.below(16),
        1 => 1 + c.below(2000),
        _ => 1 << 20,
    };
    let dry = c.below(6);
    let give_back = c.rarely(4);
    let xbzrle = c.rarely(2);
    let mut items = items(&mut c);
    spoil(&mut c, &mut items);
    let mut bytes = items.concat();
    if c.rarely(6) {
        let at = c.below(bytes.len() + 1);
        bytes.truncate(at);
    }

    let len = bytes.len();
    let reads = Arc::default();
    let source = Scripted {
        bytes,
        at: 0,
        piece,
        dry,
        waited: Duration::ZERO,
        waits: 0,
        reads: Arc::clone(&reads),
    };
    let answers = Answers::default();
    let mut vmm = Vmm::default();
    let loaded = load(mode, xbzrle, source, answers.clone(), &mut vmm);

    // Work is in proportion to what came: reads that bring nothing end a stream, and a body is
    // shown again only when twice as much is there, or when nothing has come for a while.
    let reads = *reads.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(reads <= 2 * len + 64, "{reads} reads for {len} bytes");
    let most = (4 + 16 * usize::from(dry > 0)) * (len + (64 << 10));
    assert!(vmm.shown <= most, "{} bytes shown of {len}", vmm.shown);
    let ending = match loaded {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let (confirmed, refused) = answers.shuts();
            assert!(confirmed == 0 && refused <= 1, "a failure was confirmed");
            return Ending::Failed;
        }
        Ok(None) => return Ending::TooLarge,
        Ok(Some(loaded)) if give_back => {
            assert_eq!(answers.shuts(), (0, 0), "an answer before the decision");
            loaded.refuse();
            assert_eq!(answers.shuts().0, 0);
            Ending::Refused
        }
        Ok(Some(loaded)) => {
            let waits = answers.0.lock().is_ok_and(|bytes| !bytes.is_empty());
            assert_eq!(answers.shuts(), (0, 0), "an answer before the decision");
            loaded.confirm().expect("the answer is written to memory");
            assert!(!waits || answers.shuts() == (1, 0));
            Ending::Confirmed
        }
    };
    assert!(answers.shuts().0 + answers.shuts().1 <= 1);
    ending
}

fn load(
    mode: usize,
    xbzrle: bool,
    source: Scripted,
    answers: Answers,
    vmm: &mut Vmm,
) -> Result<Option<Held>, TargetError> {
    let config = TargetConfig::new(
        DecoderConfig::new(ConfigurationRule::Any)
            .xbzrle(xbzrle)
            .max_description(8192),
    )
    .max_devices(MAX_DEVICES);
    let limits = TailLimits {
        len: 4 * MAX_DEVICES,
        ..TailLimits::default()
    };
    let reader = StreamReader::new(source, b"");
    let answers: Option<Box<dyn ByteSink>> = Some(Box::new(answers));
    let (target, blocks) = if mode & 1 == 0 {
        let block = |name, pages| RamBlock::new(name, pages * PAGE_SIZE);
        let blocks = [block("pc.ram", 6), block("vga", 2)];
        let blocks = blocks.into_iter().collect::<Result<_, _>>();
        let blocks = RamBlockTable::new(blocks.expect("blocks")).expect("two blocks");
        let ram = GuestRamMmap::anonymous(blocks.clone()).expect("memory");
        (Target::new(config, reader, answers, &ram), blocks)
    } else {
        let (target, blocks) = Target::from_announcement(config, reader, answers)?;
        let early: usize = target
            .early_sections()
            .sections()
            .map(|s| s.body.len())
            .sum();
        assert!(early <= MAX_DEVICES, "{early} bytes before ram");
        (target, blocks)
    };
    if blocks.total_bytes() > MAX_PAGES * PAGE_SIZE {
        return Ok(None);
    }
    let ram = GuestRamMmap::anonymous(blocks).expect("memory");
    if mode & 2 == 0 {
        let mut devices = Only(vmm);
        let arrived = target.load((ram, NoMultifd), &mut devices)?;
        return Ok(Some(Held::Known(arrived.settle(&mut devices)?)));
    }
    let target = target.keeping_dirty_bitmaps();
    let (loaded, tail) = target.load_opaque(&ram, &mut NoMultifd, limits)?;
    assert!(tail.as_bytes().len() <= limits.len + (128 << 10));
    assert!(tail.sections().len() > 0);
    Ok(Some(Held::Opaque(loaded)))
}
