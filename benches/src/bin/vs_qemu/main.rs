//! What a COLO checkpoint costs: a pair of QEMU and one of `colo-vmm` in turns on this machine, with
//! the same boot sector in both, which dirties a known number of pages.
//!
//! - `case`: what guest, how connected
//! - `sample`: what is measured of a pair, whoever made it
//! - `qemu` with `trace`, `ours`: the kinds of pair
//! - `serial`: what a client of the guest hears
//! - `yardstick`: what the machine itself makes of something that takes as long as our pause
//! - `report`: the table, the JSON and the drawing
//!
//! QEMU's steps are what its trace says, ours what the events of `colo-vmm` say. CPU time, memory and
//! the guest's serial line are observed from outside, in the same way for both.

mod case;
mod ours;
mod qemu;
mod report;
mod sample;
mod serial;
mod trace;
mod yardstick;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::tests::Result;
use ::tests::harness::missing_kvm;
use ::tests::qemu::{Accel, Binary, VARIABLE, binaries};
use ::tests::vmm;
use benches::connection::{Transport, Way};
use benches::host::Host;
use clap::Parser;

use case::Case;
use ours::OurPair;
use qemu::QemuPair;
use report::{Figures, OURS, Report, Row};
use sample::{Sample, measure};
use yardstick::Yardstick;

/// Measures checkpoints of `colo-vmm` beside those of QEMU.
#[derive(Debug, Parser)]
struct Arguments {
    /// How the two sides are connected.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Transport::Unix, Transport::Tcp])]
    transport: Vec<Transport>,
    /// How pages cross.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Way::Plain, Way::Multifd2])]
    way: Vec<Way>,
    /// Pages the guest dirties between checkpoints.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 2560, 25_600])]
    dirty_pages: Vec<u32>,
    /// Guest memory, MiB; without it 256, and 512 for more than 30,000 dirty pages.
    #[arg(long, value_delimiter = ',')]
    memory: Vec<u32>,
    /// QEMU's machine types.
    #[arg(long, value_delimiter = ',', default_values_t = ["pc".to_owned(), "microvm".to_owned()])]
    machine: Vec<String>,
    /// Every transport, way and number of dirty pages, 51,200 included: half an hour.
    #[arg(long)]
    all: bool,
    /// Turns of an empty loop that the guest makes between two passes over its pages. 0: it dirties
    /// all the time.
    #[arg(long, default_value_t = 0)]
    pass_delay: u32,
    /// Leave memory zero that the guest does not dirty; otherwise it writes to all of it once.
    #[arg(long)]
    empty: bool,
    /// Checkpoints to measure in each round.
    #[arg(long, default_value_t = 15)]
    checkpoints: usize,
    /// Rounds, in each of which every pair is started anew, one after the other.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Milliseconds from one checkpoint to the next.
    #[arg(long, default_value_t = 200)]
    delay: u32,
    /// Give each side half of the CPUs for itself, as if it were on a host of its own.
    #[arg(long)]
    pin: bool,
    /// Further options of both our sides, separated by spaces.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    colo_options: String,
    /// Measure QEMU with a `colo-vmm standby` for its secondary too.
    #[arg(long)]
    standby: bool,
    /// After each case, measure two threads that only wake each other, as often as takes as long as our
    /// median pause: how far the machine's own slowest is from its median.
    #[arg(long)]
    yardstick: bool,
    /// Measure no QEMU.
    #[arg(long)]
    ours_only: bool,
    /// A check that everything runs: one small case. Without a QEMU it says so, and fails in CI.
    #[arg(long)]
    smoke: bool,
    /// Keep what the JSON file has already, of the same commit, and add to it.
    #[arg(long)]
    add: bool,
    /// Where the figures go.
    #[arg(long, default_value = "vs_qemu.json")]
    json: PathBuf,
    /// Where the drawing goes.
    #[arg(long, default_value = "vs_qemu.svg")]
    svg: PathBuf,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.smoke {
        arguments.shorten();
    } else if arguments.all {
        arguments.widen();
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vs_qemu: {e}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    /// All that takes time is small.
    fn shorten(&mut self) {
        self.transport = vec![Transport::Unix];
        self.way = vec![Way::Multifd2];
        self.dirty_pages = vec![256];
        self.memory = vec![64];
        self.machine.truncate(1);
        (self.checkpoints, self.rounds, self.delay) = (3, 1, 100);
        self.yardstick = true;
    }

    fn widen(&mut self) {
        use clap::ValueEnum;
        self.transport = Transport::value_variants().to_vec();
        self.way = Way::value_variants().to_vec();
        self.dirty_pages = vec![256, 2560, 25_600, 51_200];
    }

    fn cases(&self, is_simulated: bool) -> Vec<Case> {
        let mut cases = Vec::new();
        for &transport in &self.transport {
            for &dirty_pages in &self.dirty_pages {
                let usual = if dirty_pages > 30_000 { 512 } else { 256 };
                let memory = match self.memory.as_slice() {
                    [] => &[usual],
                    memory => memory,
                };
                for &memory_mib in memory {
                    cases.extend(self.way.iter().map(|&way| Case {
                        transport,
                        way,
                        dirty_pages,
                        memory_mib,
                        // A simulated guest cannot.
                        is_filled: !self.empty && !is_simulated,
                        pass_delay: self.pass_delay,
                        delay_ms: self.delay,
                        is_pinned: self.pin,
                    }));
                }
            }
        }
        cases
    }

    /// What the JSON file has, or nothing yet.
    fn report(&self, qemu: Option<&Binary>) -> Result<Report> {
        let mut report = Report {
            host: Host::this(),
            qemu: qemu.map(ToString::to_string),
            rows: Vec::new(),
        };
        if self.add && self.json.exists() {
            let earlier: Report = serde_json::from_slice(&fs::read(&self.json)?)?;
            if earlier.host != report.host {
                let (then, now) = (earlier.host, report.host);
                return Err(
                    format!("{} is of {then:?}, not of {now:?}", self.json.display()).into(),
                );
            }
            report.rows = earlier.rows;
            report.qemu = report.qemu.or(earlier.qemu);
        }
        Ok(report)
    }
}

/// The QEMU to measure, if one is to be.
fn peer(arguments: &Arguments) -> Result<Option<&'static Binary>> {
    if arguments.ours_only {
        return Ok(None);
    }
    let found = binaries()?.iter().find(|b| b.is_since((11, 1)));
    let missing = || format!("needs QEMU 11.1 or newer in {VARIABLE} or on PATH");
    found.map(Some).ok_or_else(|| missing().into())
}

fn run(arguments: &Arguments) -> Result<()> {
    let qemu = match peer(arguments) {
        Err(e) if arguments.smoke && env::var_os("CI").is_none_or(|ci| ci != "true") => {
            println!("vs_qemu was left out: {e}");
            return Ok(());
        }
        qemu => qemu?,
    };
    let accel = match missing_kvm() {
        None => Accel::Kvm,
        Some(reason) => {
            println!("guests run in TCG, and ours simulated: {reason}");
            Accel::Tcg
        }
    };
    // Not while something is measured.
    vmm::program()?;
    let mut report = arguments.report(qemu)?;
    println!("{:?}", report.host);
    print!("\n{}", report::HEAD);
    for case in arguments.cases(accel == Accel::Tcg) {
        let row = arguments.measure(&case, qemu, accel)?;
        print!("{}", row.lines());
        report.add(row);
        // What is there is not lost with what comes.
        fs::write(&arguments.json, report.json()?)?;
        fs::write(&arguments.svg, report.svg())?;
    }
    if arguments.add {
        println!(
            "\nAll of {}:\n\n{}",
            arguments.json.display(),
            report.table()
        );
    }
    Ok(())
}

impl Arguments {
    /// Every pair in turns.
    fn measure(&self, case: &Case, qemu: Option<&Binary>, accel: Accel) -> Result<Row> {
        let options = self.colo_options.split_whitespace();
        let options: Vec<String> = options.map(str::to_owned).collect();
        let mut samples = BTreeMap::<String, Vec<Sample>>::new();
        for _ in 0..self.rounds.max(1) {
            for machine in &self.machine {
                let Some(qemu) = qemu else { continue };
                for is_standby in [false, true] {
                    if is_standby && !self.standby {
                        continue;
                    }
                    let (pair, line) = QemuPair::in_colo(case, machine, qemu, accel, is_standby)?;
                    let sample = measure(pair, line, self.checkpoints, case.is_pinned)?;
                    let name = report::name(machine, is_standby);
                    samples.entry(name).or_default().push(sample);
                }
            }
            let (pair, line) = OurPair::in_colo(case, &options, accel == Accel::Tcg)?;
            let sample = measure(pair, line, self.checkpoints, case.is_pinned)?;
            samples.entry(OURS.to_owned()).or_default().push(sample);
        }
        let figures = |samples: Vec<Sample>| {
            Figures::of(&samples, case).ok_or("no checkpoint was to be measured")
        };
        let pairs = samples
            .into_iter()
            .map(|(name, samples)| Ok((name, figures(samples)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let ours = pairs.get(OURS).filter(|_| self.yardstick);
        let yardstick = ours.map(|ours| {
            let length = Duration::from_secs_f64(ours.pause_ms.p50 / 1e3);
            let delay = Duration::from_millis(case.delay_ms.into());
            Yardstick::measure(ours.pauses_ms.len(), delay, length)
        });
        Ok(Row {
            case: case.clone(),
            colo_options: options,
            pairs,
            yardstick: yardstick.transpose()?,
        })
    }
}
