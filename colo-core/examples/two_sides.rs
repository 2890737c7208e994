//! Two sides of COLO in one process. The guest is a thread that counts in its memory. The primary is lost,
//! and the secondary's guest counts on from the last checkpoint.
//!
//! `cargo run -p colo-core --example two_sides`

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use colo_core::driver::{
    ColoControl, DriverConfig, Hooks, PrimaryLink, SecondaryLink, run_primary, run_secondary,
};
use colo_core::{
    CheckpointReport, ColoObserver, ColoStore, FailoverHandle, NoGate, NoReplication, Outcome, Role,
};
use migration_stream::io::FdChannel;
use migration_stream::precopy::{
    Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target, TargetConfig,
};
use migration_stream::ram::{BlockId, InStream, ZeroPageDetection};
use migration_stream::{
    BoxError, ConfigurationRule, DirtyLog, GuestRamMmap, MemoryError, StreamReader, StreamWriter,
    Vm, VmControl,
};
use multifd::IncomingPages;
use ram_cache::{CacheKind, DiscardControl, FlushPool};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, VolatileMemory};

const PAGES: u64 = 64;
const LIMIT: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_millis(20);

/// Pauses and resumes the guest, and hears of checkpoints.
#[derive(Clone)]
struct Control {
    runs: Arc<Mutex<bool>>,
    checkpoints: Sender<()>,
}

fn lock(runs: &Mutex<bool>) -> MutexGuard<'_, bool> {
    runs.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VmControl for Control {
    fn pause(&mut self) -> Result<(), BoxError> {
        *lock(&self.runs) = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        *lock(&self.runs) = true;
        Ok(Instant::now())
    }
}

impl SourceObserver for Control {}

impl ColoObserver for Control {
    fn checkpoint_done(&mut self, _report: &CheckpointReport) {
        let _ = self.checkpoints.send(());
    }
}

/// A log that says of every page that it was written. A VMM has KVM's.
struct EveryPage;

impl DirtyLog for EveryPage {
    fn start(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        sink(BlockId::new(0), 0, u64::MAX);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// A paused guest: each of its pages has the count, once the guest has been around.
struct Guest {
    ram: Arc<GuestRamMmap>,
    vm: Vm<Control, ()>,
}

fn guest(checkpoints: Sender<()>) -> Result<Guest, BoxError> {
    let len = usize::try_from(PAGES * 4096)?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), len)])?;
    let ram = Arc::new(GuestRamMmap::over(&memory, &["ram"])?);
    let runs = Arc::new(Mutex::new(false));
    let (running, region) = (Arc::clone(&runs), Arc::clone(&ram.regions()[0]));
    thread::spawn(move || -> Result<(), BoxError> {
        loop {
            let guard = lock(&running);
            if *guard {
                let memory = region.as_volatile_slice();
                let count = memory.read_obj::<u64>(0)? + 1;
                for page in 0..usize::try_from(PAGES)? {
                    memory.write_obj(count, page * 4096)?;
                }
            }
            drop(guard);
            thread::sleep(Duration::from_micros(50));
        }
    });
    let control = Control { runs, checkpoints };
    let vm = Vm {
        control,
        devices: (),
    };
    Ok(Guest { ram, vm })
}

/// Returns the count of a paused guest, having checked that memory is of one moment.
fn count(ram: &GuestRamMmap) -> Result<u64, BoxError> {
    let memory = ram.regions()[0].as_volatile_slice();
    let count = memory.read_obj(0)?;
    for page in 0..usize::try_from(PAGES)? {
        assert_eq!(memory.read_obj::<u64>(page * 4096)?, count, "page {page}");
    }
    Ok(count)
}

/// Migrates the running guest, and protects it until `control` ends COLO.
fn primary(
    guest: Guest,
    socket: FdChannel,
    tell: &Sender<ColoControl>,
) -> Result<Outcome, BoxError> {
    let Guest { ram, mut vm } = guest;
    let config = SourceConfig::new(None).confirm_timeout(LIMIT);
    let limits = Arc::new(Limits::default());
    let out = StreamWriter::new(socket.share());
    let answers = Some(ReturnPathReader::new(socket.share()));
    let setup = RamSetup {
        log: EveryPage,
        transport: InStream::new(ram, ZeroPageDetection::default()),
    };
    let source = Source::start(config, limits, out, answers, setup, &mut vm)?;
    let switched = source.run(&mut vm).completed()?;
    let failover = FailoverHandle::new();
    let control = ColoControl::new(Role::Primary, failover, EVERY, move || socket.shutdown())?;
    tell.send(control.clone())?;
    let mut hooks = Hooks {
        vm,
        replication: NoReplication,
        gate: NoGate,
    };
    let link = PrimaryLink::new(switched)?;
    Ok(run_primary(
        link,
        &mut hooks,
        &control,
        DriverConfig::default(),
    )?)
}

/// Takes a guest in, and is its secondary until `failover` is asked.
fn secondary(
    guest: Guest,
    socket: FdChannel,
    failover: FailoverHandle,
) -> Result<Outcome, BoxError> {
    let Guest { ram, mut vm } = guest;
    let discard = DiscardControl::new();
    let store = ColoStore::over(CacheKind::Cow, &ram, discard.disable()?)?;
    let pages = IncomingPages::plain(store);
    let config = TargetConfig::new(ConfigurationRule::Absent).max_devices(1 << 16);
    let reader = StreamReader::new(socket.share(), b"");
    let target = Target::new(
        config,
        reader,
        Some(Box::new(socket.share())),
        pages.store(),
    );
    let settled = target
        .load(pages, &mut vm)?
        .settle_for_checkpoints(&mut vm)?;
    let pool = FlushPool::new(1)?;
    let link = SecondaryLink::new(settled.confirm()?, EveryPage, pool);
    let shut = move || socket.shutdown();
    let control = ColoControl::new(Role::Secondary, failover, Duration::ZERO, shut)?;
    let mut hooks = Hooks {
        vm,
        replication: NoReplication,
        gate: NoGate,
    };
    Ok(run_secondary(
        link,
        &mut hooks,
        &control,
        DriverConfig::default(),
    )?)
}

fn main() -> Result<(), BoxError> {
    let (here, there) = UnixStream::pair()?;
    let (here, there) = (FdChannel::new(here, LIMIT)?, FdChannel::new(there, LIMIT)?);
    let (unheard, _) = channel();
    let (tell, checkpoints) = channel();
    let (mut old, new) = (guest(unheard)?, guest(tell)?);
    let (old_ram, old_control) = (Arc::clone(&old.ram), old.vm.control.clone());
    let (new_ram, mut new_control) = (Arc::clone(&new.ram), new.vm.control.clone());
    old.vm.resume()?;

    let (tell, control) = channel();
    let primary = thread::spawn(move || primary(old, here, &tell));
    let failover = FailoverHandle::new();
    let asked = failover.clone();
    let secondary = thread::spawn(move || secondary(new, there, asked));
    for _ in 0..5 {
        checkpoints.recv_timeout(LIMIT)?;
    }

    // The primary is lost; whoever watches it asks the secondary to go on.
    control.recv_timeout(LIMIT)?.quit();
    primary.join().map_err(|_| "the primary has panicked")??;
    assert!(!*lock(&old_control.runs));
    let lost_at = count(&old_ram)?;
    failover.request()?;
    let outcome = secondary
        .join()
        .map_err(|_| "the secondary has panicked")??;
    assert_eq!(outcome, Outcome::TookOver);

    assert!(*lock(&new_control.runs));
    new_control.pause()?;
    let survived = count(&new_ram)?;
    new_control.resume()?;
    thread::sleep(Duration::from_millis(20));
    new_control.pause()?;
    let now = count(&new_ram)?;
    assert!(now > survived);
    println!("the primary was lost at {lost_at}; the secondary went on, and is at {now}");
    Ok(())
}
