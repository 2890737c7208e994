//! A pair of QEMU. What its steps take is in its trace.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ::tests::Result;
use ::tests::guest::write_disk;
use ::tests::process::Process;
use ::tests::qemu::{Accel, Binary, Machine, Qemu};
use colo_vmm::guest::workload;
use tempfile::TempDir;

use crate::case::Case;
use crate::sample::{Checkpoint, Pair};
use crate::serial::Line;
use crate::trace;

/// Two QEMU in COLO.
#[derive(Debug)]
pub struct QemuPair {
    primary: Qemu,
    secondary: Qemu,
    traces: [PathBuf; 2],
    _dir: TempDir,
}

impl QemuPair {
    /// Starts both, and waits until they are in COLO.
    pub fn in_colo(
        case: &Case,
        machine: &str,
        binary: &Binary,
        accel: Accel,
    ) -> Result<(Self, Line)> {
        let dir = tempfile::Builder::new().prefix("vs-qemu-").tempdir()?;
        let line = Line::listen(&dir.path().join("line"))?;
        let disk = dir.path().join("disk");
        write_disk(&disk, &workload(&case.workload())?)?;
        let traces = ["primary", "secondary"].map(|side| dir.path().join(side));
        let side = |serial: OsString, trace: &PathBuf| {
            Machine::new(machine, case.memory_mib)
                .accel(accel)
                .boot(&disk)
                .args([OsString::from("-serial"), serial])
                .args(["-msg", "timestamp=on", "-d", trace::EVENTS, "-D"])
                .args([trace])
        };
        let mut to_line = OsString::from("file:");
        to_line.push(line.path());
        let [trace, secondary_trace] = &traces;
        let mut secondary = side("null".into(), secondary_trace)
            .incoming()
            .start(binary)?;
        let mut primary = side(to_line, trace).running().start(binary)?;
        line.wait(Duration::ZERO)?;
        for side in [&mut secondary, &mut primary] {
            case.configure(&mut side.qmp)?;
        }
        let uri = secondary.listen(&case.transport.uri(secondary.dir()))?;
        primary.migrate(&uri)?;
        primary.wait_migration("colo")?;
        let pair = Self {
            primary,
            secondary,
            traces,
            _dir: dir,
        };
        Ok((pair, line))
    }

    fn trace(&self, side: usize) -> Result<Vec<trace::Entry>> {
        trace::parse(&fs::read_to_string(&self.traces[side])?)
    }
}

impl Pair for QemuPair {
    fn processes(&self) -> [&Process; 2] {
        [&self.primary.process, &self.secondary.process]
    }

    fn is_vcpu(thread: &str) -> bool {
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
