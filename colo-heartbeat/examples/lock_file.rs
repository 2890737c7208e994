//! A pair with a lock file as its arbiter. The primary is a process of its own and is killed: the secondary
//! notices the missing beats, asks the arbiter, and goes on alone.
//!
//! `cargo run -p colo-heartbeat --example lock_file`

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use colo_heartbeat::arbiter::{LockFile, Owner};
use colo_heartbeat::{
    ColoEnd, ColoState, Endpoint, Failover, Guest, Heartbeat, OnHeartbeatLoss, Rhythm, Role,
    StopReason,
};

const UUID: [u8; 16] = *b"an example guest";
/// Set for the process that is the primary: the directory of the pair.
const PRIMARY: &str = "EXAMPLE_PRIMARY";
const LIMIT: Duration = Duration::from_secs(30);

/// COLO, as the heartbeat asks for it. In a VMM this is `colo_core::FailoverHandle`.
#[derive(Clone)]
struct Colo {
    has_begun: Arc<AtomicBool>,
    decided: Arc<Mutex<Sender<()>>>,
}

impl Colo {
    /// Returns COLO before its beginning, and what hears of the decision to go on alone.
    fn new() -> (Self, Receiver<()>) {
        let (decided, failover) = channel();
        let has_begun = Arc::default();
        let decided = Arc::new(Mutex::new(decided));
        (Self { has_begun, decided }, failover)
    }

    fn begins(&self, heartbeat: &Heartbeat) {
        heartbeat.colo_begins();
        self.has_begun.store(true, Ordering::Relaxed);
    }
}

impl Failover for Colo {
    fn state(&self) -> ColoState {
        if self.has_begun.load(Ordering::Relaxed) {
            ColoState::Within
        } else {
            ColoState::Outside
        }
    }

    fn request(&self) -> Result<(), Arc<dyn Error + Send + Sync>> {
        let sender = self.decided.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(()).map_err(|e| Arc::new(e) as _)
    }

    fn stop_for_good(&self) {}
}

/// The VMM's hold on its vCPUs.
struct Vcpus;

impl Guest for Vcpus {
    fn stop_for_good(&self, reason: StopReason) {
        println!("the guest stops for good: {reason}");
    }

    fn suspend(&self) {}

    fn resume(&self) {}
}

fn start(role: Role, dir: &Path, colo: Colo) -> Result<Heartbeat, Box<dyn Error>> {
    // Patient, for a host that is busy with other tests.
    let rhythm = Rhythm::new(role, UUID, OnHeartbeatLoss::Ask)?.missed(40);
    let lease = Duration::from_secs(3);
    let lock = dir.join("lock");
    let arbiter = LockFile::new(lock, UUID, Owner::new(rhythm.process), lease);
    let address = format!("unix:{}", dir.join("beats").display()).parse()?;
    let endpoint = match role {
        Role::Primary => Endpoint::Connect(address),
        Role::Secondary => Endpoint::Listen(address),
    };
    Ok(Heartbeat::start(
        rhythm,
        endpoint,
        colo,
        Box::new(arbiter),
        Arc::new(Vcpus),
    )?)
}

/// Waits until each side has heard the other.
fn connected(heartbeat: &Heartbeat) -> Result<(), Box<dyn Error>> {
    let begun = Instant::now();
    while !heartbeat.report().connected {
        if begun.elapsed() > LIMIT {
            return Err("the other side was not heard".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The primary: takes the lease, and lives until it is killed.
fn primary(dir: &Path) -> Result<(), Box<dyn Error>> {
    let (colo, _failover) = Colo::new();
    let heartbeat = start(Role::Primary, dir, colo.clone())?;
    connected(&heartbeat)?;
    heartbeat.hold(LIMIT, None)?;
    colo.begins(&heartbeat);
    println!("ready");
    loop {
        thread::park();
    }
}

/// A process that does not outlive its owner.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(dir) = std::env::var_os(PRIMARY) {
        return primary(dir.as_ref());
    }
    let dir = tempfile::tempdir()?;
    let (colo, failover) = Colo::new();
    let heartbeat = start(Role::Secondary, dir.path(), colo.clone())?;
    let mut command = Command::new(std::env::current_exe()?);
    let command = command.env(PRIMARY, dir.path()).stdout(Stdio::piped());
    let mut peer = Killed(command.spawn()?);
    let said = peer.0.stdout.take().ok_or("no output")?;
    let first = BufReader::new(said)
        .lines()
        .next()
        .ok_or("the primary has ended")??;
    assert_eq!(first, "ready");
    connected(&heartbeat)?;
    colo.begins(&heartbeat);
    assert!(failover.recv_timeout(Duration::from_millis(300)).is_err());

    let killed = Instant::now();
    drop(peer);
    failover.recv_timeout(LIMIT)?;
    println!("the secondary goes on alone after {:?}", killed.elapsed());
    heartbeat.colo_ended(ColoEnd::TookOver);
    assert_eq!(heartbeat.report().answer.as_deref(), Some("won"));
    Ok(())
}
