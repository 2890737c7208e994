//! Sides of a pair of `colo-vmm` that are half dead: a peer's host that is gone without a word, a disk
//! that is full, a pipe that nobody reads, an operator who does not listen. Each ends in a failover, in
//! a clear stop, or in nothing at all, within the configured time, and QMP answers meanwhile.

mod disk;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::harness::{self, Needs};
use tests::netns::{Host, Network, Traffic};
use tests::vmm::{ColoVmm, Connection, Pair, Side, Vmm, check_count, first_line, has_run_out};
use tests::{PATIENCE, Result};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (guest, kvm) in [("kvm", true), ("simulated", false)] {
        for (name, connection) in [("plain", PLAIN), ("multifd", Connection::channels(2))] {
            let test = Needs::NOTHING.network().kvm_if(kvm).test(
                &format!("{guest}_{name}_half_open_connections_end_colo_in_time_on_both_sides"),
                move || half_open(kvm, connection),
            );
            trials.push(test.sampled(&["half open", name]));
        }
        let on_machine = |name: &str, test: fn(bool) -> Result<()>| {
            let needs = Needs::NOTHING.kvm_if(kvm);
            let test = needs.test(&format!("{guest}_{name}"), move || test(kvm));
            test.sampled(&[name])
        };
        trials.push(on_machine(
            "primary_checkpoints_on_when_nobody_reads_its_serial_line",
            unread_serial,
        ));
        trials.push(on_machine(
            "secondary_takes_over_when_nobody_reads_its_serial_line",
            unread_serial_of_the_survivor,
        ));
        trials.push(on_machine(
            "pair_beats_and_checkpoints_on_when_nobody_reads_its_log",
            unread_log,
        ));
        trials.push(on_machine(
            "pair_checkpoints_on_when_an_operator_does_not_listen",
            deaf_operator,
        ));
    }
    trials.extend([Needs::NOTHING.network().test(
        "half_open_connections_end_a_migration_in_time_on_both_sides",
        half_open_before_colo,
    )]);
    trials.extend(disk::trials());
    harness::run_waiting(trials)
}

const PLAIN: Connection = Connection::PLAIN;

/// Between checkpoints, ms.
const DELAY: u32 = 20;
/// How long a peer may be silent, ms.
const PEER_TIMEOUT: &str = "1500";
/// Within which that has to show, on a machine that does other things too.
const IN_TIME: Duration = Duration::from_secs(10);
/// What an answer may take on such a machine.
const ANSWER: Duration = Duration::from_secs(2);
/// What a full pipe holds at least, bytes.
const HELD: usize = 60_000;
/// All that a pipe holds but one page, bytes.
const FILLED: usize = 15 * 4096;
/// Checkpoints that show that they go on.
const MORE: usize = 20;

fn guest(kvm: bool) -> ColoVmm {
    // Not to keep the processor busy.
    guest_of_passes(kvm, "2000000")
}

/// A guest that waits so many nanoseconds between two passes if it is simulated.
fn guest_of_passes(kvm: bool, delay: &str) -> ColoVmm {
    let guest = ColoVmm::new("colo-vmm").memory(16).dirty_pages(64);
    if kvm {
        guest
    } else {
        guest.simulated().args(["--pass-delay", delay])
    }
}

/// The same with a heartbeat at `dir`, whose sides ask a lock file there.
fn watched(kvm: bool, dir: &Path) -> ColoVmm {
    watched_guest(guest(kvm), dir)
}

/// As [`watched`], of a guest that says so much that a pipe is soon full.
fn talkative(kvm: bool, dir: &Path) -> ColoVmm {
    watched_guest(guest_of_passes(kvm, "200000").dirty_pages(1), dir)
}

fn watched_guest(guest: ColoVmm, dir: &Path) -> ColoVmm {
    let heartbeat = format!("unix:{}", dir.join("beat").display());
    let arbiter = format!("file:{}", dir.join("right").display());
    guest
        .heartbeat(&heartbeat, 200, "ask")
        .arbiter(&arbiter, 2000)
}

/// Brings a pair into COLO.
fn enter(pair: &mut Pair, connection: Connection) -> Result<()> {
    pair.set_up(connection, DELAY)?;
    pair.migrate(connection)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_checkpoints(3)?;
    }
    Ok(())
}

/// Waits until `found` says that it is there, while every answer comes at once.
fn answers_until(
    side: &mut Vmm,
    what: &str,
    limit: Duration,
    mut found: impl FnMut(&mut Vmm) -> Result<bool>,
) -> Result<()> {
    let since = Instant::now();
    loop {
        let asked = Instant::now();
        side.migration()?;
        side.status()?;
        let took = asked.elapsed();
        assert!(took < ANSWER, "an answer took {took:?}");
        if found(side)? {
            return Ok(());
        }
        if since.elapsed() > limit {
            return Err(side.process.failure(&format!("has no {what} in {limit:?}")));
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Checkpoints are completed, and answers come meanwhile.
fn goes_on(pair: &mut Pair) -> Result<()> {
    for side in [&mut pair.primary, &mut pair.secondary] {
        let wanted = side.checkpoints()?.len() + MORE;
        answers_until(side, "more checkpoints", PATIENCE, |side| {
            Ok(side.checkpoints()?.len() >= wanted)
        })?;
    }
    Ok(())
}

/// A side whose heartbeat was lost goes on alone, and answers meanwhile.
fn goes_on_alone(side: &mut Vmm) -> Result<()> {
    answers_until(side, "state alone", PATIENCE, |side| {
        Ok(side.heartbeat()?["state"] == "alone")
    })?;
    side.wait_migration("completed")?;
    side.wait_status("running")
}

fn has_left(side: &Vmm) -> bool {
    side.qmp.events().any(|e| e["event"] == "COLO_EXIT")
}

fn pair_on(network: &Network, guest: &ColoVmm) -> Result<Pair> {
    let guest = guest.clone().args(["--peer-timeout", PEER_TIMEOUT]);
    Ok(Pair {
        secondary: guest.clone().incoming().start_on(network, Host::B)?,
        primary: guest.start_on(network, Host::A)?,
    })
}

/// Nothing comes any more, and nothing says that nothing will.
fn half_open(kvm: bool, connection: Connection) -> Result<()> {
    let network = Network::new()?;
    let mut pair = pair_on(&network, &guest(kvm))?;
    pair.set_up(connection, DELAY)?;
    let uri = pair
        .secondary
        .listen_on(&format!("tcp:{}:7000", Host::B.address()))?;
    pair.primary.migrate(&uri)?;
    pair.secondary.wait_checkpoints(3)?;
    network.cut_apart(Host::A, Host::B, Traffic::All)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        answers_until(side, "end of COLO", IN_TIME, |side| Ok(has_left(side)))?;
        let exit = side.qmp.wait_event("COLO_EXIT")?;
        assert_eq!(exit["data"]["reason"], "error");
        let migration = side.migration()?;
        assert_eq!(migration["status"], "failing", "{migration}");
        let reason = migration["error-desc"].as_str().unwrap_or_default();
        assert!(has_run_out(reason), "{reason}");
    }
    // The operator knows which host is gone.
    pair.primary.process.kill()?;
    let side = &mut pair.secondary;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    side.wait_migration("completed")?;
    side.wait_status("running")?;
    side.wait_lines(3)?;
    pair.check_history(Side::Secondary)
}

fn half_open_before_colo() -> Result<()> {
    let network = Network::new()?;
    let mut pair = pair_on(&network, &guest(false))?;
    pair.set_up(PLAIN, DELAY)?;
    let uri = pair
        .secondary
        .listen_on(&format!("tcp:{}:7000", Host::B.address()))?;
    // 16 MiB of a guest that is mostly empty, at a rate that it takes some time with.
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 20_000, "zero-page-detection": "none"}))?;
    pair.primary.migrate(&uri)?;
    pair.secondary.wait_migration("active")?;
    network.cut_apart(Host::A, Host::B, Traffic::All)?;
    // Faster, so that there is more to be sent than a socket holds.
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 0}))?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        answers_until(side, "failure", IN_TIME, |side| {
            Ok(side.migration()?["status"] == "failed")
        })?;
    }
    assert_eq!(pair.primary.status()?, "running");
    pair.primary.wait_lines(3)?;
    check_count(0, &pair.primary.output()?)?;
    assert_eq!(pair.secondary.output()?, b"");
    Ok(())
}

/// A FIFO with somebody who has it open, and reads when told to.
struct Pipe {
    reader: mpsc::Receiver<std::io::Result<File>>,
}

impl Pipe {
    fn new(path: &Path) -> Result<Self> {
        if !Command::new("mkfifo").arg(path).status()?.success() {
            return Err("no FIFO".into());
        }
        let (sender, reader) = mpsc::channel();
        let path = path.to_owned();
        // Waits for the other end.
        thread::spawn(move || sender.send(File::open(path)));
        Ok(Self { reader })
    }

    /// The reader's end, once the writer is there.
    fn open(&self) -> Result<File> {
        let opened = self.reader.recv_timeout(PATIENCE);
        Ok(opened.map_err(|_| "nobody writes to the FIFO")??)
    }
}

/// A side whose serial line is a FIFO.
fn start_piped(guest: &ColoVmm, name: &str) -> Result<(Vmm, File)> {
    let dir = tempfile::Builder::new().prefix("colo-vmm-").tempdir()?;
    let pipe = Pipe::new(&dir.path().join("serial"))?;
    let command = guest.command(dir.path())?;
    let vmm = Vmm::start(name, command, dir)?;
    Ok((vmm, pipe.open()?))
}

fn unread_serial(kvm: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = talkative(kvm, dir.path());
    let (primary, mut serial) = start_piped(&guest, "primary")?;
    let secondary = guest.incoming().start()?;
    let mut pair = Pair { primary, secondary };
    enter(&mut pair, PLAIN)?;
    answers_until(&mut pair.primary, "full pipe", PATIENCE, |side| {
        Ok(side
            .process
            .stderr()
            .text()
            .contains("reader takes nothing"))
    })?;
    goes_on(&mut pair)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        let beat = side.heartbeat()?;
        assert_eq!(
            (&beat["state"], &beat["peer"]),
            (&json!("paired"), &json!("alive"))
        );
    }
    // Whoever reads again hears again, after what the pipe has held and a gap.
    let mut held = [0; HELD];
    serial.read_exact(&mut held)?;
    check_count(0, &held)?;
    pair.primary
        .process
        .stderr()
        .wait_for("end of the silence", |log| {
            let log = String::from_utf8_lossy(log);
            log.contains("is taken again").then_some(())
        })?;
    goes_on(&mut pair)
}

fn unread_serial_of_the_survivor(kvm: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = talkative(kvm, dir.path());
    let (secondary, mut serial) = start_piped(&guest.clone().incoming(), "secondary")?;
    let primary = guest.start()?;
    let mut pair = Pair { primary, secondary };
    enter(&mut pair, PLAIN)?;
    pair.primary.process.kill()?;
    let side = &mut pair.secondary;
    goes_on_alone(side)?;
    answers_until(side, "full pipe", PATIENCE, |side| {
        Ok(side
            .process
            .stderr()
            .text()
            .contains("reader takes nothing"))
    })?;
    assert_eq!(side.status()?, "running");
    let mut heard = [0; HELD];
    serial.read_exact(&mut heard)?;
    let (begin, _) = first_line(&heard)?;
    check_count(begin, &heard)?;
    Ok(())
}

fn unread_log(kvm: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let guest = watched(kvm, dir.path());
    let logging = |guest: &ColoVmm, name: &str| -> Result<(Vmm, File)> {
        let dir = tempfile::Builder::new().prefix("colo-vmm-").tempdir()?;
        let log: PathBuf = dir.path().join("log");
        let pipe = Pipe::new(&log)?;
        let command = guest.command(dir.path())?;
        let mut shell = Command::new("sh");
        // All of the pipe but its last page.
        let script = format!("exec 2> \"$0\"; head -c {FILLED} /dev/zero >&2; exec \"$@\"");
        shell.args(["-c", &script]).arg(&log);
        shell.arg(command.get_program()).args(command.get_args());
        shell.env("RUST_LOG", "trace");
        let vmm = Vmm::start(name, shell, dir)?;
        Ok((vmm, pipe.open()?))
    };
    let (secondary, _log) = logging(&guest.clone().incoming(), "secondary")?;
    let (primary, mut log) = logging(&guest, "primary")?;
    let mut pair = Pair { primary, secondary };
    enter(&mut pair, PLAIN)?;
    for _ in 0..3 {
        goes_on(&mut pair)?;
    }
    for side in [&mut pair.primary, &mut pair.secondary] {
        let beat = side.heartbeat()?;
        assert_eq!(
            (&beat["state"], &beat["peer"]),
            (&json!("paired"), &json!("alive"))
        );
    }
    pair.secondary.process.kill()?;
    goes_on_alone(&mut pair.primary)?;
    pair.primary.wait_lines(3)?;
    check_count(0, &pair.primary.output()?)?;
    // It was full with the first line, of many.
    let mut held = [0; FILLED + 50];
    log.read_exact(&mut held)?;
    Ok(())
}

/// An operator who asks and asks, and takes no answer and no event.
fn deaf_operator(kvm: bool) -> Result<()> {
    let mut pair = Pair {
        secondary: guest(kvm).incoming().start()?,
        primary: guest(kvm).start()?,
    };
    let mut deaf = UnixStream::connect(pair.primary.dir().join("qmp"))?;
    deaf.write_all(b"{\"execute\": \"qmp_capabilities\"}\n")?;
    deaf.set_write_timeout(Some(Duration::from_secs(1)))?;
    enter(&mut pair, PLAIN)?;
    let question = b"{\"execute\": \"query-migrate-capabilities\"}\n".repeat(100);
    let begun = Instant::now();
    // Until nobody takes them any more, or the connection is cut.
    while deaf.write_all(&question).is_ok() {
        assert!(
            begun.elapsed() < PATIENCE,
            "there is no end to what is taken"
        );
    }
    goes_on(&mut pair)?;
    let _ = deaf.shutdown(Shutdown::Both);
    pair.primary.wait_lines(3)
}
