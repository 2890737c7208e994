//! Moves a guest that writes from one machine to another, over a socket pair. The guest is a thread that
//! counts in its memory.
//!
//! `cargo run -p migration-stream --example live_migration`

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migration_stream::io::FdChannel;
use migration_stream::precopy::{
    Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target, TargetConfig,
};
use migration_stream::ram::{InStream, NoMultifd, ZeroPageDetection};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, GuestRamMmap, MachineName, StreamReader,
    StreamWriter, Vm, VmControl,
};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileMemory};

const PAGES: u64 = 512;

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

/// Makes a paused guest. Its count is in its first page, and each count in a page of the others.
fn guest() -> Result<(Arc<Ram>, Control), BoxError> {
    let len = usize::try_from(PAGES * 4096)?;
    let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[(GuestAddress(0), len)])?;
    let ram = Arc::new(GuestRamMmap::over(&memory, &["ram"])?);
    let control = Control::default();
    let (runs, region) = (control.clone(), Arc::clone(&ram.regions()[0]));
    thread::spawn(move || -> Result<(), BoxError> {
        loop {
            let running = runs.runs();
            if *running {
                let memory = region.as_volatile_slice();
                let count = memory.read_obj::<u64>(0)? + 1;
                memory.write_obj(count, page_of(count)?)?;
                memory.write_obj(count, 0)?;
            }
            drop(running);
            thread::sleep(Duration::from_micros(20));
        }
    });
    Ok((ram, control))
}

/// Returns where a count is kept, besides the first page.
fn page_of(count: u64) -> Result<usize, BoxError> {
    Ok(usize::try_from((1 + count % (PAGES - 1)) * 4096)?)
}

/// Returns the count, having checked that memory is of one moment.
fn count(ram: &Ram) -> Result<u64, BoxError> {
    let memory = ram.regions()[0].as_volatile_slice();
    let count: u64 = memory.read_obj(0)?;
    for earlier in count.saturating_sub(PAGES - 2)..=count {
        assert_eq!(memory.read_obj::<u64>(page_of(earlier)?)?, earlier);
    }
    Ok(count)
}

fn machine() -> Result<Configuration, BoxError> {
    Ok(Configuration::new(MachineName::new("example-1")?))
}

/// Sends the running guest. It is paused here when this returns.
fn send(ram: &Arc<Ram>, control: Control, socket: FdChannel) -> Result<(), BoxError> {
    let mut vm = Vm {
        control,
        devices: (),
    };
    let config = SourceConfig::new(machine()?).confirm_timeout(Duration::from_secs(10));
    let out = StreamWriter::new(socket.share());
    let answers = ReturnPathReader::new(socket);
    let transport = InStream::new(Arc::clone(ram) as _, ZeroPageDetection::default());
    let log = ram.own_writes();
    let setup = RamSetup { log, transport };
    let limits = Arc::new(Limits::default());
    let source = Source::start(config, limits, out, Some(answers), setup, &mut vm)?;
    source.run(&mut vm).completed()?;
    Ok(())
}

/// Receives a guest. It is paused when this returns.
fn receive(ram: &Arc<Ram>, control: Control, socket: FdChannel) -> Result<(), BoxError> {
    let mut vm = Vm {
        control,
        devices: (),
    };
    let config = TargetConfig::new(ConfigurationRule::Matching(machine()?)).max_devices(1 << 20);
    let reader = StreamReader::new(socket.share(), b"");
    let target = Target::new(config, reader, Some(Box::new(socket)), &**ram);
    let arrived = target.load((Arc::clone(ram), NoMultifd), &mut vm)?;
    arrived.settle(&mut vm)?.confirm()?;
    Ok(())
}

fn main() -> Result<(), BoxError> {
    let (here, there) = UnixStream::pair()?;
    let limit = Duration::from_secs(10);
    let (here, there) = (FdChannel::new(here, limit)?, FdChannel::new(there, limit)?);
    let (old_ram, mut old) = guest()?;
    let (new_ram, mut new) = guest()?;
    old.resume()?;
    thread::sleep(Duration::from_millis(100));

    let sent = (Arc::clone(&old_ram), old.clone());
    let source = thread::spawn(move || send(&sent.0, sent.1, here));
    receive(&new_ram, new.clone(), there)?;
    source.join().map_err(|_| "the source has panicked")??;

    let moved = count(&new_ram)?;
    assert_eq!(
        moved,
        count(&old_ram)?,
        "the guest left here at its last count"
    );
    new.resume()?;
    thread::sleep(Duration::from_millis(20));
    new.pause()?;
    let now = count(&new_ram)?;
    assert!(now > moved, "the guest counts on");
    println!("the guest left at {moved}, and is at {now}");
    Ok(())
}
