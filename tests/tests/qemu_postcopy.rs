//! Postcopy of real QEMU, with a destination that has no guest but speaks as one: it reads what
//! comes, asks for pages, loses the connection and says what it has. No userfaultfd is needed.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::time::Duration;

use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::{Command, CommandNumber};
use migration_stream::raw::decoder::{Item, MAX_ITEM_LEN, RamItem, Step, StreamDecoder};
use migration_stream::raw::postcopy::{
    EndOfStream, PackageDecoder, PackageEncoder, PackageItem, PackageStep, PageRequest,
    PostcopyOrder, PostcopyRecords, PostcopyState, ReceivedBitmap, RequestEncoder,
};
use migration_stream::raw::ram::{PageAddress, Record};
use migration_stream::raw::return_path::ReturnPathMessage;
use migration_stream::raw::section::encode_footer;
use migration_stream::{ConfigurationRule, DecoderConfig, PAGE_SIZE, SectionId};
use serde_json::{Value, json};
use tests::guest::{self, Content};
use tests::harness::{self, Needs};
use tests::qemu::{Binary, Machine, Qemu};
use tests::{PATIENCE, Result};

/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// What the RAM block that a test's file stands behind is called.
const RAM: &str = "ram0";
/// Far more than the devices of these machines have, bytes.
const MAX_PACKAGE: u32 = 4 << 20;
/// As a page in memory.
const PAGE: usize = 4096;

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING.qemu((7, 2)).test_qemu(
            "a_guest_goes_over_to_postcopy_and_sends_what_it_is_asked_for",
            |qemu| postcopy(qemu, false),
        ),
        // Before, they wait for what goes in order on the main channel.
        Needs::NOTHING
            .qemu((8, 0))
            .test_qemu("pages_asked_for_come_on_the_preempt_channel", |qemu| {
                postcopy(qemu, true)
            }),
        Needs::NOTHING.qemu((7, 2)).test_qemu(
            "a_broken_connection_is_recovered_from_with_our_bitmaps",
            recovery,
        ),
    ])
}

/// A source whose guest stands still with known memory, its migration begun and told to go over.
fn begin(qemu: &Binary, capabilities: &[&str]) -> Result<(Qemu, Destination, Vec<u8>)> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("ram");
    guest::write_memory(&file, u64::from(MEMORY) << 20, Content::Mixed)?;
    let content = fs::read(&file)?;
    let mut source = Machine::new("q35", MEMORY).memory_from(&file).start(qemu)?;
    source.qmp.enable(&["return-path", "postcopy-ram"])?;
    source.qmp.enable(capabilities)?;
    // Most of memory is still to come when it goes over.
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 4 << 20}))?;
    let socket = source.dir().join("destination");
    let listener = UnixListener::bind(&socket)?;
    source.migrate(&format!("unix:{}", socket.display()))?;
    source.qmp.execute("migrate-start-postcopy", Value::Null)?;
    Ok((source, Destination::accept(listener)?, content))
}

fn postcopy(qemu: &Binary, preempt: bool) -> Result<()> {
    let capabilities: &[&str] = if preempt { &["postcopy-preempt"] } else { &[] };
    let (mut source, mut destination, content) = begin(qemu, capabilities)?;
    while destination.order.state() != PostcopyState::Running {
        destination.step()?;
    }
    destination.until_active(&mut source)?;
    let asked = destination.ask()?;
    if preempt {
        let mut channel = Channel::new(accept(&destination.listener)?);
        let mut records = PostcopyRecords::of_preempt_channel();
        for expected in asked {
            destination.until_urgent(&mut channel)?;
            assert_eq!(
                destination.urgent(&mut channel, &mut records)?,
                Some(expected)
            );
        }
        destination.end(&mut source)?;
        assert_eq!(destination.urgent(&mut channel, &mut records)?, None);
    } else {
        while !asked.iter().all(|page| destination.has(*page)) {
            destination.step()?;
        }
        // They overtook what goes in order.
        let (_, bitmap) = &destination.memory[&asked[0].block];
        assert!(bitmap.received() < bitmap.pages());
        destination.end(&mut source)?;
    }
    destination.check(&content)?;
    let mut expected = vec![CommandNumber::OpenReturnPath, CommandNumber::Ping];
    expected.push(CommandNumber::PostcopyAdvise);
    if qemu.is_since((10, 0)) {
        expected.push(CommandNumber::SwitchoverStart);
    }
    expected.extend([
        CommandNumber::PostcopyRamDiscard,
        CommandNumber::Ping,
        CommandNumber::Packaged,
        CommandNumber::Ping,
    ]);
    assert_eq!(destination.commands, expected);
    Ok(())
}

fn recovery(qemu: &Binary) -> Result<()> {
    let (mut source, mut destination, content) = begin(qemu, &[])?;
    while destination.order.state() != PostcopyState::Running {
        destination.step()?;
    }
    // Before that a broken connection is the end of the migration.
    destination.until_active(&mut source)?;
    let received = |destination: &Destination| -> u64 {
        let bitmaps = destination.memory.values();
        bitmaps.map(|(_, bitmap)| bitmap.received()).sum()
    };
    while received(&destination) < 10 {
        destination.step()?;
    }
    destination.main.stream.shutdown(Shutdown::Both)?;
    destination.order.interrupted()?;
    source.wait_migration("postcopy-paused")?;

    let socket = source.dir().join("again");
    destination.listener = UnixListener::bind(&socket)?;
    source.qmp.execute(
        "migrate",
        json!({"uri": format!("unix:{}", socket.display()), "resume": true}),
    )?;
    destination.reconnect()?;
    destination.commands.clear();
    while destination.order.state() == PostcopyState::Recovering {
        destination.step()?;
    }
    let mut expected = vec![CommandNumber::RecvBitmap; destination.memory.len()];
    expected.push(CommandNumber::PostcopyResume);
    assert_eq!(destination.commands, expected);
    destination.sent_again = 0;
    destination.end(&mut source)?;
    // The source believed the bitmaps: what was there did not come again.
    assert_eq!(destination.sent_again, 0);
    destination.check(&content)
}

fn accept(listener: &UnixListener) -> Result<UnixStream> {
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

/// A connection, and what was read of it and not taken yet.
struct Channel {
    stream: UnixStream,
    buffer: Vec<u8>,
    offset: u64,
}

impl Channel {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            offset: 0,
        }
    }

    fn reader(&self) -> Reader<'_> {
        Reader::new(&self.buffer, self.offset)
    }

    /// Reads more, unless the stream has ended.
    fn fill(&mut self) -> Result<bool> {
        let mut bytes = vec![0; MAX_ITEM_LEN];
        let n = self.stream.read(&mut bytes)?;
        self.buffer.extend_from_slice(&bytes[..n]);
        Ok(n > 0)
    }

    fn need(&mut self) -> Result<()> {
        match self.fill()? {
            true => Ok(()),
            false => Err(format!("the stream ends at {:#x}", self.offset).into()),
        }
    }

    fn take(&mut self, n: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < n {
            self.need()?;
        }
        let rest = self.buffer.split_off(n);
        self.offset += n as u64;
        Ok(std::mem::replace(&mut self.buffer, rest))
    }
}

/// What a destination knows, all but the guest.
struct Destination {
    listener: UnixListener,
    main: Channel,
    decoder: StreamDecoder,
    order: PostcopyOrder,
    requests: RequestEncoder,
    memory: BTreeMap<BlockId, (Vec<u8>, ReceivedBitmap)>,
    commands: Vec<CommandNumber>,
    /// Pages that came although they were there, since the connection is a new one.
    sent_again: u64,
    end: Option<EndOfStream>,
}

impl Destination {
    fn accept(listener: UnixListener) -> Result<Self> {
        Ok(Self {
            main: Channel::new(accept(&listener)?),
            listener,
            decoder: StreamDecoder::new(DecoderConfig::new(ConfigurationRule::Any), None),
            order: PostcopyOrder::of_any_source(),
            requests: RequestEncoder::new(),
            memory: BTreeMap::new(),
            commands: Vec::new(),
            sent_again: 0,
            end: None,
        })
    }

    /// Takes a new connection, which goes on with this one's stream.
    fn reconnect(&mut self) -> Result<()> {
        self.main = Channel::new(accept(&self.listener)?);
        self.decoder.reconnected()?;
        self.order.reconnected()?;
        self.requests = RequestEncoder::new();
        Ok(())
    }

    fn blocks(&self) -> Result<&RamBlockTable> {
        Ok(self.decoder.blocks().ok_or("RAM is not set up")?)
    }

    /// Reads one item, and does what it says.
    fn step(&mut self) -> Result<()> {
        let item = loop {
            let mut r = self.main.reader();
            let step = self.decoder.next(&mut r)?;
            let consumed = r.consumed();
            self.main.take(consumed)?;
            match step {
                Step::Item(item) => break item,
                Step::NeedMore { .. } => self.main.need()?,
            }
        };
        match item {
            Item::Command(command) => {
                self.order.command(&command)?;
                self.command(command)?;
            }
            Item::Ram(RamItem::BlockList(blocks)) => {
                for (id, block) in blocks.iter() {
                    let bytes = vec![0; usize::try_from(block.used_length())?];
                    self.memory.insert(id, (bytes, ReceivedBitmap::new(block)?));
                }
            }
            Item::Ram(RamItem::Page(page)) => {
                let bytes = self.main.take(PAGE)?;
                self.landed(page, &bytes)?;
            }
            Item::Ram(RamItem::Zero(page)) => self.landed(page, &[0; PAGE])?,
            Item::Eof => self.end = Some(self.order.end_of_stream()?),
            Item::Header
            | Item::Configuration(_)
            | Item::Section(_)
            | Item::Continuation { .. }
            | Item::Footer(_)
            | Item::Ram(RamItem::EndOfSection) => {}
            other => return Err(format!("{other:?} in postcopy").into()),
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> Result<()> {
        // The blocks are many, and so are their discards.
        if self.commands.last() != Some(&command.number())
            || matches!(command, Command::RecvBitmap(_))
        {
            self.commands.push(command.number());
        }
        match command {
            Command::Ping(value) => self.send(&ReturnPathMessage::Pong(value)),
            Command::PostcopyRamDiscard(discard) => {
                let name = discard.block().as_str();
                let id = self.blocks()?.find(name.as_bytes()).ok_or("no block")?;
                let (_, bitmap) = self.memory.get_mut(&id).ok_or("no memory")?;
                for range in discard.ranges() {
                    let end = (range.start + range.length).div_ceil(PAGE_SIZE);
                    for page in range.start / PAGE_SIZE..end {
                        assert!(bitmap.clear(page), "{name}: {range:?}");
                    }
                }
                Ok(())
            }
            Command::Packaged { size } => self.package(size),
            Command::RecvBitmap(name) => {
                let (id, _) = ReceivedBitmap::block_of(&name, self.blocks()?)?;
                let mut bytes = Vec::new();
                self.memory[&id].1.encode(name, &mut bytes);
                Ok(self.main.stream.write_all(&bytes)?)
            }
            Command::PostcopyResume => self.send(&ReturnPathMessage::ResumeAck { value: 1 }),
            _ => Ok(()),
        }
    }

    /// Reads a package, and puts it together again.
    fn package(&mut self, size: u32) -> Result<()> {
        let begin = self.main.offset;
        let bytes = self.main.take(usize::try_from(size)?)?;
        let mut decoder = PackageDecoder::new(size, begin, MAX_PACKAGE, true)?;
        let mut encoder = PackageEncoder::new();
        let mut devices = 0;
        let mut at = 0;
        let mut pings = Vec::new();
        loop {
            let mut r = Reader::new(&bytes[at..], begin + at as u64);
            let step = decoder.next(&mut r, &mut self.order)?;
            at += r.consumed();
            match step {
                PackageStep::End => break,
                PackageStep::NeedMore { at_least } => {
                    return Err(format!("{at_least} bytes missing in a package").into());
                }
                PackageStep::Item(PackageItem::Section(header)) => {
                    let len = body_len(&bytes[at..], header.id)?;
                    encoder.section(&header, &bytes[at..at + len]);
                    at += len;
                    devices += 1;
                }
                PackageStep::Item(PackageItem::Command(Command::Ping(value))) => {
                    encoder.ping(value);
                    pings.push(value);
                }
                PackageStep::Item(_) => {}
            }
        }
        assert!(devices > 5, "{devices} devices");
        assert_eq!(pings.first(), Some(&3));
        let mut again = Vec::new();
        encoder.finish(&mut again)?;
        guest::compare("package", &bytes, &again[9..])?;
        for value in pings {
            self.send(&ReturnPathMessage::Pong(value))?;
        }
        Ok(())
    }

    fn send(&mut self, message: &ReturnPathMessage) -> Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        Ok(self.main.stream.write_all(&bytes)?)
    }

    fn landed(&mut self, page: PageAddress, bytes: &[u8]) -> Result<()> {
        let (memory, bitmap) = self.memory.get_mut(&page.block).ok_or("no memory")?;
        let start = usize::try_from(page.offset)?;
        memory[start..start + PAGE].copy_from_slice(bytes);
        if bitmap.has(page.offset / PAGE_SIZE) {
            self.sent_again += 1;
        }
        bitmap.set(page.offset / PAGE_SIZE);
        Ok(())
    }

    fn has(&self, page: PageAddress) -> bool {
        self.memory[&page.block].1.has(page.offset / PAGE_SIZE)
    }

    /// Reads until the source is in postcopy too, which it is a moment after it has said so: what
    /// is asked of it before waits behind what goes in order.
    fn until_active(&mut self, source: &mut Qemu) -> Result<()> {
        while source.qmp.execute("query-migrate", Value::Null)?["status"] != "postcopy-active" {
            // Nothing is said of it unless memory is read meanwhile.
            self.step()?;
        }
        Ok(())
    }

    /// Reads the main channel until something has come on the preempt channel: one that nobody
    /// reads stops the source.
    fn until_urgent(&mut self, channel: &mut Channel) -> Result<()> {
        let stream = channel.stream.try_clone()?;
        stream.set_read_timeout(Some(Duration::from_millis(10)))?;
        while channel.buffer.is_empty() {
            match channel.fill() {
                Ok(_) => break,
                Err(e) if is_timeout(&*e) => self.step()?,
                Err(e) => return Err(e),
            }
        }
        Ok(stream.set_read_timeout(Some(PATIENCE))?)
    }

    /// Asks for the last two pages of memory.
    fn ask(&mut self) -> Result<[PageAddress; 2]> {
        let blocks = self.blocks()?.clone();
        let block = blocks.find(RAM.as_bytes()).ok_or("no memory")?;
        let last = u64::from(MEMORY) * (1 << 20) - PAGE_SIZE;
        let pages = [last, last - 2 * PAGE_SIZE].map(|offset| PageAddress { block, offset });
        for page in pages {
            assert!(!self.has(page), "nothing to ask for");
            let request = PageRequest {
                block,
                start: page.offset,
                length: u32::try_from(PAGE_SIZE)?,
            };
            let message = self.requests.request(request, &blocks)?;
            self.send(&message)?;
        }
        Ok(pages)
    }

    /// The next page on the preempt channel, `None` at its end.
    fn urgent(
        &mut self,
        channel: &mut Channel,
        records: &mut PostcopyRecords,
    ) -> Result<Option<PageAddress>> {
        let record = loop {
            let mut r = channel.reader();
            match records.next(&mut r, self.blocks()?) {
                Ok(record) => {
                    let consumed = r.consumed();
                    channel.take(consumed)?;
                    break record;
                }
                Err(e) if e.missing().is_none() => return Err(e.into()),
                // The end is the connection's.
                Err(_) if channel.fill()? => {}
                Err(_) if channel.buffer.is_empty() => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        };
        match record {
            Record::Page(page) => {
                let bytes = channel.take(PAGE)?;
                self.landed(page, &bytes)?;
                Ok(Some(page))
            }
            Record::Zero(page) => {
                self.landed(page, &[0; PAGE])?;
                Ok(Some(page))
            }
            Record::EndOfSection => Ok(None),
            other => Err(format!("{other:?} on the preempt channel").into()),
        }
    }

    /// Reads to the end, at full speed, and confirms.
    fn end(&mut self, source: &mut Qemu) -> Result<()> {
        source
            .qmp
            .set_parameters(json!({"max-postcopy-bandwidth": 0}))?;
        while self.end.is_none() {
            self.step()?;
        }
        self.send(&ReturnPathMessage::Shut { status: 0 })?;
        source.wait_migration("completed")?;
        Ok(())
    }

    /// All of memory is there, and nothing came behind it.
    fn check(&mut self, content: &[u8]) -> Result<()> {
        assert_eq!(self.end, Some(EndOfStream::Postcopy));
        assert_eq!(self.main.stream.read(&mut [0])?, 0);
        assert_eq!(self.main.buffer, b"");
        for (id, block) in self.blocks()?.iter() {
            let (memory, bitmap) = &self.memory[&id];
            assert_eq!(bitmap.received(), block.pages(), "{}", block.name());
            if block.name() == RAM {
                guest::compare(RAM, content, memory)?;
            }
        }
        Ok(())
    }
}

/// Length of a device's body, which the stream does not say: up to the device's own footer, where
/// another section or a command follows.
fn body_len(bytes: &[u8], id: SectionId) -> Result<usize> {
    let mut footer = Vec::new();
    encode_footer(id, &mut footer);
    let is_next = |rest: &[u8]| matches!(rest, [0x04, ..] | [0x08, 0, ..]);
    bytes
        .windows(footer.len())
        .enumerate()
        .find(|(at, w)| *w == footer && is_next(&bytes[at + footer.len()..]))
        .map(|(at, _)| at)
        .ok_or_else(|| format!("section {id} has no footer").into())
}
