//! A guest for tests: a little RAM, one device, and a will of its own. Everything it does it does
//! when it is resumed, so that tests do not depend on time.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use colo_core::{CheckpointReport, ColoExit, ColoObserver, PacketGate, Replication, Role, VmError};
use migration_stream::precopy::{Control, Progress, SourceObserver};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::{
    BoxError, DeviceSections, DeviceState, DirtyLog, GuestRamMmap, MemoryError, PAGE_SIZE, Parsed,
    SectionHeader, VmControl,
};
use vm_memory::{Bytes, VolatileMemory};

/// Name and pages of the RAM blocks.
pub const BLOCKS: [(&str, u64); 2] = [("pc.ram", 90), ("vga.vram", 7)];
/// Pages the guest writes whenever it is let run.
const WRITES: u64 = 12;

/// The one device.
const DEVICE: &str = "counter";

const ZEROES: [u8; 4096] = [0; 4096];

/// All of guest RAM.
fn bytes(ram: &GuestRamMmap) -> Vec<u8> {
    let mut all = Vec::new();
    for region in ram.regions() {
        let mut bytes = vec![0; region.size()];
        region.as_volatile_slice().copy_to(&mut bytes[..]);
        all.append(&mut bytes);
    }
    all
}

/// What is to fail, once each.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<BTreeSet<&'static str>>>);

impl Faults {
    /// The next call of `what` fails.
    pub fn inject(&self, what: &'static str) {
        self.0.lock().unwrap().insert(what);
    }

    fn check(&self, what: &'static str) -> Result<(), VmError> {
        if self.0.lock().unwrap().remove(what) {
            return Err(VmError::new(what, "an injected fault"));
        }
        Ok(())
    }
}

/// Block and page of each write since the log was last read.
#[derive(Clone, Default)]
pub struct Log {
    writes: Arc<Mutex<Vec<(u32, u64)>>>,
    faults: Faults,
}

impl DirtyLog for Log {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.writes.lock().unwrap().clear();
        self.faults
            .check("log.start")
            .map_err(|source| MemoryError::Backend {
                what: "starting the log",
                source: source.into(),
            })
    }
    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        for (block, page) in self.writes.lock().unwrap().drain(..) {
            sink(BlockId::new(block), page / 64 * 64, 1 << (page % 64));
        }
        Ok(())
    }
    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// All that a guest is made of.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub ram: Vec<u8>,
    pub device: u64,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = self.ram.iter().fold(0u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
        write!(f, "ram {sum:016x}, device {:016x}", self.device)
    }
}

/// What a side's driver did with its VM.
#[derive(Debug)]
pub enum Told {
    /// The VM was stopped, in this state.
    Stopped(State),
    /// The VM was let run, from this state.
    Resumed(State),
    /// Primary: the state that a checkpoint took.
    Captured(State),
    /// Secondary: the state that a checkpoint left.
    Installed(State),
    /// A checkpoint is complete.
    Checkpoint(CheckpointReport),
    /// COLO has ended.
    Exit(ColoExit),
}

/// The guest, and what a driver does with it.
pub struct Guest {
    pub ram: Arc<GuestRamMmap>,
    pub log: Log,
    device: u64,
    random: u64,
    pub running: bool,
    /// It is not in COLO yet.
    pub migrates: bool,
    /// What its own writes have made of it.
    own: State,
    /// It was last let run from there: nobody else has written a byte.
    pub undisturbed: bool,
    /// What it was then.
    pub resumed_as: Option<State>,
    tell: Sender<Told>,
    faults: Faults,
}

impl Guest {
    /// A stopped guest that behaves as `seed` has it.
    pub fn new(seed: u64, faults: &Faults, tell: Sender<Told>) -> Self {
        let blocks = BLOCKS
            .map(|(name, pages)| RamBlock::new(name, pages * PAGE_SIZE).unwrap())
            .to_vec();
        let ram = GuestRamMmap::anonymous(RamBlockTable::new(blocks).unwrap()).unwrap();
        Self {
            own: State {
                ram: bytes(&ram),
                device: 0,
            },
            ram: Arc::new(ram),
            undisturbed: true,
            resumed_as: None,
            log: Log {
                faults: faults.clone(),
                ..Log::default()
            },
            device: 0,
            random: seed,
            running: false,
            migrates: true,
            tell,
            faults: faults.clone(),
        }
    }

    pub fn state(&self) -> State {
        State {
            ram: bytes(&self.ram),
            device: self.device,
        }
    }

    /// What it is now is its own doing.
    pub fn settle(&mut self) {
        self.own = self.state();
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Writes somewhere: now and then zeroes, what is there already, or one of few values.
    fn write(&mut self) {
        let (block, value) = (u32::from(self.random().is_multiple_of(8)), self.random());
        let page = self.random() % BLOCKS[block as usize].1;
        let offset = usize::try_from(page * PAGE_SIZE).unwrap();
        let region = &self.ram.regions()[block as usize];
        let memory = region.as_volatile_slice();
        match value % 4 {
            0 => {
                let page = region.get_slice(offset, ZEROES.len()).unwrap();
                page.copy_from(&ZEROES);
            }
            1 => {
                let there: u64 = memory.read_obj(offset).unwrap();
                memory.write_obj(there, offset).unwrap();
            }
            2 => memory.write_obj(value / 4 % 2, offset).unwrap(),
            _ => {
                let at = offset + usize::try_from(value % 500).unwrap() * 8;
                memory.write_obj(value, at).unwrap();
            }
        }
        self.log.writes.lock().unwrap().push((block, page));
    }

    /// Writes every page.
    pub fn write_everything(&mut self) {
        for (block, (_, pages)) in (0..).zip(BLOCKS) {
            for page in 0..pages {
                let offset = usize::try_from(page * PAGE_SIZE).unwrap();
                let value = self.random() | 1;
                let region = self.ram.regions()[block as usize].as_volatile_slice();
                region.write_obj(value, offset).unwrap();
                self.log.writes.lock().unwrap().push((block, page));
            }
        }
        self.settle();
    }

    /// Computes for a while.
    pub fn run(&mut self) {
        self.running = true;
        for _ in 0..WRITES {
            self.write();
        }
        self.device = self.random();
        self.settle();
    }

    fn tell(&self, told: Told) {
        // A test that has seen enough does not listen any more.
        let _ = self.tell.send(told);
    }
}

impl VmControl for Guest {
    fn pause(&mut self) -> Result<(), BoxError> {
        if self.migrates {
            self.running = false;
            return Ok(());
        }
        self.faults.check("vm.pause")?;
        if self.running {
            assert_eq!(self.state(), self.own, "a running guest was written to");
        }
        self.running = false;
        self.tell(Told::Stopped(self.state()));
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        if self.migrates {
            self.running = true;
            return Ok(Instant::now());
        }
        self.faults.check("vm.resume")?;
        let state = self.state();
        self.undisturbed = state == self.own;
        self.resumed_as = Some(state.clone());
        self.tell(Told::Resumed(state));
        let resumed = Instant::now();
        self.run();
        Ok(resumed)
    }
}

impl DeviceState for Guest {
    type Section = u64;
    type Staged = u64;
    type Reset = u64;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        assert!(!self.running);
        if !self.migrates {
            // A device that is drained writes its last results.
            self.write();
            self.settle();
        }
        out.push(DEVICE, 0, 1, &self.device.to_be_bytes())?;
        if !self.migrates {
            self.tell(Told::Captured(self.state()));
        }
        Ok(())
    }

    fn parse(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Parsed<u64>, BoxError> {
        assert!(self.migrates || !self.running);
        if (header.idstr.as_str(), header.instance.0, header.version) != (DEVICE, 0, 1) {
            return Err("not a counter".into());
        }
        Ok(match body.first_chunk() {
            Some(value) => Parsed::Section(u64::from_be_bytes(*value), 8),
            None => Parsed::NeedMore,
        })
    }

    fn stage(&mut self, sections: Vec<u64>) -> Result<u64, BoxError> {
        match sections[..] {
            [value] => Ok(value),
            _ => Err("not one counter".into()),
        }
    }

    fn reset(&mut self, staged: u64) -> Result<u64, BoxError> {
        assert!(!self.running);
        if !self.migrates {
            self.faults.check("vm.reset")?;
            // Firmware tables are written anew.
            self.write();
        }
        self.device = 0;
        Ok(staged)
    }

    fn install(&mut self, reset: u64) -> Result<(), BoxError> {
        assert_eq!(self.device, 0, "installed without a reset");
        self.device = reset;
        if !self.migrates {
            self.tell(Told::Installed(self.state()));
        }
        Ok(())
    }
}

impl ColoObserver for Guest {
    fn colo_exit(&mut self, exit: &ColoExit) {
        self.tell(Told::Exit(*exit));
    }

    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        assert!(self.running);
        self.tell(Told::Checkpoint(report.clone()));
    }
}

impl SourceObserver for Guest {
    fn progress(&mut self, progress: &Progress) -> Control {
        // A step may last longer than progress waits: the guest may stand still by then.
        if progress.pass < 3 {
            if self.running {
                self.write();
            }
            Control::Continue
        } else {
            Control::SwitchOver
        }
    }
}

/// Disks and output that only fail.
pub struct Outside(pub Faults);

impl Replication for Outside {
    fn start(&mut self, _: Role) -> Result<(), VmError> {
        self.0.check("disk.start")
    }
    fn check(&mut self) -> Result<(), VmError> {
        self.0.check("disk.check")
    }
    fn checkpoint(&mut self) -> Result<(), VmError> {
        self.0.check("disk.checkpoint")
    }
    fn stop(&mut self, _: bool) -> Result<(), VmError> {
        Ok(())
    }
}

impl PacketGate for Outside {
    fn hold(&mut self) -> Result<(), VmError> {
        self.0.check("gate.hold")
    }
    fn cut(&mut self) -> Result<(), VmError> {
        self.0.check("gate.cut")
    }
    fn release(&mut self) -> Result<(), VmError> {
        self.0.check("gate.release")
    }
    fn discard(&mut self) -> Result<(), VmError> {
        self.0.check("gate.discard")
    }
    fn open(&mut self) {}
}
