//! The limit on bandwidth over real sockets, as the receiving side sees it.
#![allow(clippy::tests_outside_test_module)] // this whole crate is tests

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration_stream::io::FdChannel;
use migration_stream::precopy::{
    Control, HandOver, Limits, Progress, RamSetup, Source, SourceConfig, SourceError,
    SourceObserver, SourceStatus,
};
use migration_stream::ram::{BlockId, InStream, RamBlock, RamBlockTable, ZeroPageDetection};
use migration_stream::{
    BoxError, Configuration, DirtyLog, GuestRam, GuestRamMmap, MachineName, MemoryError, PAGE_SIZE,
    PageTransport, StreamWriter, Vm, VmControl,
};
use multifd::{ChannelCount, Compression, MultifdConfig, SendSet};
use vm_memory::{Bytes, VolatileMemory};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 16 * MIB;
/// A packet, and what a socket holds.
const PACKET: u64 = MIB;
const PATIENCE: Duration = Duration::from_secs(30);

/// The log of a guest that stands still.
struct Clean;

impl DirtyLog for Clean {
    fn start(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
    fn sync(&mut self, _: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        Ok(())
    }
    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

struct Still;

impl VmControl for Still {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

impl SourceObserver for Still {}

/// Memory of which every page is different; of each, `random` bytes cannot be compressed.
fn memory(pages: u64, random: usize) -> Arc<GuestRamMmap> {
    let block = RamBlock::new("ram", pages * PAGE_SIZE).unwrap();
    let ram = GuestRamMmap::anonymous(RamBlockTable::new(vec![block]).unwrap()).unwrap();
    let slice = ram.regions()[0].as_volatile_slice();
    let mut state = 1_u64;
    let mut page = vec![1_u8; 4096];
    for at in 0..usize::try_from(pages).unwrap() {
        for bytes in page[..random].chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.copy_from_slice(&state.to_le_bytes()[..bytes.len()]);
        }
        slice.write_slice(&page, at * 4096).unwrap();
    }
    Arc::new(ram)
}

/// When how many bytes came.
type Arrivals = Arc<Mutex<Vec<(Instant, u64)>>>;

fn connection(arrivals: &Arrivals) -> (FdChannel, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let arrivals = Arc::clone(arrivals);
    let reader = thread::spawn(move || {
        let mut buf = vec![0; 64 << 10];
        while let Ok(n @ 1..) = theirs.read(&mut buf) {
            arrivals.lock().unwrap().push((Instant::now(), n as u64));
        }
    });
    (FdChannel::new(ours, PATIENCE).unwrap(), reader)
}

/// Migrates `ram`, and says what came when.
fn migrate(ram: &Arc<GuestRamMmap>, channels: u8, compression: Compression) -> Vec<(Instant, u64)> {
    let arrivals = Arrivals::default();
    let (main, reader) = connection(&arrivals);
    let mut readers = vec![reader];
    let ram: Arc<dyn GuestRam> = Arc::clone(ram) as _;
    let transport: Box<dyn PageTransport> = match ChannelCount::new(channels) {
        None => Box::new(InStream::new(
            Arc::clone(&ram),
            ZeroPageDetection::default(),
        )),
        Some(count) => {
            let config = MultifdConfig::new(count).compression(compression);
            let mut connected = Vec::new();
            for _ in 0..channels {
                let (channel, reader) = connection(&arrivals);
                readers.push(reader);
                connected.push(channel.into());
            }
            Box::new(SendSet::start(Arc::clone(&ram), connected, &config).unwrap())
        }
    };
    let config = SourceConfig::new(Configuration::new(MachineName::new("none").unwrap()))
        .confirm_timeout(PATIENCE);
    let setup = RamSetup {
        log: Clean,
        transport,
    };
    let limits = Arc::new(Limits::new(LIMIT, Duration::from_millis(300)));
    let out = StreamWriter::new(main);
    let mut vm = Vm {
        control: Still,
        devices: (),
    };
    let source = Source::start(config, limits, out, None, setup, &mut vm).unwrap();
    drop(source.run(&mut vm));
    readers.into_iter().for_each(|r| r.join().unwrap());
    let mut arrivals = std::mem::take(&mut *arrivals.lock().unwrap());
    arrivals.sort();
    arrivals
}

/// The limit holds over any second, and is used.
fn check(arrivals: &[(Instant, u64)], expected: u64) {
    let total: u64 = arrivals.iter().map(|a| a.1).sum();
    assert!(total >= expected, "{total} of {expected}");
    let (mut end, mut sum) = (0, 0);
    for &(from, bytes) in arrivals {
        while let Some(next) = arrivals
            .get(end)
            .filter(|a| a.0 < from + Duration::from_secs(1))
        {
            sum += next.1;
            end += 1;
        }
        assert!(
            sum <= LIMIT + LIMIT / 10 + PACKET,
            "{} MiB in a second",
            sum / MIB
        );
        sum -= bytes;
    }
    let took = arrivals.last().unwrap().0 - arrivals[0].0;
    let ideal = Duration::from_millis(total * 1000 / LIMIT);
    // Loaded machines are slow; half the limit is no limit that nobody reaches.
    assert!(took < 2 * ideal, "{took:?} instead of {ideal:?}");
}

/// 24 MiB take a second and a half.
const PAGES: u64 = 24 * MIB / PAGE_SIZE;

#[test]
fn the_limit_holds_on_the_main_stream() {
    check(
        &migrate(&memory(PAGES, 4096), 0, Compression::None),
        24 * MIB,
    );
}

#[test]
fn the_limit_holds_with_two_channels() {
    check(
        &migrate(&memory(PAGES, 4096), 2, Compression::None),
        24 * MIB,
    );
}

#[test]
fn the_limit_holds_with_255_channels() {
    check(
        &migrate(&memory(PAGES, 4096), 255, Compression::None),
        24 * MIB,
    );
}

#[cfg(feature = "zstd")]
#[test]
fn the_limit_is_that_of_the_wire_with_compression() {
    let compression = Compression::Zstd(multifd::ZstdLevel::default());
    // A quarter of each page cannot be compressed.
    check(&migrate(&memory(4 * PAGES, 1024), 4, compression), 24 * MIB);
}

/// Cancels when the migration has lasted for a while; notes when it was asked.
struct Canceller {
    /// Switches over first.
    switches: bool,
    since: Instant,
    asked: Instant,
    longest: Duration,
    cancelled: Option<Instant>,
    resumed: bool,
}

impl VmControl for Canceller {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.since = Instant::now();
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, BoxError> {
        self.resumed = true;
        Ok(Instant::now())
    }
}

impl SourceObserver for Canceller {
    fn progress(&mut self, progress: &Progress) -> Control {
        let now = Instant::now();
        self.longest = self.longest.max(now - self.asked);
        self.asked = now;
        if self.switches && progress.status == SourceStatus::Active {
            return Control::SwitchOver;
        }
        if self.since.elapsed() < Duration::from_millis(300) {
            return Control::Continue;
        }
        self.cancelled.get_or_insert(now);
        Control::Cancel
    }
}

#[test]
fn a_peer_that_stands_still_delays_neither_progress_nor_a_cancel() {
    let ram = memory(64 * MIB / PAGE_SIZE, 64);
    for (channels, switches) in [(0, false), (4, false), (0, true), (4, true)] {
        let mut peers = Vec::new();
        let mut connect = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            peers.push(theirs);
            FdChannel::new(ours, PATIENCE).unwrap()
        };
        let main = connect();
        let ram: Arc<dyn GuestRam> = Arc::clone(&ram) as _;
        let transport: Box<dyn PageTransport> = match ChannelCount::new(channels) {
            None => Box::new(InStream::new(
                Arc::clone(&ram),
                ZeroPageDetection::default(),
            )),
            Some(count) => {
                let config = MultifdConfig::new(count);
                let connected = (0..channels).map(|_| connect().into()).collect();
                Box::new(SendSet::start(Arc::clone(&ram), connected, &config).unwrap())
            }
        };
        let config = SourceConfig::new(None).confirm_timeout(PATIENCE);
        let setup = RamSetup {
            log: Clean,
            transport,
        };
        let limits = Arc::new(Limits::new(0, Duration::from_millis(300)));
        let source = Source::start(
            config,
            limits,
            StreamWriter::new(main),
            None,
            setup,
            &mut (),
        )
        .unwrap();
        let now = Instant::now();
        let vm = Canceller {
            switches,
            since: now,
            asked: now,
            longest: Duration::ZERO,
            cancelled: None,
            resumed: false,
        };
        let mut whole = Vm {
            control: vm,
            devices: (),
        };
        let result = source.run(&mut whole);
        let vm = whole.control;
        let took = vm.cancelled.unwrap().elapsed();
        assert!(
            matches!(result, HandOver::Failed(SourceError::Cancelled)),
            "{channels} {switches}"
        );
        assert_eq!(vm.resumed, switches);
        // 50 and 100 ms, and what a loaded machine takes.
        assert!(vm.longest < Duration::from_millis(300), "{:?}", vm.longest);
        assert!(took < Duration::from_millis(500), "{took:?}");
    }
}
