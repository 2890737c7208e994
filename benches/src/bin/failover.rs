//! How long a guest is not heard when its host dies: from the SIGKILL of its primary to the first byte
//! that the survivor puts out, again and again with fresh processes.
//!
//! Pairs of `colo-vmm` go on by their heartbeat, with and without an arbiter, or by the broken
//! connection alone; guests of QEMU that `colo-vmm standby` holds go on in another QEMU, which waits
//! for them or is started for them. The kill comes at a random moment between two checkpoints or
//! within one.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use ::tests::harness::missing_kvm;
use ::tests::qemu::{self, Accel, Binary, Machine};
use ::tests::vmm::{ColoVmm, Connection, Pair, Vmm, program};
use ::tests::{PATIENCE, Result};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

/// Measures how long failover takes.
#[derive(Debug, Parser)]
struct Arguments {
    /// What goes on, and by whose decision.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Case::value_variants().to_vec())]
    case: Vec<Case>,
    /// Hosts that die in each case.
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// Between two beats of the heart, ms.
    #[arg(long, default_value_t = 50)]
    interval: u32,
    /// Beats that have to be missing.
    #[arg(long, default_value_t = 3)]
    missed: u32,
    /// Between two checkpoints, ms.
    #[arg(long, default_value_t = 100)]
    delay: u32,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 64)]
    memory: u32,
    /// Pages that the guest dirties in a pass.
    #[arg(long, default_value_t = 256)]
    dirty_pages: u32,
    /// Write all times here; what the file has of other cases stays.
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

impl Case {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
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
    let bench = Bench {
        arguments,
        accel: missing.map_or(Accel::Kvm, |_| Accel::Tcg),
    };
    println!("from SIGKILL to the survivor's first byte, ms, {runs} times each\n");
    println!("| case | mean | p50 | p99 | max |");
    println!("|---|---|---|---|---|");
    let mut measured = Vec::new();
    for &case in &arguments.case {
        let mut times = Vec::new();
        for number in 0..runs {
            let time = bench.once(case);
            times.push(time.map_err(|e| format!("{}, run {number}: {e}", case.name()))?);
        }
        let figures = Figures::of(&times);
        println!("| {} | {figures} |", case.name());
        measured.push((case, times));
    }
    match &arguments.json {
        None => Ok(()),
        Some(file) => write_json(file, arguments, &measured),
    }
}

fn write_json(
    file: &Path,
    arguments: &Arguments,
    measured: &[(Case, Vec<Duration>)],
) -> Result<()> {
    let mut all: Value = match fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(_) => json!({}),
    };
    for (case, times) in measured {
        let ms: Vec<f64> = times.iter().map(|t| millis(*t)).collect();
        all[case.name()] = json!({
            "interval_ms": arguments.interval,
            "missed": arguments.missed,
            "checkpoint_delay_ms": arguments.delay,
            "memory_mib": arguments.memory,
            "dirty_pages": arguments.dirty_pages,
            "times_ms": ms,
        });
    }
    fs::write(file, format!("{}\n", serde_json::to_string_pretty(&all)?))?;
    Ok(())
}

fn millis(time: Duration) -> f64 {
    // A hundredth of a millisecond is more than can be trusted.
    (time.as_secs_f64() * 1e5).round() / 1e2
}

/// What is told of many times, ms.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    mean: f64,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Figures {
    fn of(times: &[Duration]) -> Self {
        let mut sorted: Vec<f64> = times.iter().map(|t| millis(*t)).collect();
        sorted.sort_by(f64::total_cmp);
        // The smallest that so many of a hundred are not above.
        let quantile = |q: usize| {
            let rank = (sorted.len() * q).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
        };
        Self {
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            p50: quantile(50),
            p99: quantile(99),
            max: quantile(100),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            mean,
            p50,
            p99,
            max,
        } = self;
        write!(f, "{mean:.1} | {p50:.1} | {p99:.1} | {max:.1}")
    }
}

struct Bench<'a> {
    arguments: &'a Arguments,
    accel: Accel,
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
        let most = 3 * u64::from(self.arguments.delay) * 1000;
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
        let side = |policy: &str| {
            self.vmm().args([
                "--uuid",
                "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a11",
                "--heartbeat",
                &format!("unix:{}", path("beat")),
                "--heartbeat-interval",
                &self.arguments.interval.to_string(),
                "--heartbeat-missed",
                &self.arguments.missed.to_string(),
                "--on-heartbeat-loss",
                policy,
                "--arbiter",
                &arbiter,
            ])
        };
        let pair = Pair::with_heartbeat(&side(primary), &side(secondary), self.arguments.delay)?;
        self.kill(pair)
    }

    fn connection(&self) -> Result<Duration> {
        let vmm = self.vmm().args(["--on-peer-loss", "take-over"]);
        let pair = Pair::in_colo(&vmm, Connection::default(), self.arguments.delay)?;
        self.kill(pair)
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
        let binary = qemu::binaries()?
            .iter()
            .find(|b| b.is_since((11, 0)))
            .ok_or("needs QEMU 11 or newer in COLO_QEMU or on PATH")?;
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
            let mut waiting = next.incoming().start(binary)?;
            let into = waiting.listen(&format!("unix:{}", path("restore")))?;
            (Some(waiting), ["--restore-into".to_owned(), into])
        };
        let incoming = format!("unix:{}", path("incoming"));
        let [option, value] = restore;
        let mut standby = Vmm::standby([
            "--incoming",
            &incoming,
            "--on-peer-loss",
            "take-over",
            &option,
            &value,
        ])?;
        let mut primary = with_serial("primary").start(binary)?;
        wait_for_output(binary, &dir.path().join("primary"))?;
        primary.qmp.enable(&["return-path", "x-colo"])?;
        primary.qmp.set_parameters(json!({
            "x-checkpoint-delay": self.arguments.delay,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        }))?;
        primary.migrate(&incoming)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_times() {
        let times: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        let expected = Figures {
            mean: 100.5,
            p50: 100.0,
            p99: 198.0,
            max: 200.0,
        };
        assert_eq!(Figures::of(&times), expected);
        let one = Figures::of(&[Duration::from_millis(7)]);
        assert!((one.p99 - 7.0).abs() < 1e-9);
    }
}
