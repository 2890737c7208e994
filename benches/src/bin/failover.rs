//! How long a guest is not heard when its host dies: from the SIGKILL of its primary to the first byte
//! that the survivor puts out, again and again with fresh processes.
//!
//! Pairs of `colo-vmm` go on by their heartbeat, with and without an arbiter, or by the broken
//! connection alone; guests of QEMU that `colo-vmm standby` holds go on in another QEMU, which waits
//! for them or is started for them. The kill comes at a random moment between two checkpoints or
//! within one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use ::tests::harness::missing_kvm;
use ::tests::hosts::HEARTBEAT;
use ::tests::qemu::{self, Accel, Binary, Machine};
use ::tests::vmm::{ColoVmm, Connection, Pair, Side, Vmm, program};
use ::tests::{PATIENCE, Result};
use benches::link::{Cable, LinkArgs, Transport};
use benches::render;
use benches::report::{Failover, Report};
use benches::way::name;
use clap::{Parser, ValueEnum};
use serde_json::json;

/// Measures how long failover takes.
#[derive(Debug, Parser)]
struct Arguments {
    /// What goes on, and by whose decision.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Case::value_variants().to_vec())]
    case: Vec<Case>,
    /// Hosts that die in each case.
    #[arg(long, default_value_t = 100)]
    runs: usize,
    #[command(flatten)]
    link: LinkArgs,
    /// Milliseconds from one beat of the heart to the next.
    #[arg(long, default_value_t = 50)]
    beat: u32,
    /// Beats that have to be missing.
    #[arg(long, default_value_t = 3)]
    missed: u32,
    /// Milliseconds from one checkpoint to the next.
    #[arg(long, default_value_t = 100)]
    every: u32,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 64)]
    memory: u32,
    /// Pages that the guest dirties in a pass.
    #[arg(long, default_value_t = 256)]
    dirty_pages: u32,
    /// Write the figures here.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Each case twice, as a check that it runs; without KVM the pairs are simulated.
    #[arg(long)]
    smoke: bool,
}

/// What goes on, and by whose decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// A pair of colo-vmm; the secondary takes over when it hears no heart.
    Heartbeat,
    /// The same; it asks the arbiter, a lock file, before.
    LockFile,
    /// A pair without a heartbeat; the secondary takes over when the connection breaks.
    Connection,
    /// A guest of QEMU that a standby holds; a QEMU waits for it.
    QemuWaits,
    /// The same; a QEMU is started for it.
    QemuStarted,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("failover: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let runs = if arguments.smoke { 2 } else { arguments.runs };
    let missing = missing_kvm();
    if let Some(reason) = missing.as_ref().filter(|_| !arguments.smoke) {
        return Err(format!("guests run in KVM here: {reason}").into());
    }
    let binaries = qemu::binaries()?;
    let qemu = binaries.iter().find(|b| b.is_since((11, 0)));
    let mut report = Report::new(qemu);
    for cable in arguments.link.lay(arguments.smoke)? {
        let link = cable.link();
        let bench = Bench {
            arguments,
            accel: missing.as_ref().map_or(Accel::Kvm, |_| Accel::Tcg),
            qemu,
            cable,
        };
        for &case in &arguments.case {
            let case_name = name(case);
            eprintln!("{link} {case_name}");
            let mut times_ms = Vec::new();
            for number in 0..runs {
                let time = bench.once(case);
                let time = time.map_err(|e| format!("{case_name}, run {number}: {e}"))?;
                times_ms.push(millis(time));
            }
            report.failovers.push(Failover {
                case: case_name,
                link,
                beat_ms: arguments.beat,
                missed: arguments.missed,
                interval_ms: arguments.every,
                times_ms,
            });
        }
        if let Some(file) = &arguments.json {
            report.write(file)?;
        }
    }
    print!("{}", render::tables(&report));
    Ok(())
}

fn millis(time: Duration) -> f64 {
    // A hundredth of a millisecond is more than can be trusted.
    (time.as_secs_f64() * 1e5).round() / 1e2
}

struct Bench<'a> {
    arguments: &'a Arguments,
    accel: Accel,
    qemu: Option<&'static Binary>,
    cable: Cable,
}

impl Bench<'_> {
    /// One death.
    fn once(&self, case: Case) -> Result<Duration> {
        match case {
            Case::Heartbeat => self.pair("stop", "take-over", "none"),
            Case::LockFile => self.pair("ask", "ask", "file"),
            Case::Connection => self.connection(),
            Case::QemuWaits => self.qemu(false),
            Case::QemuStarted => self.qemu(true),
        }
    }

    /// Some moment of the next three checkpoints.
    fn wait(&self) {
        let most = 3 * u64::from(self.arguments.every) * 1000;
        thread::sleep(Duration::from_micros(fastrand::u64(0..=most)));
    }

    fn vmm(&self) -> ColoVmm {
        let vmm = ColoVmm::new("colo-vmm")
            .memory(self.arguments.memory)
            .dirty_pages(self.arguments.dirty_pages)
            .interactive();
        match self.accel {
            Accel::Kvm => vmm,
            Accel::Tcg => vmm.simulated(),
        }
    }

    fn pair(&self, primary: &str, secondary: &str, arbiter: &str) -> Result<Duration> {
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let arbiter = match arbiter {
            "file" => format!("file:{}", path("right")),
            other => other.to_owned(),
        };
        let beat = match self.cable.link().transport {
            Transport::Unix => format!("unix:{}", path("beat")),
            Transport::Veth => format!("tcp:{}:{HEARTBEAT}", self.cable.address()),
        };
        let side = |policy: &str| {
            self.vmm()
                .heartbeat(&beat, self.arguments.beat, policy)
                .args(["--heartbeat-missed", &self.arguments.missed.to_string()])
                .args(["--arbiter", &arbiter])
        };
        self.kill(self.in_colo(&side(primary), &side(secondary), true)?)
    }

    fn connection(&self) -> Result<Duration> {
        let vmm = self.vmm().args(["--on-peer-loss", "take-over"]);
        self.kill(self.in_colo(&vmm, &vmm, false)?)
    }

    /// A pair that has taken its first checkpoints.
    fn in_colo(&self, primary: &ColoVmm, secondary: &ColoVmm, has_heartbeat: bool) -> Result<Pair> {
        let start = |side, vmm: ColoVmm| vmm.start_as(|command| self.cable.on(side, command));
        let mut pair = Pair {
            secondary: start(Side::Secondary, secondary.clone().incoming())?,
            primary: start(Side::Primary, primary.clone())?,
        };
        pair.set_up(Connection::PLAIN, self.arguments.every)?;
        pair.primary.wait_lines(1)?;
        if has_heartbeat {
            pair.wait_heard()?;
        }
        let uri = self.cable.uri(pair.secondary.dir(), "migration");
        let uri = pair.secondary.listen_on(&uri)?;
        pair.primary.migrate(&uri)?;
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.wait_migration("colo")?;
            side.wait_checkpoints(3)?;
        }
        Ok(pair)
    }

    fn kill(&self, mut pair: Pair) -> Result<Duration> {
        self.wait();
        let heard = pair.secondary.process.stdout().clone();
        if !heard.bytes().is_empty() {
            return Err(pair.secondary.process.failure("is heard in COLO"));
        }
        let killed = Instant::now();
        pair.primary.process.kill()?;
        heard.wait_for("byte of the survivor", |b| (!b.is_empty()).then_some(()))?;
        Ok(killed.elapsed())
    }

    /// A guest of QEMU. Its serial line goes to a file, which is looked at every millisecond.
    fn qemu(&self, start: bool) -> Result<Duration> {
        let binary = (self.qemu).ok_or("needs QEMU 11 or newer in COLO_QEMU or on PATH")?;
        let on = |side| move |command| self.cable.on(side, command);
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let machine = Machine::new("pc", self.arguments.memory)
            .accel(self.accel)
            .boot(&self.disk(dir.path())?)
            .running();
        let with_serial = |name: &str| {
            let serial = format!("file:{}", path(name));
            machine.clone().args(["-serial", &serial])
        };
        let next = with_serial("next").args(["-pidfile", &path("pid")]);
        // Killed when this function is left, either way.
        let _stray = Stray(dir.path().join("pid"));
        let (_waiting, restore) = if start {
            (
                None,
                ["--restore-command".to_owned(), next.restore_line(binary)?],
            )
        } else {
            let mut waiting = next.incoming().start_as(binary, on(Side::Secondary))?;
            let into = waiting.listen(&format!("unix:{}", path("restore")))?;
            (Some(waiting), ["--restore-into".to_owned(), into])
        };
        let incoming = self.cable.uri(dir.path(), "incoming");
        let [option, value] = restore;
        let arguments = [
            "--incoming",
            &incoming,
            "--on-peer-loss",
            "take-over",
            &option,
            &value,
        ];
        let mut standby = Vmm::standby_as(arguments, on(Side::Secondary))?;
        let uri = standby.listens_at()?;
        let mut primary = with_serial("primary").start_as(binary, on(Side::Primary))?;
        wait_for_output(binary, &dir.path().join("primary"))?;
        primary.qmp.enable(&["return-path", "x-colo"])?;
        primary.qmp.set_parameters(json!({
            "x-checkpoint-delay": self.arguments.every,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        }))?;
        primary.migrate(&uri)?;
        primary.wait_migration("colo")?;
        standby.wait_checkpoints(3)?;
        self.wait();
        let killed = Instant::now();
        primary.process.kill()?;
        wait_for_output(binary, &dir.path().join("next"))?;
        Ok(killed.elapsed())
    }

    /// `colo-vmm`'s own guest, which boots in QEMU as well.
    fn disk(&self, dir: &Path) -> Result<PathBuf> {
        let file = dir.join("disk");
        let status = Command::new(program()?)
            .args(["guest", "--memory", &self.arguments.memory.to_string()])
            .args(["--dirty-pages", &self.arguments.dirty_pages.to_string()])
            .arg("--out")
            .arg(&file)
            .status()?;
        if !status.success() {
            return Err("colo-vmm guest failed".into());
        }
        File::options().write(true).open(&file)?.set_len(1 << 20)?;
        Ok(file)
    }
}

fn wait_for_output(qemu: &Binary, file: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(file).map_or(0, |m| m.len()) == 0 {
        if Instant::now() >= deadline {
            return Err(format!("the guest of {qemu} is not heard").into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A QEMU that outlives the standby that has started it. The file has its process id.
struct Stray(PathBuf);

impl Drop for Stray {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(&self.0) {
            // It may have ended, which nobody wants to read.
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).output();
        }
    }
}
