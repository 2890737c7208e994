//! A pair's life by the commands of `colo-vmm`, as an operator types them: `pair`, `status`,
//! `failover`, `rejoin`, with the primary's or the secondary's process killed in between, twice over.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::certificates::Authority;
use tests::etcd::{Etcd, Guard};
use tests::harness::{self, Needs};
use tests::metrics::Metrics;
use tests::process::workspace_program;
use tests::qmp::Qmp;
use tests::vmm::{ColoVmm, Vmm, check_count, first_line};
use tests::{PATIENCE, Result};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run_waiting([
        kvm("guest_outlives_its_primaries_one_after_the_other", || {
            outlives(&["--memory", "16"])
        }),
        Needs::NOTHING.test(
            "simulated_guest_outlives_its_primaries_one_after_the_other",
            || outlives(&["--memory", "16", "--sim"]),
        ),
        kvm(
            "primary_is_given_a_new_secondary_while_its_guest_runs",
            new_secondary,
        ),
        kvm(
            "guest_outlives_its_primaries_by_itself_with_a_heartbeat",
            || outlives_by_itself(&["--memory", "16"]),
        ),
        Needs::NOTHING.test(
            "simulated_guest_outlives_its_primaries_by_itself_with_a_heartbeat",
            || outlives_by_itself(&["--memory", "16", "--sim", "--pass-delay", "2000000"]),
        ),
        Needs::NOTHING.test(
            "survivor_with_a_heartbeat_takes_no_secondary_that_it_cannot_watch",
            unwatched,
        ),
        Needs::NOTHING.test_etcd(
            "both_sides_of_a_pair_ask_an_etcd_with_certificates_and_a_password",
            guarded,
        ),
        Needs::NOTHING.test("both_sides_of_a_pair_serve_their_figures", figures),
        Needs::NOTHING.test(
            "pair_whose_precopy_does_not_converge_is_told_so_and_what_helps",
            does_not_converge,
        ),
        Needs::NOTHING.test(
            "migration_that_outlasts_the_timeout_is_cancelled_and_its_guest_runs_on",
            outlasts_its_timeout,
        ),
        Needs::NOTHING.test(
            "taking_over_without_a_heartbeat_is_warned_of",
            takes_over_blindly,
        ),
        Needs::NOTHING.test(
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

/// Options of a side whose heartbeat is at `beat`, with a lock file in `dir`.
fn watched(dir: &Path, beat: &str, run: &[&str]) -> Vec<String> {
    let heartbeat = format!("unix:{}", dir.join(beat).display());
    let arbiter = format!("file:{}", dir.join("right").display());
    let options = [
        "--uuid",
        "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a13",
        "--heartbeat",
        &heartbeat,
        "--heartbeat-interval",
        "200",
        "--on-heartbeat-loss",
        "ask",
        "--arbiter",
        &arbiter,
        "--arbiter-term",
        "2000",
    ];
    let all = run.iter().chain(&options);
    all.map(|option| (*option).to_owned()).collect()
}

fn heartbeat(qmp: &mut Qmp) -> Result<Value> {
    qmp.execute("x-query-colo-heartbeat", Value::Null)
}

/// Waits until the side at the socket has gone on alone by itself.
fn wait_alone(qmp: &mut Qmp) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let beat = heartbeat(qmp)?;
        if beat["state"] == "alone" {
            let status = qmp.execute("query-status", Value::Null)?;
            if status["status"] == "running" {
                return Ok(());
            }
        }
        if Instant::now() > deadline {
            return Err(format!("does not go on alone: {beat}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// As [`outlives`], and nobody says `failover`: each new pair is watched as the first one. At the end
/// the last survivor loses its secondary, and gets another in its place.
fn outlives_by_itself(run: &[&str]) -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let place = |i: usize| dir.path().join(i.to_string());
    let options = watched(dir.path(), "beat-0", run);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let first = place(0);
    let args = ["pair", "--dir", text(&first)?, "--delay", "50"];
    life.run(&with(&args, &options))?;
    let mut victim = "primary".to_owned();
    let mut socket = first.join("secondary.qmp");
    let mut serial = first.join("primary.serial");
    wait_for_more(&serial)?;
    for i in 1..4 {
        life.kill(&victim)?;
        let mut qmp = Qmp::connect(&socket, || Ok(()))?;
        wait_alone(&mut qmp)?;
        assert_eq!(heartbeat(&mut qmp)?["generation"], i + 1);
        serial = socket.with_extension("serial");
        wait_for_more(&serial)?;
        victim = format!("survivor {i}");
        let pid = life.pids.remove("secondary").ok_or("no secondary")?;
        life.pids.insert(victim.clone(), pid);

        let next = place(i);
        let options = watched(dir.path(), &format!("beat-{i}"), run);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let survivor = format!("unix:{}", text(&socket)?);
        let args = ["rejoin", &survivor, "--dir", text(&next)?, "--delay", "50"];
        life.run(&with(&args, &options))?;
        let beat = heartbeat(&mut qmp)?;
        assert_eq!(
            (&beat["state"], &beat["peer"]),
            (&"paired".into(), &"alive".into())
        );
        socket = next.join("secondary.qmp");
    }
    // The survivor is a primary now, and may lose its secondary too.
    life.kill("secondary")?;
    let mut qmp = Qmp::connect(&place(2).join("secondary.qmp"), || Ok(()))?;
    wait_alone(&mut qmp)?;
    wait_for_more(&serial)?;
    let options = watched(dir.path(), "beat-3", run);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let survivor = format!("unix:{}", text(&place(2).join("secondary.qmp"))?);
    let last = place(4);
    let args = ["rejoin", &survivor, "--dir", text(&last)?, "--delay", "50"];
    life.run(&with(&args, &options))?;
    assert_eq!(heartbeat(&mut qmp)?["state"], "paired");
    let heard = fs::read(&serial)?;
    let (begin, _) = first_line(&heard)?;
    check_count(begin, &heard)?;
    Ok(())
}

/// What is said to `pair` once each side uses, and no list of processes or log has the password.
fn guarded(program: &Path) -> Result<()> {
    const PASSWORD: &str = "open sesame";
    let authority = Authority::new()?;
    let (server, client) = (
        authority.issue(&["127.0.0.1"])?,
        authority.issue(&["host"])?,
    );
    let ca = authority.certificate();
    let etcd = Etcd::start_guarded(
        program,
        Guard {
            client_authority: Some(&ca),
            ..Guard::by_tls(&server)
        },
    )?;
    etcd.enable_authentication(PASSWORD)?;
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let (pair, password) = (dir.path().join("pair"), dir.path().join("password"));
    fs::write(&password, format!("{PASSWORD}\n"))?;
    let run = ["--memory", "16", "--sim", "--pass-delay", "2000000"];
    let mut options = watched(dir.path(), "beat", &run);
    let arbiter = options
        .iter_mut()
        .find(|option| option.starts_with("file:"));
    *arbiter.ok_or("no arbiter")? = format!("etcd:{}", etcd.endpoint());
    for (option, value) in [
        ("--etcd-ca", text(&ca)?),
        ("--etcd-cert", text(&client.certificate)?),
        ("--etcd-key", text(&client.key)?),
        ("--etcd-user", Etcd::USER),
        ("--etcd-password-file", text(&password)?),
    ] {
        options.extend([option.to_owned(), value.to_owned()]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    life.run(&with(
        &["pair", "--dir", text(&pair)?, "--delay", "50"],
        &options,
    ))?;
    for pid in life.pids.values() {
        let line = String::from_utf8(fs::read(format!("/proc/{pid}/cmdline"))?)?;
        assert!(line.contains("--etcd-password-file"), "{line}");
        assert!(!line.contains(PASSWORD), "{line}");
    }
    let mut primary = Qmp::connect(&pair.join("primary.qmp"), || Ok(()))?;
    assert_eq!(heartbeat(&mut primary)?["arbiter-state"], "won");
    life.kill("primary")?;
    let mut secondary = Qmp::connect(&pair.join("secondary.qmp"), || Ok(()))?;
    wait_alone(&mut secondary)?;
    let beat = heartbeat(&mut secondary)?;
    assert_eq!(
        (&beat["arbiter-state"], &beat["generation"]),
        (&"won".into(), &2.into())
    );
    for side in ["primary", "secondary"] {
        let log = fs::read_to_string(pair.join(side).with_extension("log"))?;
        assert!(!log.contains(PASSWORD), "{log}");
    }
    Ok(())
}

fn figures() -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let (pair, socket) = (dir.path().join("pair"), dir.path().join("figures"));
    let metrics = format!("unix:{}", text(&socket)?);
    let run = ["--memory", "16", "--sim", "--metrics", &metrics];
    life.run(&with(&["pair", "--dir", text(&pair)?], &run))?;
    for (path, role) in [
        (socket.clone(), "primary"),
        (dir.path().join("figures.secondary"), "secondary"),
    ] {
        let figures = Metrics::scrape(&path)?;
        let series = format!("colo_role{{role=\"{role}\"}}");
        assert!((figures.get(&series)? - 1.0).abs() < f64::EPSILON, "{role}");
    }
    Ok(())
}

fn unwatched() -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let pair = dir.path().join("pair");
    let run = ["--memory", "16", "--sim", "--pass-delay", "2000000"];
    let options = watched(dir.path(), "beat", &run);
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    life.run(&with(&["pair", "--dir", text(&pair)?], &options))?;
    let socket = pair.join("secondary.qmp");
    let mut qmp = Qmp::connect(&socket, || Ok(()))?;
    let elsewhere = json!({"uri": "unix:/nowhere"});
    let refusal = qmp.refused("x-set-colo-heartbeat", elsewhere.clone())?;
    assert!(refusal.desc.contains("migration"), "{refusal}");
    life.kill("primary")?;
    wait_alone(&mut qmp)?;
    // Without a heartbeat, or one of another guest.
    let survivor = format!("unix:{}", text(&socket)?);
    let next = dir.path().join("next");
    let args = ["rejoin", &survivor, "--dir", text(&next)?];
    let error = life.run(&with(&args, &run)).unwrap_err().to_string();
    assert!(error.contains("the secondary has no heartbeat"), "{error}");
    // By hand, it is not forgotten either.
    qmp.enable(&["return-path", "x-colo"])?;
    let refusal = qmp.refused("migrate", elsewhere)?;
    assert!(refusal.desc.contains("new secondary's first"), "{refusal}");
    assert_eq!(heartbeat(&mut qmp)?["state"], "alone");
    wait_for_more(&socket.with_extension("serial"))
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

/// 8 MiB that are written all the time: what is left at the end of each round is more than the downtime
/// allows.
fn does_not_converge() -> Result<()> {
    let mut life = Life::new()?;
    let dir = tempfile::tempdir()?;
    let bandwidth = (7 << 20).to_string();
    let pair = [
        "pair",
        "--dir",
        text(dir.path())?,
        "--auto-converge",
        "--multifd",
        "0",
        "--timeout",
        "6",
        "--downtime-limit",
        "1",
        "--max-bandwidth",
        &bandwidth,
    ];
    let run = ["--memory", "16", "--sim", "--dirty-pages", "2048"];
    let error = life.run(&with(&pair, &run)).unwrap_err().to_string();
    assert!(error.contains("MiB of 16.0 MiB left"), "{error}");
    assert!(error.contains("within 6 s (--timeout)"), "{error}");
    assert!(error.contains("does not converge: the guest"), "{error}");
    assert!(error.contains("auto-converge takes"), "{error}");
    Ok(())
}

fn outlasts_its_timeout() -> Result<()> {
    let mut life = Life::new()?;
    let primary = ColoVmm::new("primary").simulated().dirty_pages(2048);
    let primary = primary.memory(16).start()?;
    let secondary = ColoVmm::new("secondary").simulated().incoming();
    let secondary = secondary.memory(16).start()?;
    let address = |vmm: &Vmm| format!("unix:{}", vmm.dir().join("qmp").display());
    let (first, second) = (address(&primary), address(&secondary));
    let pair = [
        "pair",
        "--primary",
        &first,
        "--secondary",
        &second,
        "--timeout",
        "1",
        "--downtime-limit",
        "1",
        "--max-bandwidth",
        "1000000",
    ];
    let error = life.run(&pair).unwrap_err().to_string();
    assert!(error.contains("within 1 s (--timeout)"), "{error}");
    let mut primary = primary;
    primary.wait_migration("cancelled")?;
    primary.wait_status("running")
}

fn takes_over_blindly() -> Result<()> {
    let life = Life::new()?;
    let warning = |args: &[&str]| -> Result<bool> {
        let mut run = Command::new(&life.program);
        run.args(["run", "--memory", "16", "--sim", "--serial", "null"]);
        // No socket can be there, so that it ends.
        let nowhere = ["--qmp", "unix:/nonexistent/qmp"];
        let output = run.args(args).args(nowhere).output()?;
        let said = String::from_utf8(output.stderr)?;
        assert!(said.contains("qmp at"), "{said}");
        Ok(said.contains("is a second guest"))
    };
    assert!(warning(&["--on-peer-loss", "take-over"])?);
    assert!(!warning(&[])?);
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
