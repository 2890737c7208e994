//! A pair of QEMU, or one of QEMU and `colo-vmm standby`. What QEMU's steps take is in its trace.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::tests::Result;
use ::tests::guest::write_disk;
use ::tests::process::Process;
use ::tests::qemu::{Accel, Binary, Machine, Qemu};
use ::tests::vmm::{Side, Vmm};
use benches::case::Case;
use benches::link::Cable;
use colo_vmm::guest::workload;
use tempfile::TempDir;

use crate::sample::{Checkpoint, Pair};
use crate::serial::Line;
use crate::trace;

/// A primary of QEMU's in COLO.
#[derive(Debug)]
pub struct QemuPair {
    primary: Qemu,
    secondary: Secondary,
    /// Where the secondary listens.
    uri: String,
    /// Of the primary, and of the secondary if that is a QEMU.
    traces: [PathBuf; 2],
    _dir: TempDir,
}

/// Who holds its checkpoints.
#[derive(Debug)]
enum Secondary {
    Qemu(Qemu),
    Standby(Vmm),
}

impl Secondary {
    const fn process(&self) -> &Process {
        match self {
            Self::Qemu(qemu) => &qemu.process,
            Self::Standby(standby) => &standby.process,
        }
    }

    fn standby(case: &Case, cable: &Cable, dir: &Path) -> Result<(Self, String)> {
        // It is restored nowhere.
        let nowhere = format!("file:{}", dir.join("restored").display());
        let mut arguments = vec!["--incoming".to_owned(), cable.uri(dir, "migration")];
        arguments.extend(["--restore-into".to_owned(), nowhere]);
        if case.way.channels() > 0 {
            let channels = case.way.channels().to_string();
            arguments.extend(["--multifd".to_owned(), channels]);
            let compression = case.way.compression().to_owned();
            arguments.extend(["--multifd-compression".to_owned(), compression]);
        }
        let mut standby = Vmm::standby_as(arguments, |command| cable.on(Side::Secondary, command))?;
        let uri = standby.listens_at()?;
        Ok((Self::Standby(standby), uri))
    }
}

/// What a pair with a primary of QEMU's is made of.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The program.
    pub binary: &'a Binary,
    /// Its machine type.
    pub machine: &'a str,
    /// How guest code runs.
    pub accel: Accel,
    /// Whether a standby of ours holds the checkpoints, in place of a QEMU.
    pub is_standby: bool,
}

impl QemuPair {
    /// Starts both, and waits until the primary's guest is heard.
    pub fn start(case: &Case, cable: &Cable, parts: &Parts<'_>) -> Result<(Self, Line)> {
        let dir = tempfile::Builder::new().prefix("vs-qemu-").tempdir()?;
        let line = Line::listen(&dir.path().join("line"))?;
        let disk = dir.path().join("disk");
        write_disk(&disk, &workload(&case.workload())?)?;
        let traces = ["primary", "secondary"].map(|side| dir.path().join(side));
        let side = |serial: OsString, trace: &PathBuf| {
            Machine::new(parts.machine, case.memory_mib)
                .accel(parts.accel)
                .boot(&disk)
                .args([OsString::from("-serial"), serial])
                .args(["-msg", "timestamp=on", "-d", trace::EVENTS, "-D"])
                .args([trace])
        };
        let mut to_line = OsString::from("file:");
        to_line.push(line.path());
        let [trace, secondary_trace] = &traces;
        let (secondary, uri) = if parts.is_standby {
            Secondary::standby(case, cable, dir.path())?
        } else {
            let mut secondary = side("null".into(), secondary_trace)
                .incoming()
                .start_as(parts.binary, |command| cable.on(Side::Secondary, command))?;
            case.configure(&mut secondary.qmp)?;
            let uri = secondary.listen(&cable.uri(secondary.dir(), "migration"))?;
            (Secondary::Qemu(secondary), uri)
        };
        let mut primary = side(to_line, trace)
            .running()
            .start_as(parts.binary, |command| cable.on(Side::Primary, command))?;
        line.wait(Duration::ZERO)?;
        case.configure(&mut primary.qmp)?;
        let pair = Self {
            primary,
            secondary,
            uri,
            traces,
            _dir: dir,
        };
        Ok((pair, line))
    }

    /// Nothing of a standby.
    fn trace(&self, side: usize) -> Result<Vec<trace::Entry>> {
        if side == 1 && matches!(self.secondary, Secondary::Standby(_)) {
            return Ok(Vec::new());
        }
        trace::parse(&fs::read_to_string(&self.traces[side])?)
    }
}

impl Pair for QemuPair {
    fn processes(&self) -> [&Process; 2] {
        [&self.primary.process, self.secondary.process()]
    }

    fn enter(&mut self) -> Result<()> {
        self.primary.migrate(&self.uri)?;
        self.primary.wait_migration("colo").map(drop)
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.starts_with("CPU ")
    }

    fn wait_checkpoint(&mut self) -> Result<()> {
        let resumed = self.primary.qmp.wait_event("RESUME");
        resumed.map(drop).map_err(|e| {
            let what = format!("takes no checkpoint: {e}");
            self.primary.process.failure(&what)
        })
    }

    fn checkpoints(&mut self) -> Result<Vec<Checkpoint>> {
        Ok(trace::checkpoints(&self.trace(0)?, &self.trace(1)?))
    }

    fn bytes(&mut self, from: Duration) -> Result<Option<f64>> {
        Ok(trace::bytes(&self.trace(0)?, from))
    }
}
