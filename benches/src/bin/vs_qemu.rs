//! How long a checkpoint stops the primary: a COLO pair of QEMU and one of `colo-vmm` in turns on this
//! machine, with the same boot sector in both, which dirties a known number of pages, over each
//! transport, plain and with multifd.
//!
//! QEMU's pause is what its own trace says: from the primary's VM stopping to it running again. Ours
//! is what the primary reports for the same two moments.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use ::tests::harness::missing_kvm;
use ::tests::process::workspace_program;
use ::tests::qemu::{self, Accel, Binary, Machine, Qemu};
use ::tests::{PATIENCE, Result};
use clap::{Parser, ValueEnum};
use serde_json::json;

/// Measures the checkpoint pause of QEMU's COLO.
#[derive(Debug, Parser)]
struct Arguments {
    /// Pages the guest dirties between checkpoints.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 2560, 25_600])]
    dirty_pages: Vec<u32>,
    /// How the two sides are connected.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Transport::Unix, Transport::Tcp])]
    transport: Vec<Transport>,
    /// Numbers of multifd channels; 0 is the main stream alone.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 2])]
    multifd: Vec<u8>,
    /// QEMU's machine types.
    #[arg(long, value_delimiter = ',', default_values_t = ["pc".to_owned(), "microvm".to_owned()])]
    machine: Vec<String>,
    /// Checkpoints to measure in each case, after the first, which is slow.
    #[arg(long, default_value_t = 30)]
    checkpoints: usize,
    /// Milliseconds from one checkpoint to the next.
    #[arg(long, default_value_t = 200)]
    delay: u32,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
}

/// How the two sides are connected.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Transport {
    /// A unix socket.
    Unix,
    /// TCP over the loopback interface.
    Tcp,
}

/// One line of the table.
#[derive(Debug)]
struct Case<'a> {
    machine: &'a str,
    transport: Transport,
    dirty_pages: u32,
    multifd: u8,
    arguments: &'a Arguments,
    colo_vmm: &'a Path,
}

/// What is told of many pauses, ms.
#[derive(Clone, Copy, Debug)]
struct Figures {
    mean: f64,
    p50: f64,
    p99: f64,
}

impl Figures {
    fn of(mut pauses: Vec<Duration>) -> Self {
        pauses.sort_unstable();
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let quantile = |q: usize| ms(pauses[(pauses.len() - 1) * q / 100]);
        let mean = pauses.iter().copied().map(ms).sum::<f64>() / pauses.len() as f64;
        Self {
            mean,
            p50: quantile(50),
            p99: quantile(99),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} | {:.1} | {:.1}", self.mean, self.p50, self.p99)
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vs_qemu: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let binary = qemu::binaries()?
        .iter()
        .find(|b| b.is_since((11, 1)))
        .ok_or("needs QEMU 11.1 or newer in COLO_QEMU or on PATH")?;
    let accel = match missing_kvm() {
        None => Accel::Kvm,
        Some(reason) => {
            println!("guests run in TCG: {reason}");
            Accel::Tcg
        }
    };
    let colo_vmm = workspace_program("colo-vmm", "colo-vmm")?;
    println!("pause of the primary per checkpoint, ms: {binary} | colo-vmm\n");
    println!(
        "| QEMU's machine | transport | dirty pages | channels | mean | p50 | p99 | ours: mean | p50 | p99 | p50 ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for machine in &arguments.machine {
        for &transport in &arguments.transport {
            for &dirty_pages in &arguments.dirty_pages {
                for &multifd in &arguments.multifd {
                    let case = Case {
                        machine,
                        transport,
                        dirty_pages,
                        multifd,
                        arguments,
                        colo_vmm: &colo_vmm,
                    };
                    let theirs = Figures::of(case.measure(binary, accel)?);
                    let ours = case.measure_ours(accel)?;
                    println!("{}", case.row(theirs, ours));
                }
            }
        }
    }
    Ok(())
}

impl Case<'_> {
    fn measure(&self, binary: &Binary, accel: Accel) -> Result<Vec<Duration>> {
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk");
        self.write_disk(&disk)?;
        let trace = dir.path().join("trace");
        let machine = Machine::new(self.machine, self.arguments.memory)
            .accel(accel)
            .boot(&disk)
            .args(["-serial", "stdio"]);

        let mut secondary = machine.clone().incoming().start(binary)?;
        let mut primary = machine
            .running()
            .args([
                "-msg",
                "timestamp=on",
                "-d",
                "trace:colo_vm_state_change",
                "-D",
            ])
            .args([&trace])
            .start(binary)?;
        primary
            .process
            .stdout()
            .wait_for("first round", |b| (!b.is_empty()).then_some(()))?;
        for side in [&mut primary, &mut secondary] {
            self.configure(side)?;
        }
        primary.qmp.set_parameters(json!({
            "x-checkpoint-delay": self.arguments.delay,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        }))?;
        let uri = secondary.listen(&match self.transport {
            Transport::Unix => format!("unix:{}", secondary.dir().join("colo").display()),
            Transport::Tcp => "tcp:127.0.0.1:0".to_owned(),
        })?;
        primary.migrate(&uri)?;
        primary.wait_migration("colo")?;
        self.wait_checkpoints(&primary, &trace)
    }

    fn configure(&self, side: &mut Qemu) -> Result<()> {
        side.qmp.enable(&["return-path", "x-colo"])?;
        if self.multifd > 0 {
            side.qmp.enable(&["multifd"])?;
            side.qmp
                .set_parameters(json!({"multifd-channels": self.multifd}))?;
        }
        Ok(())
    }

    /// Waits for the wanted number of pauses in the trace, without the first one.
    fn wait_checkpoints(&self, primary: &Qemu, trace: &Path) -> Result<Vec<Duration>> {
        let wanted = self.arguments.checkpoints + 1;
        let all_delays = Duration::from_millis(u64::from(self.arguments.delay)) * 4;
        let deadline =
            Instant::now() + PATIENCE + all_delays * u32::try_from(self.arguments.checkpoints)?;
        loop {
            let mut pauses = pauses(&fs::read_to_string(trace)?)?;
            if pauses.len() >= wanted {
                pauses.truncate(wanted);
                pauses.remove(0);
                return Ok(pauses);
            }
            if Instant::now() >= deadline {
                let what = format!("took {} checkpoints of {wanted}", pauses.len());
                return Err(primary.process.failure(&what));
            }
            thread::sleep(Duration::from_millis(u64::from(self.arguments.delay)));
        }
    }

    /// The guest: `colo-vmm`'s own, which boots in QEMU as well.
    fn write_disk(&self, disk: &Path) -> Result<()> {
        let status = Command::new(self.colo_vmm)
            .args(["guest", "--memory", &self.arguments.memory.to_string()])
            .args(["--dirty-pages", &self.dirty_pages.to_string(), "--out"])
            .arg(disk)
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err("colo-vmm guest failed".into())
        }
    }

    /// The same pair made of `colo-vmm`, driven by its demo.
    fn measure_ours(&self, accel: Accel) -> Result<Figures> {
        let transport = format!("{:?}", self.transport).to_lowercase();
        let mut demo = Command::new(self.colo_vmm);
        demo.args([
            "demo",
            "--json",
            "--failover",
            "none",
            "--transport",
            &transport,
        ])
        .args(["--dirty-pages", &self.dirty_pages.to_string()])
        .args(["--multifd", &self.multifd.to_string()])
        .args(["--memory", &self.arguments.memory.to_string()])
        .args(["--delay", &self.arguments.delay.to_string()])
        .args(["--checkpoints", &self.arguments.checkpoints.to_string()]);
        if matches!(accel, Accel::Tcg) {
            demo.arg("--sim");
        }
        let output = demo.output()?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
        }
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let pause = &report["checkpoints"]["pause_ms"];
        let figure = |name: &str| pause[name].as_f64().ok_or("the demo reports no pause");
        Ok(Figures {
            mean: figure("mean")?,
            p50: figure("p50")?,
            p99: figure("p99")?,
        })
    }

    fn row(&self, theirs: Figures, ours: Figures) -> String {
        format!(
            "| {} | {} | {} | {} | {theirs} | {ours} | {:.3} |",
            self.machine,
            format!("{:?}", self.transport).to_lowercase(),
            self.dirty_pages,
            self.multifd,
            ours.p50 / theirs.p50,
        )
    }
}

/// The times between `'run' => 'stop'` and `'stop' => 'run'` in a trace, whose last line may be
/// half written.
fn pauses(trace: &str) -> Result<Vec<Duration>> {
    let mut pauses = Vec::new();
    let mut stopped = None;
    for line in trace.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
        if line.contains("'run' => 'stop'") {
            stopped = Some(time_of_day(line)?);
        } else if line.contains("'stop' => 'run'")
            && let Some(stopped) = stopped.take()
        {
            /// A pause may go over midnight.
            const DAY: Duration = Duration::from_secs(24 * 60 * 60);
            let running = time_of_day(line)?;
            let later = if running < stopped {
                DAY
            } else {
                Duration::ZERO
            };
            pauses.push(running + later - stopped);
        }
    }
    Ok(pauses)
}

/// Of a line such as `2026-11-23T05:11:30.917970Z colo_vm_state_change …`.
fn time_of_day(line: &str) -> Result<Duration> {
    let time = |line: &str| {
        let time = line.split_once('T')?.1.split_once('Z')?.0;
        let mut parts = time.split([':', '.']).map(|n| n.parse::<u64>().ok());
        let (h, m, s, micros) = (
            parts.next()??,
            parts.next()??,
            parts.next()??,
            parts.next()??,
        );
        Some(Duration::from_secs((h * 60 + m) * 60 + s) + Duration::from_micros(micros))
    };
    time(line).ok_or_else(|| format!("a trace line without time: {line}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_from_stop_to_run_and_may_go_over_midnight() {
        let trace = "\
2026-11-23T05:11:30.917970Z colo_vm_state_change Change 'stop' => 'run'
2026-11-23T05:11:31.159352Z colo_vm_state_change Change 'run' => 'stop'
2026-11-23T05:11:32.589588Z colo_vm_state_change Change 'stop' => 'run'
2026-11-23T23:59:59.999000Z colo_vm_state_change Change 'run' => 'stop'
2026-11-24T00:00:00.001000Z colo_vm_state_change Change 'stop' => 'run'
2026-11-24T00:00:00.201000Z colo_vm_state_change Change 'run' => 'stop'
2026-11-24T00:00:0";
        let expected = [1_430_236, 2_000].map(Duration::from_micros);
        assert_eq!(pauses(trace).unwrap(), expected);
        assert!(pauses("x 'run' => 'stop'\n").is_err());
    }
}
