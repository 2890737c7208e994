//! `--metrics`: what a monitoring system reads from `colo-vmm`, while all is well and when a side dies.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::Result;
use tests::harness::{self, Needs};
use tests::metrics::{Metrics, ask};
use tests::process::Process;
use tests::vmm::{ColoVmm, Connection, Pair, Vmm, program};

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING.test(
            "figures_of_a_pair_move_with_its_checkpoints_and_its_failover",
            pair,
        ),
        Needs::NOTHING.test("clients_that_are_stuck_change_nothing", stuck),
        Needs::NOTHING.test("what_is_no_request_is_refused", refused),
        Needs::NOTHING.test(
            "limit_of_what_is_sent_between_checkpoints_changes_meanwhile",
            limit,
        ),
        Needs::NOTHING.test("each_guest_of_a_standby_has_figures_of_its_own", standby),
    ])
}

/// Where a side's figures are.
fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.metrics"))
}

fn address(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A simulated pair in COLO, with its figures and a heartbeat in `dir`.
fn in_colo(dir: &Path) -> Result<Pair> {
    let beat = address(&dir.join("beat"));
    let side = |name: &'static str, policy: &str| {
        ColoVmm::new(name)
            .memory(16)
            .simulated()
            .heartbeat(&beat, 300, policy)
            .args(["--metrics", &address(&socket(dir, name))])
    };
    let (primary, secondary) = (side("primary", "stop"), side("secondary", "take-over"));
    Pair::with_heartbeat(&primary, &secondary, 50)
}

fn is(metrics: &Metrics, series: &str) -> bool {
    metrics.get(series).is_ok_and(|value| value == 1.0)
}

/// The one state of a family.
fn present<'a>(metrics: &'a Metrics, name: &'a str) -> Vec<&'a str> {
    let ones = metrics.of(name).filter(|(_, value)| *value == 1.0);
    ones.map(|(series, _)| series).collect()
}

fn pair() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pair = in_colo(dir.path())?;
    for (side, name) in [
        (&mut pair.primary, "primary"),
        (&mut pair.secondary, "secondary"),
    ] {
        let before = Metrics::scrape(&socket(dir.path(), name))?;
        let count = side.checkpoints()?.len();
        side.wait_checkpoints(count + 3)?;
        let after = Metrics::scrape(&socket(dir.path(), name))?;
        moves_with_checkpoints(&before, &after)?;
        let role = format!("colo_role{{role=\"{name}\"}}");
        assert_eq!(present(&after, "colo_role"), [role]);
        assert_eq!(
            present(&after, "colo_migration_state"),
            ["colo_migration_state{state=\"colo\"}"]
        );
        assert_eq!(
            present(&after, "colo_heartbeat_phase"),
            ["colo_heartbeat_phase{phase=\"paired\"}"]
        );
        assert!(is(&after, "colo_heartbeat_connected"));
        // Each beat ends the time since the last one.
        side.poll("beat of just now", |_| {
            let now = Metrics::scrape(&socket(dir.path(), name))?;
            let age = now.get("colo_heartbeat_age_seconds")?;
            let missed = now.get("colo_heartbeat_missed_beats")?;
            Ok((age < 0.9 && missed <= 3.0).then_some(()))
        })?;
        assert_eq!(after.of("colo_failovers_total").count(), 0);
        assert!(after.get("process_open_fds")? > 3.0);
        // The guest's memory is part of it.
        assert!(after.get("process_resident_memory_bytes")? > 1e6);
        like_qmp(side, &after)?;
    }

    pair.primary.process.kill()?;
    let survivor = &mut pair.secondary;
    survivor.wait_migration("completed")?;
    survivor.wait_status("running")?;
    let alone = Metrics::scrape(&socket(dir.path(), "secondary"))?;
    assert_eq!(present(&alone, "colo_role"), ["colo_role{role=\"none\"}"]);
    assert_eq!(
        present(&alone, "colo_vm_state"),
        ["colo_vm_state{state=\"running\"}"]
    );
    let failovers: Vec<_> = alone.of("colo_failovers_total").collect();
    assert_eq!(failovers.len(), 1);
    let (series, count) = failovers[0];
    // COLO's connection broke before the heartbeat had it go on, as a rule.
    assert!(series.contains("decided_by=\"heartbeat\""), "{series}");
    assert_eq!(count, 1.0);
    assert_eq!(
        present(&alone, "colo_heartbeat_peer"),
        ["colo_heartbeat_peer{state=\"lost\"}"]
    );
    // The log says the same, in fields.
    let log = survivor.process.stderr().text();
    let mut lines = log.lines();
    let line = lines.find(|line| line.contains("decided_by="));
    let line = line.ok_or_else(|| format!("no failover in the log: {log}"))?;
    assert!(line.contains("decided_by=\"heartbeat\""), "{line}");
    assert!(line.contains("cause=\""), "{line}");
    let said = alone.get("colo_serial_output_bytes_total")?;
    survivor.wait_lines(3)?;
    let later = Metrics::scrape(&socket(dir.path(), "secondary"))?;
    assert!(later.get("colo_serial_output_bytes_total")? > said);
    assert!(later.get("colo_checkpoint_age_seconds")? > alone.get("colo_checkpoint_age_seconds")?);
    Ok(())
}

fn moves_with_checkpoints(before: &Metrics, after: &Metrics) -> Result<()> {
    for series in [
        "colo_checkpoints_total",
        "colo_checkpoint_pause_seconds_sum",
        "colo_checkpoint_pause_seconds_count",
        "colo_checkpoint_bytes_total{content=\"ram\"}",
        "colo_checkpoint_bytes_total{content=\"devices\"}",
        "colo_checkpoint_dirty_pages_total",
    ] {
        let (before, after) = (before.get(series)?, after.get(series)?);
        assert!(after > before, "{series}: {before}, then {after}");
    }
    let buckets: Vec<_> = after.of("colo_checkpoint_pause_seconds_bucket").collect();
    let bound = |series: &str| {
        let text = series.split('"').nth(1).unwrap_or_default();
        match text {
            "+Inf" => f64::INFINITY,
            text => text.parse().unwrap_or(-1.0),
        }
    };
    let mut buckets: Vec<_> = buckets.iter().map(|(s, n)| (bound(s), *n)).collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{buckets:?}");
    let last = buckets.last().ok_or("no buckets")?;
    assert!(last.0.is_infinite());
    assert_eq!(last.1, after.get("colo_checkpoints_total")?);
    assert_eq!(last.1, after.get("colo_checkpoint_pause_seconds_count")?);
    Ok(())
}

/// QMP says the same, a moment later.
fn like_qmp(side: &mut Vmm, metrics: &Metrics) -> Result<()> {
    let figures = side.qmp.execute("x-query-colo-figures", Value::Null)?;
    let number = |value: &Value| value.as_f64().ok_or("no number");
    assert!(number(&figures["checkpoints"])? >= metrics.get("colo_checkpoints_total")?);
    let pauses = metrics.get("colo_checkpoint_pause_seconds_sum")?;
    assert!(number(&figures["total-pause-us"])? >= (pauses * 1e6).floor());
    assert!(figures["heartbeat-age-us"].is_u64(), "{figures}");
    for key in [
        "pause-us",
        "age-ms",
        "ram-bytes",
        "device-bytes",
        "dirty-pages",
        "unchanged-pages",
    ] {
        assert!(figures["last"][key].is_u64(), "{figures}");
    }
    Ok(())
}

/// What `x-query-colo-figures` says of how much is sent between checkpoints, and `colo-vmm status`.
fn shown(side: &mut Vmm) -> Result<(Value, String)> {
    let figures = side.qmp.execute("x-query-colo-figures", Value::Null)?;
    let qmp = format!("unix:{}", side.dir().join("qmp").display());
    let output = Command::new(program()?).args(["status", &qmp]).output()?;
    let status = String::from_utf8(output.stdout)?;
    let line = status.lines().nth(1).ok_or("no line")?;
    let column = line.get(line.len() - 8..).unwrap_or_default();
    Ok((figures["gap-bandwidth"].clone(), column.trim().to_owned()))
}

fn limit() -> Result<()> {
    /// How often pages are sent between checkpoints, a page at least.
    const ROUND: Duration = Duration::from_millis(20);
    /// In a gap, far more than a page in each round.
    const MANY: u64 = 500;
    // Pages are written anew after more than three readings of the dirty log.
    let vmm = ColoVmm::new("colo-vmm")
        .memory(16)
        .simulated()
        .dirty_pages(1024)
        .args(["--gap-bandwidth", "64", "--pass-delay", "200000000"]);
    let mut pair = Pair::in_colo(&vmm, Connection::channels(2), 500)?;
    let set = |side: &mut Vmm, bandwidth: u64| {
        let arguments = json!({"bandwidth": bandwidth});
        side.qmp.execute("x-set-colo-gap-bandwidth", arguments)
    };
    let ahead = |checkpoint: &Value| checkpoint["ahead-pages"].as_u64().unwrap_or_default();
    let side = &mut pair.primary;
    assert_eq!(shown(side)?, (json!(64 << 20), "64.0".to_owned()));

    let began = Instant::now();
    set(side, 1)?;
    assert_eq!(shown(side)?, (json!(1), "0.1".to_owned()));
    // The gap that goes on began with another limit.
    let before = side.checkpoints()?.len() + 1;
    side.wait_checkpoints(before + 3)?;
    let sent = side.checkpoints()?[before..].iter().map(ahead).sum::<u64>();
    let rounds = u64::try_from(began.elapsed().as_millis() / ROUND.as_millis())?;
    assert!(sent <= rounds + 2, "{sent} pages in {rounds} rounds");

    let before = side.checkpoints()?.len();
    set(side, 0)?;
    assert_eq!(shown(side)?, (json!(0), "no limit".to_owned()));
    side.poll("checkpoint of which much was sent before", |side| {
        let checkpoints = side.checkpoints()?;
        let much = checkpoints[before..].iter().any(|c| ahead(c) >= MANY);
        Ok(much.then_some(()))
    })?;

    // The other side's is its own, for when it is the primary.
    let side = &mut pair.secondary;
    assert_eq!(shown(side)?.0, json!(64 << 20));
    set(side, 5 << 20)?;
    pair.primary.process.kill()?;
    side.go_on_alone()?;
    assert_eq!(shown(side)?, (json!(5 << 20), "5.0".to_owned()));

    let mut other = ColoVmm::new("colo-vmm").memory(16).simulated().start()?;
    assert_eq!(shown(&mut other)?, (Value::Null, "-".to_owned()));
    let bandwidth = json!({"bandwidth": 0});
    let refusal = other.qmp.refused("x-set-colo-gap-bandwidth", bandwidth)?;
    assert!(refusal.desc.contains("--gap-bandwidth"), "{refusal}");
    Ok(())
}

fn stuck() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut pair = in_colo(dir.path())?;
    let path = socket(dir.path(), "primary");
    let mut held = Vec::new();
    // Those who say nothing, who do not say all, and who do not read, more than there is room for.
    for request in [
        &b""[..],
        b"GET /metrics HT",
        b"GET /metrics HTTP/1.1\r\n\r\n",
    ] {
        for _ in 0..8 {
            let mut stream = UnixStream::connect(&path)?;
            stream.write_all(request)?;
            held.push(stream);
        }
    }
    let before = Metrics::scrape(&path)?;
    let count = pair.primary.checkpoints()?.len();
    pair.primary.wait_checkpoints(count + 5)?;
    let after = Metrics::scrape(&path)?;
    assert!(after.get("colo_checkpoints_total")? >= before.get("colo_checkpoints_total")? + 5.0);
    // Those who do not go by themselves are let go of: no descriptor stays behind.
    drop(held);
    pair.primary.poll("closed connections", |_| {
        let now = Metrics::scrape(&path)?.get("process_open_fds")?;
        Ok((now < before.get("process_open_fds")?).then_some(()))
    })
}

fn refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = socket(dir.path(), "vmm");
    let mut vmm = ColoVmm::new("colo-vmm")
        .memory(16)
        .simulated()
        .args(["--metrics", &address(&path)])
        .start()?;
    for (request, status) in [
        (
            &b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n"[..],
            "400 Bad Request",
        ),
        (b"{\"execute\": \"quit\"}\n", "400 Bad Request"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", "404 Not Found"),
    ] {
        let answer = ask(&path, request)?;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
    }
    let alone = Metrics::scrape(&path)?;
    assert_eq!(alone.get("colo_checkpoints_total")?, 0.0);
    assert_eq!(alone.of("colo_heartbeat_age_seconds").count(), 0);
    vmm.wait_lines(1)?;
    vmm.qmp.execute("quit", Value::Null)?;
    assert!(vmm.process.wait()?.success());
    assert!(!path.exists());

    // An address that cannot be had is told before the guest runs.
    let nowhere = format!("unix:{}/no/metrics", dir.path().display());
    let guest = ColoVmm::new("colo-vmm").memory(16).simulated();
    let mut command = guest.args(["--metrics", &nowhere]).command(dir.path())?;
    let mut process = Process::spawn("colo-vmm", &mut command)?;
    assert_eq!(process.wait()?.code(), Some(1));
    let said = String::from_utf8(process.stderr().whole()?)?;
    assert!(said.contains("metrics at unix:"), "{said}");
    Ok(())
}

fn standby() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = socket(dir.path(), "standby");
    let file = |name: &str| dir.path().join(name).display().to_string();
    let guest = format!(
        "name=web,incoming=unix:{},restore-into=file:{}",
        file("web"),
        file("web.saved")
    );
    let mut vmm = Vmm::standby([
        "--metrics",
        &address(&path),
        "--guest",
        &guest,
        "--incoming",
        &format!("unix:{}", file("one")),
        "--restore-into",
        &format!("file:{}", file("one.saved")),
    ])?;
    let metrics = vmm.poll("metrics", |_| Ok(Metrics::scrape(&path).ok()))?;
    assert_eq!(
        present(&metrics, "colo_vm_state"),
        [
            "colo_vm_state{guest=\"guest\",state=\"inmigrate\"}",
            "colo_vm_state{guest=\"web\",state=\"inmigrate\"}"
        ]
    );
    assert_eq!(metrics.get("colo_checkpoints_total{guest=\"web\"}")?, 0.0);
    Ok(())
}
