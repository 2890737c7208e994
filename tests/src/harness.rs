//! How the tests that need something of the machine are run: what is missing makes a test ignored,
//! with the reason in the output, and failed where the environment says `CI=true`.
//!
//! A test file sets `harness = false` in `Cargo.toml` and calls [`run`] with its tests, each made of
//! its [`Needs`]. Tests that are many ways of one thing are [sampled](Tests::sampled).

mod needs;

use std::num::NonZero;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fmt};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

pub use self::needs::{Given, Needs, missing_kvm};
use crate::{Result, qemu, sample};

/// How long a trial may take without being named at the end.
const QUICK: Duration = Duration::from_secs(5);
/// Of how many trials of a matrix one is in the sample at least.
const SAMPLED: usize = 4;

/// The trials of one test: one, or one for each QEMU.
#[derive(Debug)]
pub struct Tests {
    trials: Vec<OneTrial>,
    /// See [`Tests::sampled`].
    axes: Option<Vec<String>>,
}

impl Tests {
    /// Makes the trials part of the file's matrix, of which a run takes a sample. `axes` are the
    /// values of this test; what its trials run against is one more. Trials that need a KVM that is
    /// missing are in no sample.
    #[must_use]
    pub fn sampled(mut self, axes: &[&str]) -> Self {
        self.axes = Some(axes.iter().map(|&value| value.to_owned()).collect());
        self
    }

    /// Makes the trials part of the file's matrix: a run has this test with one QEMU at least, and
    /// each QEMU with one test at least.
    #[must_use]
    pub fn with_some_qemu(self) -> Self {
        let first = self.trials.first();
        let name = first.map_or_else(String::new, |first| first.trial.name().to_owned());
        self.sampled(&[&name])
    }
}

#[derive(Debug)]
struct OneTrial {
    trial: Trial,
    /// It will be ignored for that, whatever else is missing.
    lacks_kvm: bool,
}

/// As [`run`], for trials that wait most of the time: twice as many at a time.
pub fn run_waiting(tests: impl IntoIterator<Item = Tests>) -> ExitCode {
    run_with(tests, 2)
}

/// Runs the tests as `cargo test` expects, after a line on what they run against. Trials that are not
/// in the sample are ignored, unless they are asked for by name.
pub fn run(tests: impl IntoIterator<Item = Tests>) -> ExitCode {
    run_with(tests, 1)
}

fn run_with(tests: impl IntoIterator<Item = Tests>, per_processor: usize) -> ExitCode {
    let mut arguments = Arguments::from_args();
    if arguments.test_threads.is_none() {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        arguments.test_threads = Some(processors * per_processor);
    }
    let seed = match sample::seed() {
        Ok(seed) => seed,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    if !arguments.list {
        let (qemu, kvm) = (qemu_summary(), kvm_summary());
        let part = if sample::is_everything() {
            format!("every case, seed {seed}")
        } else {
            format!(
                "seed {seed} ({}={seed} repeats it, {}=1 runs every case)",
                sample::SEED,
                sample::ALL
            )
        };
        println!("\nrunning against: {qemu}; {kvm}; {part}");
    }
    let (mut trials, mut matrix) = (Vec::new(), Vec::new());
    for test in tests {
        for OneTrial { trial, lacks_kvm } in test.trials {
            match &test.axes {
                // Not asked for by name.
                Some(axes) if arguments.filter.is_none() && !lacks_kvm => {
                    let mut axes = axes.clone();
                    axes.push(trial.kind().to_owned());
                    matrix.push((axes, trial));
                }
                _ => trials.push(trial),
            }
        }
    }
    let least = matrix.len() / SAMPLED;
    match sample::take("trials", matrix, least, |(axes, _)| axes.clone()) {
        Ok((taken, rest)) => {
            trials.extend(taken.into_iter().map(|(_, trial)| trial));
            trials.extend(rest.into_iter().map(|(_, trial)| passed_over(&trial, seed)));
        }
        Err(e) => trials.push(Trial::test("sample", move || Err(Failed::from(e)))),
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut slow = SLOW.lock().unwrap_or_else(PoisonError::into_inner);
    slow.sort_unstable();
    for (took, name) in slow.iter().rev() {
        println!("{:5.1} s  {name}", took.as_secs_f32());
    }
    conclusion.exit_code()
}

/// A trial that is not in the sample, with the reason.
fn passed_over(trial: &Trial, seed: u64) -> Trial {
    let reason = format!("not in the sample of seed {seed}");
    Trial::ignorable_test(trial.name(), || Ok(Completion::ignored_with(reason)))
        .with_kind(trial.kind())
}

/// Trials that took longer than [`QUICK`].
static SLOW: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// A trial of one test with what it is given. `given` is asked when the trial runs.
fn new_trial(
    name: &str,
    kind: String,
    given: impl FnOnce() -> std::result::Result<Given, String> + Send + 'static,
    test: impl FnOnce(Given) -> Result<()> + Send + 'static,
) -> Trial {
    let label = if kind.is_empty() {
        name.to_owned()
    } else {
        format!("[{kind}] {name}")
    };
    Trial::ignorable_test(name, move || match given() {
        Err(reason) => missing(reason),
        Ok(given) => {
            let begun = Instant::now();
            let done = test(given);
            let took = begun.elapsed();
            if took > QUICK {
                let mut slow = SLOW.lock().unwrap_or_else(PoisonError::into_inner);
                slow.push((took, label));
            }
            Ok(done.map(|()| Completion::Completed)?)
        }
    })
    .with_kind(kind)
}

/// Ignored with the reason; failed in CI, where the machine has to have everything.
fn missing(reason: impl fmt::Display) -> std::result::Result<Completion, Failed> {
    if env::var("CI").is_ok_and(|ci| ci == "true") {
        Err(Failed::from(format!("missing in CI: {reason}")))
    } else {
        Ok(Completion::ignored_with(reason))
    }
}

fn qemu_summary() -> String {
    match qemu::binaries() {
        Ok([]) => "no QEMU".to_owned(),
        Ok(all) => {
            let names: Vec<String> = all.iter().map(ToString::to_string).collect();
            names.join(", ")
        }
        Err(e) => e.to_owned(),
    }
}

fn kvm_summary() -> &'static str {
    if missing_kvm().is_none() {
        "KVM"
    } else {
        "no KVM"
    }
}
