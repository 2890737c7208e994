//! The program as its README has it. All of it needs /dev/kvm; without it the tests are ignored and say so, with
//! CI=true they fail.

use std::error::Error;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, thread};

use libtest_mimic::{Arguments, Failed, Trial};
use tempfile::TempDir;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(60);

/// A process of the VMM, which is killed when this is dropped.
struct Vmm(Child);

impl Vmm {
    /// What the guest says goes to `output`.
    fn start(output: &Path, arguments: &[&str]) -> Outcome<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minimal"));
        command.args(arguments).stdout(File::create(output)?);
        Ok(Self(command.spawn()?))
    }

    fn succeeds(&mut self) -> Outcome {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.0.try_wait()? {
                return if status.success() {
                    Ok(())
                } else {
                    Err(format!("it ended with {status}").into())
                };
            }
            thread::sleep(Duration::from_millis(10));
        }
        Err("it goes on".into())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The counts in these files, one after the other. A line that is not over is left out.
fn counts(files: &[&Path]) -> Outcome<Vec<u32>> {
    let mut text = String::new();
    for file in files {
        text += &fs::read_to_string(file)?;
    }
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    let lines = text[..whole].lines();
    Ok(lines
        .map(|line| u32::from_str_radix(line, 16))
        .collect::<Result<_, _>>()?)
}

/// Waits until there are more counts in the file than `seen`.
fn counts_on(file: &Path, seen: usize) -> Outcome {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if counts(&[file]).is_ok_and(|counts| counts.len() > seen) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Err(format!("the guest says no more in {}", file.display()).into())
}

fn follow_each_other(counts: &[u32]) -> Outcome {
    for pair in counts.windows(2) {
        if pair[1] != pair[0] + 1 {
            return Err(format!("{:x} follows {:x}", pair[1], pair[0]).into());
        }
    }
    Ok(())
}

/// Addresses in a directory of the test's own.
fn unix(dir: &TempDir, name: &str) -> String {
    format!("unix:{}", dir.path().join(name).display())
}

/// A source whose target is not there yet is tried again.
fn send(output: &Path, arguments: &[&str], socket: &Path) -> Outcome<Vmm> {
    let begun = Instant::now();
    while !socket.exists() && begun.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(10));
    }
    Vmm::start(output, arguments)
}

fn migrates(channels: &str) -> Outcome {
    let dir = tempfile::tempdir()?;
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    let at = unix(&dir, "main");
    let target = Vmm::start(&after, &["receive", &at, "--channels", channels])?;
    let arguments = ["send", &at, "--channels", channels, "--after", "0.3"];
    send(&before, &arguments, &dir.path().join("main"))?.succeeds()?;
    counts_on(&after, 3)?;
    drop(target);
    let counts = counts(&[&before, &after])?;
    assert_eq!(counts[0], 1);
    follow_each_other(&counts)
}

fn runs_on_if_it_cannot_leave() -> Outcome {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("output");
    let nobody = unix(&dir, "nobody");
    for arguments in [vec!["send", &nobody], vec!["primary", &nobody, &nobody]] {
        let mut vmm = Vmm::start(&output, &[&arguments[..], &["--after", "0.1"]].concat())?;
        thread::sleep(Duration::from_secs(1));
        counts_on(&output, counts(&[&output])?.len())?;
        assert!(vmm.0.try_wait()?.is_none(), "{arguments:?}");
        drop(vmm);
        follow_each_other(&counts(&[&output])?)?;
    }
    Ok(())
}

fn is_saved_and_restored() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    let file = dir.path().join("guest").display().to_string();
    Vmm::start(&before, &["save", &file, "--after", "0.3"])?.succeeds()?;
    let restored = Vmm::start(&after, &["restore", &file])?;
    counts_on(&after, 3)?;
    drop(restored);
    let counts = counts(&[&before, &after])?;
    assert_eq!(counts[0], 1);
    follow_each_other(&counts)
}

fn outlives_its_primary() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    let (at, beats) = (unix(&dir, "main"), unix(&dir, "beats"));
    let secondary = Vmm::start(&after, &["secondary", &at, &beats, "--channels", "2"])?;
    let arguments = ["primary", &at, &beats, "--channels", "2", "--after", "0.3"];
    let mut primary = send(&before, &arguments, &dir.path().join("main"))?;
    counts_on(&before, 3)?;
    // Some checkpoints.
    thread::sleep(Duration::from_secs(2));
    counts_on(&before, counts(&[&before])?.len())?;
    assert_eq!(fs::metadata(&after)?.len(), 0, "only one guest is heard");
    primary.0.kill()?;
    counts_on(&after, 3)?;
    drop((primary, secondary));
    let (before, after) = (fs::read_to_string(&before)?, fs::read_to_string(&after)?);
    // It may have been in the middle of a line.
    let first = after.lines().nth(1).ok_or("no line")?;
    assert!(u32::from_str_radix(first, 16)? > 3, "{first} begins anew");
    assert!(before.lines().count() > 3);
    Ok(())
}

fn main() -> ExitCode {
    let missing = !Path::new("/dev/kvm").exists();
    let required = env::var_os("CI").is_some_and(|ci| ci == "true");
    let trial = |name: &str, test: fn() -> Outcome| {
        Trial::test(name, move || {
            test().map_err(|e| Failed::from(e.to_string()))
        })
        .with_kind(if missing { "no /dev/kvm" } else { "kvm" })
        .with_ignored_flag(missing && !required)
    };
    let trials = vec![
        trial(
            "a_guest_that_cannot_leave_runs_on",
            runs_on_if_it_cannot_leave,
        ),
        trial("a_guest_that_counts_migrates", || migrates("0")),
        trial("a_guest_that_counts_migrates_by_channels", || migrates("2")),
        trial(
            "a_guest_that_counts_is_saved_and_restored",
            is_saved_and_restored,
        ),
        trial(
            "a_guest_that_counts_outlives_its_primary",
            outlives_its_primary,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
