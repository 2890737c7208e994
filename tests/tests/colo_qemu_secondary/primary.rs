//! A COLO primary made of our libraries, whose guest is one that a QEMU has left in a file.
//!
//! Nobody runs it: its device state is what the file says, and what its processor would write the test
//! writes. That is what a VMM with QEMU's own devices would be to the driver.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use colo_core::driver::{
    BackgroundTransfer, ColoControl, DriverConfig, Hooks, PrimaryLink, run_primary,
};
use colo_core::{
    CheckpointReport, ColoExit, ColoObserver, Deadlines, FailoverHandle, NoGate, NoReplication,
    Outcome, Resume, Role,
};
use migration_net::outgoing;
use migration_stream::io::FdChannel;
use migration_stream::precopy::{
    Control, Limits, Progress, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver,
};
use migration_stream::ram::{BlockId, InStream, ZeroPageDetection};
use migration_stream::{
    BoxError, DeviceSections, DeviceState, GuestRam, MemoryError, PAGE_SIZE, PageTransport, Parsed,
    SectionHeader, StagedRam, StreamWriter, VmControl, WhenToCompare,
};
use multifd::{ChannelCount, MultifdConfig, SendSet};
use stream_relay::guest::{Devices, Guest};
use tests::contents::{self, Contents};
use tests::written::Written;
use tests::{PATIENCE, Result};

/// Checkpoints come only when they are asked for.
const NEVER: Duration = Duration::from_secs(3600);
/// How often it is looked whether all that was written has been read.
const POLL: Duration = Duration::from_millis(1);
/// Pages that change in a batch of writes.
const BATCH: u64 = 96;

/// What is tried of a primary's options.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    /// Multifd's channels; 0 for none.
    pub channels: u8,
    /// Pages are sent between checkpoints.
    pub ahead: bool,
    /// Pages that did not change are left out.
    pub skip: bool,
    /// When the guest resumes in a checkpoint.
    pub resume: Resume,
}

impl Way {
    fn multifd(self) -> Option<MultifdConfig> {
        Some(MultifdConfig::new(ChannelCount::new(self.channels)?).stall_limit(PATIENCE))
    }

    fn driver(self) -> DriverConfig {
        let transfer = BackgroundTransfer::default().interval(Duration::from_millis(2));
        DriverConfig::default()
            .deadlines(Deadlines::all(PATIENCE))
            .background(self.ahead.then_some(transfer))
            .elide_unchanged(self.skip.then_some(WhenToCompare::Always))
    }
}

/// Which pages of the guest's main memory are written.
#[derive(Clone, Debug)]
pub struct Pages {
    /// Those that change.
    pub change: Range<u64>,
    /// Those that are written with what is there already.
    pub stay: Range<u64>,
}

/// A primary in COLO.
pub struct Primary {
    control: ColoControl,
    processor: Arc<Mutex<Processor>>,
    devices: Arc<Mutex<Devices>>,
    told: Receiver<Told>,
    driver: JoinHandle<Result<Outcome>>,
}

/// What the driver tells of.
enum Told {
    /// A checkpoint is complete, in which memory was like this.
    Checkpoint(CheckpointReport, Contents),
    /// COLO has ended.
    Exit(ColoExit),
}

impl Primary {
    /// Migrates `guest` to the secondary that listens at `to`, and enters COLO with it.
    pub fn start(guest: &Guest, pages: Pages, to: &str, way: Way) -> Result<Self> {
        let multifd = way.multifd();
        let connected =
            outgoing::connect(&to.parse()?, multifd.as_ref(), PATIENCE, PATIENCE, None)?;
        let main = connected.main;
        let connections: Vec<_> = std::iter::once(&main)
            .chain(&connected.channels)
            .map(FdChannel::share)
            .collect();
        let memory: Arc<dyn GuestRam> = Arc::clone(&guest.memory) as _;
        let staged = Arc::new(StagedRam::new(Arc::clone(&memory))?);
        let ram: Arc<dyn GuestRam> = Arc::clone(&staged) as _;
        let transport: Box<dyn PageTransport> = match multifd {
            None => Box::new(InStream::new(
                Arc::clone(&ram),
                ZeroPageDetection::default(),
            )),
            Some(config) => {
                let channels = connected.channels.into_iter().map(Into::into).collect();
                Box::new(SendSet::start(Arc::clone(&ram), channels, &config)?)
            }
        };
        let log = Written::default();
        let (tell, told) = mpsc::channel();
        let processor = Arc::new(Mutex::new(Processor::new(memory, log.clone(), pages)?));
        let devices = Arc::new(Mutex::new(guest.devices.clone()));
        let mut vm = Replayed {
            processor: Arc::clone(&processor),
            devices: Arc::clone(&devices),
            captured: Contents::new(),
            tell,
        };
        let switched = Source::start(
            SourceConfig::new(guest.configuration.clone()).confirm_timeout(PATIENCE),
            Arc::new(Limits::new(0, Duration::from_millis(300))),
            StreamWriter::new(main.share()),
            Some(ReturnPathReader::new(main)),
            RamSetup { log, transport },
            &mut vm,
        )?
        .run(&mut vm)
        .completed()?;
        let mut link = PrimaryLink::new(switched)?;
        match way.resume {
            Resume::OnLoaded => {}
            Resume::OnReceived => link = link.resume_on_received(),
            Resume::OnLocalCopy => link = link.resume_on_local_copy(staged)?,
        }
        let control = ColoControl::new(Role::Primary, FailoverHandle::new(), NEVER, move || {
            connections.iter().for_each(FdChannel::shutdown);
        })?;
        let in_driver = control.clone();
        let driver = thread::spawn(move || {
            let mut parts = Hooks {
                vm,
                replication: NoReplication,
                gate: NoGate,
            };
            Ok(run_primary(link, &mut parts, &in_driver, way.driver())?)
        });
        Ok(Self {
            control,
            processor,
            devices,
            told,
            driver,
        })
    }

    /// Takes a checkpoint, and returns what it cost and what memory was in it.
    pub fn checkpoint(&self) -> Result<(CheckpointReport, Contents)> {
        self.control.demand_checkpoint();
        match self.told.recv_timeout(PATIENCE)? {
            Told::Checkpoint(report, contents) => Ok((report, contents)),
            Told::Exit(exit) => Err(exit.to_string().into()),
        }
    }

    /// From the next checkpoint on the guest's devices are those of another one, whose machine is the same.
    pub fn become_another(&self, guest: &Guest) {
        lock(&self.devices).clone_from(&guest.devices);
    }

    /// The guest writes, if it runs.
    pub fn write(&self) -> Result<()> {
        let mut processor = lock(&self.processor);
        if processor.runs {
            processor.write()?;
        }
        Ok(())
    }

    /// Waits until the driver has asked for all that was written, which it does to send it ahead.
    pub fn wait_read(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !lock(&self.processor).log.is_read() {
            if Instant::now() >= deadline {
                return Err("nothing is sent between checkpoints".into());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// What memory is now.
    pub fn contents(&self) -> Result<Contents> {
        contents::of(&*lock(&self.processor).ram)
    }

    /// Ends it as its process would end: connections are closed, and nothing is said.
    pub fn die(self) -> Result<()> {
        self.control.quit();
        let outcome = self.driver.join().map_err(|_| "the driver panicked")??;
        assert_eq!(outcome, Outcome::Quit);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What writes the guest's memory.
struct Processor {
    ram: Arc<dyn GuestRam>,
    /// The block that is written, which is the largest.
    block: BlockId,
    log: Written,
    pages: Pages,
    random: fastrand::Rng,
    runs: bool,
}

impl Processor {
    fn new(ram: Arc<dyn GuestRam>, log: Written, pages: Pages) -> Result<Self> {
        let blocks = ram.blocks().iter();
        let largest = blocks.max_by_key(|(_, block)| block.used_length());
        let (block, _) = largest.ok_or("a guest without memory")?;
        Ok(Self {
            ram,
            block,
            log,
            pages,
            random: fastrand::Rng::with_seed(0x5eed),
            runs: true,
        })
    }

    /// A batch of pages is written anew, some of them more than once, a part of them with zeroes; and all
    /// that stay, with what they have.
    fn write(&mut self) -> std::result::Result<(), MemoryError> {
        for _ in 0..BATCH {
            let page = self.random.u64(self.pages.change.clone());
            let slice = self.ram.slice(self.block, page * PAGE_SIZE, 4096)?;
            match self.random.u8(0..4) {
                0 => slice.copy_from(&[0_u8; 4096]),
                1 => slice.copy_from(&[self.random.u8(1..); 1]),
                _ => {
                    let mut bytes = [0_u8; 4096];
                    self.random.fill(&mut bytes);
                    slice.copy_from(&bytes);
                }
            }
            self.log.note(self.block, page);
        }
        for page in self.pages.stay.clone() {
            self.log.note(self.block, page);
        }
        Ok(())
    }

    fn stop(&mut self) -> std::result::Result<(), MemoryError> {
        if std::mem::take(&mut self.runs) {
            // What it wrote last.
            self.write()?;
        }
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<(), MemoryError> {
        // What is sent of a checkpoint from here on is not what memory holds.
        self.runs = true;
        self.write()
    }
}

/// The VM in the driver's hands.
struct Replayed {
    processor: Arc<Mutex<Processor>>,
    devices: Arc<Mutex<Devices>>,
    captured: Contents,
    tell: Sender<Told>,
}

impl VmControl for Replayed {
    fn pause(&mut self) -> std::result::Result<(), BoxError> {
        Ok(lock(&self.processor).stop()?)
    }

    fn resume(&mut self) -> std::result::Result<Instant, BoxError> {
        lock(&self.processor).resume()?;
        Ok(Instant::now())
    }
}

/// A primary is sent no devices.
impl DeviceState for Replayed {
    type Section = Infallible;
    type Staged = Infallible;
    type Reset = Infallible;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> std::result::Result<(), BoxError> {
        if !out.wants_description() {
            self.captured = contents::of(&*lock(&self.processor).ram)?;
        }
        lock(&self.devices).save(out)
    }

    fn parse(
        &mut self,
        header: &SectionHeader,
        body: &[u8],
    ) -> std::result::Result<Parsed<Infallible>, BoxError> {
        lock(&self.devices).parse(header, body)
    }

    fn stage(&mut self, _: Vec<Infallible>) -> std::result::Result<Infallible, BoxError> {
        Err("a primary is sent no devices".into())
    }

    fn reset(&mut self, staged: Infallible) -> std::result::Result<Infallible, BoxError> {
        match staged {}
    }

    fn install(&mut self, reset: Infallible) -> std::result::Result<(), BoxError> {
        match reset {}
    }
}

impl SourceObserver for Replayed {
    fn progress(&mut self, progress: &Progress) -> Control {
        // Pages come more than once in precopy.
        if progress.pass < 4 && lock(&self.processor).write().is_err() {
            return Control::Cancel;
        }
        Control::Continue
    }
}

impl ColoObserver for Replayed {
    fn colo_exit(&mut self, exit: &ColoExit) {
        // A test that has ended does not listen.
        let _ = self.tell.send(Told::Exit(*exit));
    }

    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        let captured = std::mem::take(&mut self.captured);
        let _ = self.tell.send(Told::Checkpoint(report.clone(), captured));
    }
}
