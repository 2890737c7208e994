//! A pair's life by the commands of `colo-vmm`, as an operator types them: `pair`, `status`,
//! `failover`, `rejoin`, with the primary's or the secondary's process killed in between, twice over.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use tests::process::workspace_program;
use tests::vmm::{check_count, first_line};
use tests::{PATIENCE, Result, harness};

fn main() -> ExitCode {
    let kvm = harness::on_kvm;
    harness::run([
        kvm("guest_outlives_its_primaries_one_after_the_other", || {
            outlives(&["--memory", "16"])
        }),
        harness::anywhere(
            "simulated_guest_outlives_its_primaries_one_after_the_other",
            || outlives(&["--memory", "16", "--sim"]),
        ),
        kvm(
            "primary_is_given_a_new_secondary_while_its_guest_runs",
            new_secondary,
        ),
        harness::anywhere(
            "what_cannot_be_done_is_refused_and_nothing_is_left_behind",
            refused,
        ),
    ])
}

/// Processes that were started, by the name of the side in the last line about it.
struct Life {
    program: PathBuf,
    pids: BTreeMap<String, u32>,
}

impl Life {
    fn new() -> Result<Self> {
        Ok(Self {
            program: workspace_program("colo-vmm", "colo-vmm")?,
            pids: BTreeMap::new(),
        })
    }

    /// Runs a subcommand, and returns what it printed.
    fn run(&mut self, args: &[&str]) -> Result<String> {
        let output = Command::new(&self.program).args(args).output()?;
        let said = String::from_utf8(output.stdout)?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{args:?}: {}", errors.trim_end()).into());
        }
        for line in said.lines() {
            if let Some((name, rest)) = line.split_once(": process ") {
                let pid = rest.split(',').next().unwrap_or_default().parse()?;
                self.pids.insert(name.to_owned(), pid);
            }
        }
        Ok(said)
    }

    fn kill(&mut self, name: &str) -> Result<()> {
        let pid = self.pids.remove(name).ok_or("no such process")?;
        signal(pid, "KILL")
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        for pid in self.pids.values() {
            // It may have ended.
            let _ = signal(*pid, "KILL");
        }
    }
}

fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("kill: {status}").into())
    }
}

fn text(path: &Path) -> Result<&str> {
    Ok(path.to_str().ok_or("a path that is no text")?)
}

/// The arguments, those of both sides behind them.
fn with<'a>(args: &[&'a str], run: &[&'a str]) -> Vec<&'a str> {
    args.iter().chain(&["--"]).chain(run).copied().collect()
}

/// Waits until a file is longer than it is.
fn wait_for_more(file: &Path) -> Result<()> {
    let length = || fs::metadata(file).map_or(0, |m| m.len());
    let (before, deadline) = (length(), Instant::now() + PATIENCE);
    while length() < before + 30 {
        if Instant::now() > deadline {
            return Err(format!("{} does not grow", file.display()).into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The primary dies, the secondary goes on and gets a new one, dies, and so on.
fn outlives(run: &[&str]) -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let dirs: Vec<PathBuf> = (0..4).map(|i| dir.path().join(i.to_string())).collect();
    let first = text(&dirs[0])?;
    let said = life.run(&with(&["pair", "--dir", first, "--delay", "50"], run))?;
    assert!(said.contains("first checkpoint after"), "{said}");
    let mut survivor = format!("unix:{first}/secondary.qmp");
    let mut serial = dirs[0].join("primary.serial");
    wait_for_more(&serial)?;
    let mut said_before = 0;
    for next in &dirs[1..] {
        let status = life.run(&["status", &survivor])?;
        assert!(status.contains("secondary"), "{status}");
        life.kill(if said_before == 0 {
            "primary"
        } else {
            "survivor"
        })?;
        let output = fs::read(&serial)?;
        check_count(said_before, &output)?;
        life.run(&["failover", &survivor])?;
        // It goes on where the last checkpoint was, which the dead one had passed.
        let before = serial;
        serial = PathBuf::from(survivor.trim_start_matches("unix:")).with_extension("serial");
        wait_for_more(&serial)?;
        let heard = fs::read(&serial)?;
        let (begin, _) = first_line(&heard)?;
        assert!(begin <= said_before + fs::metadata(&before)?.len());
        check_count(begin, &heard)?;
        said_before = begin;

        let pid = life.pids.remove("secondary").ok_or("no secondary")?;
        life.pids.insert("survivor".to_owned(), pid);
        let status = life.run(&["status", &survivor])?;
        assert!(status.contains("was secondary"), "{status}");
        let next = text(next)?;
        let args = ["rejoin", &survivor, "--dir", next, "--delay", "50"];
        life.run(&with(&args, run))?;
        wait_for_more(&serial)?;
        survivor = format!("unix:{next}/secondary.qmp");
    }
    Ok(())
}

fn new_secondary() -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let run = ["--memory", "16"];
    let args = [
        "pair",
        "--dir",
        text(&a)?,
        "--multifd",
        "0",
        "--delay",
        "50",
    ];
    life.run(&with(&args, &run))?;
    let primary = format!("unix:{}/primary.qmp", text(&a)?);
    life.kill("secondary")?;
    life.run(&["failover", &primary])?;
    let serial = a.join("primary.serial");
    wait_for_more(&serial)?;
    let args = [
        "rejoin",
        &primary,
        "--dir",
        text(&b)?,
        "--compression",
        "zstd",
        "--delay",
        "50",
    ];
    life.run(&with(&args, &run))?;
    wait_for_more(&serial)?;
    let status = life.run(&["status", &primary])?;
    let line = status.lines().nth(1).ok_or("no line")?;
    assert!(
        line.contains("running") || line.contains("colo"),
        "{status}"
    );
    // Its guest has never stood still for longer than that, and has lost nothing.
    check_count(0, &fs::read(&serial)?)?;
    assert_eq!(fs::read(b.join("secondary.serial"))?, b"");
    Ok(())
}

fn refused() -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let error = |result: Result<String>| result.unwrap_or_else(|e| e.to_string());
    let nowhere = format!("unix:{}/nobody", text(dir.path())?);
    let e = error(life.run(&["failover", &nowhere]));
    assert!(e.contains("connecting to the survivor"), "{e}");

    // A side that cannot start: its log is quoted, and the other one is ended.
    let pair = dir.path().join("pair");
    let args = with(
        &["pair", "--dir", text(&pair)?],
        &["--memory", "0", "--sim"],
    );
    let e = error(life.run(&args));
    assert!(e.contains("the secondary wrote:"), "{e}");

    // One that is not in COLO has no peer to be freed from, and one that is needs no other.
    let pair = dir.path().join("other");
    let run = ["--memory", "16", "--sim"];
    life.run(&with(&["pair", "--dir", text(&pair)?], &run))?;
    let primary = format!("unix:{}/primary.qmp", text(&pair)?);
    let third = dir.path().join("third");
    let e = error(life.run(&with(&["rejoin", &primary, "--dir", text(&third)?], &run)));
    assert!(e.contains("failover comes first"), "{e}");
    assert!(!third.exists());
    life.kill("secondary")?;
    life.run(&["failover", &primary])?;
    let e = error(life.run(&["failover", &primary]));
    assert!(e.contains("is not in COLO"), "{e}");
    Ok(())
}
