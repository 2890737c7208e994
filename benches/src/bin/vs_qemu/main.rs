//! What protection by COLO costs: a pair of QEMU and one of `colo-vmm` one after the other on this
//! machine, with the same boot sector in both, which dirties a known number of pages.
//!
//! - `sample`: what is measured of a pair, whoever made it
//! - `qemu` with `trace`, `ours`: the kinds of pair
//! - `serial`: what a client of the guest hears
//! - `figures`: what the samples of one pair add up to
//!
//! QEMU's steps are those of its trace, ours those of `colo-vmm`'s events. CPU time, memory and the
//! guest's serial line are observed from outside, in the same way for both.

mod figures;
mod ours;
mod qemu;
mod sample;
mod serial;
mod trace;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::tests::Result;
use ::tests::harness::missing_kvm;
use ::tests::qemu::{Accel, Binary, VARIABLE, binaries};
use ::tests::vmm;
use benches::case::Case;
use benches::link::{Cable, Link, LinkArgs};
use benches::render;
use benches::report::{GuestWork, Report, ours_with};
use benches::way::Way;
use clap::Parser;

use ours::OurPair;
use qemu::{Parts, QemuPair};
use sample::Started;

/// Measures checkpoints of `colo-vmm` beside those of QEMU.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    link: LinkArgs,
    /// How pages cross.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Way::Multifd2])]
    way: Vec<Way>,
    /// Pages the guest dirties between checkpoints.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 2560, 25_600])]
    dirty_pages: Vec<u32>,
    /// Guest memory, MiB; without it 256, and 512 for more than 30,000 dirty pages.
    #[arg(long)]
    memory: Option<u32>,
    /// QEMU's machine types.
    #[arg(long, value_delimiter = ',', default_values_t = ["pc".to_owned()])]
    machine: Vec<String>,
    /// Turns of an empty loop that the guest makes between two passes over its pages. 0: it dirties
    /// all the time.
    #[arg(long, default_value_t = 0)]
    pass_delay: u32,
    /// Leave memory zero that the guest does not dirty; otherwise it writes to all of it once.
    #[arg(long)]
    empty: bool,
    /// Milliseconds from one checkpoint to the next; 200, and 50,100,200,1000 for `--guest-work`.
    #[arg(long, value_delimiter = ',')]
    every: Vec<u32>,
    /// Checkpoints to measure in each round.
    #[arg(long, default_value_t = 20)]
    checkpoints: usize,
    /// Rounds, in each of which every pair is started anew, one after the other.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Measure the guest's own progress in place of its checkpoints: alone, and under checkpoints.
    #[arg(long)]
    guest_work: bool,
    /// How long `--guest-work` measures each, seconds.
    #[arg(long, default_value_t = 8)]
    seconds: u32,
    /// Further options of both our sides, separated by spaces; each of several is a pair.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    colo_options: Vec<String>,
    /// Measure QEMU with a `colo-vmm standby` for its secondary too.
    #[arg(long)]
    standby: bool,
    /// Measure no QEMU.
    #[arg(long)]
    ours_only: bool,
    /// A check that everything runs: small cases. Without a QEMU it says so, and fails in CI.
    #[arg(long)]
    smoke: bool,
    /// Write the figures here, after each case.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match Bench::run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vs_qemu: {e}");
            ExitCode::FAILURE
        }
    }
}

fn is_ci() -> bool {
    env::var_os("CI").is_some_and(|ci| ci == "true")
}

impl Arguments {
    /// All that takes time is small.
    fn shorten(&mut self) {
        self.dirty_pages = vec![256];
        self.memory = Some(64);
        self.machine.truncate(1);
        self.every = vec![100];
        (self.checkpoints, self.rounds, self.seconds) = (3, 1, 1);
    }

    /// The cases of one link.
    fn cases(&self, link: Link, is_simulated: bool) -> Vec<Case> {
        let every: &[u32] = match (self.every.as_slice(), self.guest_work) {
            ([], true) => &[50, 100, 200, 1000],
            ([], false) => &[200],
            (every, _) => every,
        };
        let mut cases = Vec::new();
        for &dirty_pages in &self.dirty_pages {
            let usual = if dirty_pages > 30_000 { 512 } else { 256 };
            for &way in &self.way {
                cases.extend(every.iter().map(|&interval_ms| Case {
                    link,
                    way,
                    dirty_pages,
                    memory_mib: self.memory.unwrap_or(usual),
                    // A simulated guest cannot.
                    is_filled: !self.empty && !is_simulated,
                    pass_delay: self.pass_delay,
                    interval_ms,
                }));
            }
        }
        cases
    }

    /// The QEMU to measure, if one is to be.
    fn peer(&self) -> Result<Option<&'static Binary>> {
        if self.ours_only {
            return Ok(None);
        }
        let found = binaries()?.iter().find(|b| b.is_since((11, 1)));
        let missing = || format!("needs QEMU 11.1 or newer in {VARIABLE} or on PATH");
        found.map(Some).ok_or_else(|| missing().into())
    }
}

/// A run of this program.
struct Bench {
    arguments: Arguments,
    qemu: Option<&'static Binary>,
    accel: Accel,
}

impl Bench {
    fn run(mut arguments: Arguments) -> Result<()> {
        if arguments.smoke {
            arguments.shorten();
        }
        let qemu = match arguments.peer() {
            Err(e) if arguments.smoke && !is_ci() => {
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
        let bench = Self {
            arguments,
            qemu,
            accel,
        };
        let mut report = Report::new(qemu);
        for cable in bench.arguments.link.lay(bench.arguments.smoke)? {
            let link = cable.link();
            for case in bench.arguments.cases(link, accel == Accel::Tcg) {
                eprintln!("{case}");
                bench.measure(&case, &cable, &mut report)?;
                // What is there is not lost with what comes.
                if let Some(file) = &bench.arguments.json {
                    report.write(file)?;
                }
            }
        }
        print!("{}", render::tables(&report));
        Ok(())
    }

    /// Every pair, one after the other in each round.
    fn measure(&self, case: &Case, cable: &Cable, report: &mut Report) -> Result<()> {
        let pairs = self.pairs();
        let rounds = 0..self.arguments.rounds.max(1);
        if self.arguments.guest_work {
            let interval = Duration::from_millis(case.interval_ms.into());
            let mut work: Vec<GuestWork> = (pairs.iter())
                .map(|pair| GuestWork {
                    case: case.clone(),
                    pair: pair.name(),
                    alone: Vec::new(),
                    protected: Vec::new(),
                })
                .collect();
            for _ in rounds {
                for (pair, work) in pairs.iter().zip(&mut work) {
                    let started = self.start(pair, case, cable)?;
                    let seconds = self.arguments.seconds;
                    let [alone, protected] = sample::measure_work(started, interval, seconds)?;
                    work.alone.push(alone);
                    work.protected.push(protected);
                }
            }
            report.guest_work.append(&mut work);
            return Ok(());
        }
        let mut samples: Vec<_> = pairs.iter().map(|_| Vec::new()).collect();
        for _ in rounds {
            for (pair, samples) in pairs.iter().zip(&mut samples) {
                let started = self.start(pair, case, cable)?;
                samples.push(sample::measure(started, self.arguments.checkpoints)?);
            }
        }
        for (pair, samples) in pairs.iter().zip(&samples) {
            let figures = figures::of(case, &pair.name(), samples);
            let figures = figures.ok_or("no checkpoint was to be measured")?;
            report.checkpoints.push(figures);
        }
        Ok(())
    }

    fn pairs(&self) -> Vec<Who<'_>> {
        let mut pairs = Vec::new();
        for machine in &self.arguments.machine {
            let Some(binary) = self.qemu else { continue };
            let kinds = [false, true].into_iter();
            let kinds = kinds.filter(|is_standby| !is_standby || self.arguments.standby);
            pairs.extend(kinds.map(|is_standby| {
                Who::Qemu(Parts {
                    binary,
                    machine,
                    accel: self.accel,
                    is_standby,
                })
            }));
        }
        let ours = self.arguments.colo_options.iter();
        pairs.extend(ours.map(|options| Who::Ours(options)));
        pairs
    }

    fn start(&self, who: &Who<'_>, case: &Case, cable: &Cable) -> Result<Started> {
        Ok(match who {
            Who::Ours(options) => {
                let is_simulated = self.accel == Accel::Tcg;
                let (pair, line) = OurPair::start(case, cable, options, is_simulated)?;
                (Box::new(pair), line)
            }
            Who::Qemu(parts) => {
                let (pair, line) = QemuPair::start(case, cable, parts)?;
                (Box::new(pair), line)
            }
        })
    }
}

/// A pair that is measured.
enum Who<'a> {
    /// Ours with further options.
    Ours(&'a str),
    /// One with a primary of QEMU's.
    Qemu(Parts<'a>),
}

impl Who<'_> {
    fn name(&self) -> String {
        match self {
            Self::Ours(options) => ours_with(options),
            Self::Qemu(parts) if parts.is_standby => format!("QEMU {} to standby", parts.machine),
            Self::Qemu(parts) => format!("QEMU {}", parts.machine),
        }
    }
}
