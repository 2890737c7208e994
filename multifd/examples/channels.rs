//! Sends the memory of a guest that writes by four channels over socket pairs. The guest is a thread that
//! counts in its memory.
//!
//! `cargo run -p migration-multifd --example channels`

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migration_stream::io::FdChannel;
use migration_stream::precopy::{
    Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target, TargetConfig,
};
use migration_stream::{
    BoxError, ConfigurationRule, GuestRam, GuestRamMmap, StreamReader, StreamWriter, Vm, VmControl,
};
use multifd::{ChannelCount, IncomingPages, MultifdConfig, RecvSet, SendSet};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileMemory};

const PAGES: usize = 4096;
const CHANNELS: u8 = 4;
const LIMIT: Duration = Duration::from_secs(10);

type Ram = GuestRamMmap<AtomicBitmap>;

/// Pauses and resumes the guest. It writes only while it holds the lock and finds `true`.
#[derive(Clone, Default)]
struct Control(Arc<Mutex<bool>>);

impl Control {
    fn runs(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmControl for Control {
    fn pause(&mut self) -> Result<(), BoxError> {
        *self.runs() = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        *self.runs() = true;
        Ok(Instant::now())
    }
}

impl SourceObserver for Control {}

fn ram() -> Result<Arc<Ram>, BoxError> {
    let ranges = [(GuestAddress(0), PAGES * 4096)];
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?;
    Ok(Arc::new(GuestRamMmap::over(&memory, &["ram"])?))
}

/// Runs a guest that writes its count to one page after the other.
fn count(ram: &Ram, runs: Control) {
    let region = Arc::clone(&ram.regions()[0]);
    thread::spawn(move || -> Result<(), BoxError> {
        for count in 1u64.. {
            let running = runs.runs();
            if *running {
                let page = usize::try_from(count)? % PAGES;
                region.as_volatile_slice().write_obj(count, page * 4096)?;
            }
            drop(running);
            thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    });
}

fn config() -> Result<MultifdConfig, BoxError> {
    Ok(MultifdConfig::new(
        ChannelCount::new(CHANNELS).ok_or("no channel")?,
    ))
}

/// Sends the running guest. The first of `sockets` is the main stream's.
fn send(ram: &Arc<Ram>, control: Control, mut sockets: Vec<FdChannel>) -> Result<u64, BoxError> {
    let mut vm = Vm {
        control,
        devices: (),
    };
    let channels = sockets.split_off(1).into_iter().map(Into::into).collect();
    let main = sockets.remove(0);
    let pages: Arc<dyn GuestRam> = Arc::clone(ram) as _;
    let setup = RamSetup {
        log: ram.own_writes(),
        transport: SendSet::start(pages, channels, &config()?)?,
    };
    let source = SourceConfig::new(None).confirm_timeout(LIMIT);
    let out = StreamWriter::new(main.share());
    let answers = Some(ReturnPathReader::new(main));
    let limits = Arc::new(Limits::default());
    let source = Source::start(source, limits, out, answers, setup, &mut vm)?;
    Ok(source.run(&mut vm).completed()?.progress.transferred)
}

/// Receives a guest into `ram`.
fn receive(ram: &Arc<Ram>, control: Control, mut sockets: Vec<FdChannel>) -> Result<(), BoxError> {
    let mut vm = Vm {
        control,
        devices: (),
    };
    let channels = sockets.split_off(1).into_iter().map(Into::into).collect();
    let main = sockets.remove(0);
    // The loader of the main stream notices at once when a channel breaks.
    let waker = main.share();
    let set = RecvSet::start(Arc::clone(ram), channels, &config()?, move |_| {
        waker.shutdown()
    })?;
    let pages = IncomingPages::multifd(set);
    let target = TargetConfig::new(ConfigurationRule::Absent).max_devices(1 << 20);
    let reader = StreamReader::new(main.share(), b"");
    let target = Target::new(target, reader, Some(Box::new(main)), pages.store());
    // `settle` joins the channels: no page is written after it.
    target.load(pages, &mut vm)?.settle(&mut vm)?.confirm()?;
    Ok(())
}

fn main() -> Result<(), BoxError> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..=CHANNELS {
        let (a, b) = UnixStream::pair()?;
        ours.push(FdChannel::new(a, LIMIT)?);
        theirs.push(FdChannel::new(b, LIMIT)?);
    }
    let (old, new) = (ram()?, ram()?);
    let mut control = Control::default();
    count(&old, control.clone());
    control.resume()?;
    thread::sleep(Duration::from_millis(50));

    let away = Arc::clone(&old);
    let source = thread::spawn(move || send(&away, control, ours));
    receive(&new, Control::default(), theirs)?;
    let sent = source.join().map_err(|_| "the source has panicked")??;

    let (mut before, mut after) = ([0u8; 4096], [0u8; 4096]);
    let mut written = 0;
    for page in 0..PAGES {
        old.regions()[0]
            .as_volatile_slice()
            .read_slice(&mut before, page * 4096)?;
        new.regions()[0]
            .as_volatile_slice()
            .read_slice(&mut after, page * 4096)?;
        assert_eq!(before, after, "page {page}");
        written += usize::from(before != [0; 4096]);
    }
    assert!(written > 0);
    println!("{written} of {PAGES} pages were written, and {sent} bytes crossed");
    Ok(())
}
