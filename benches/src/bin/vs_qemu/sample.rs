//! What a measured pair of processes shows, and how it is measured.

use std::thread;
use std::time::Duration;

use ::tests::Result;
use ::tests::process::Process;
use benches::usage::{CpuTime, Resident};

use crate::serial::{Line, Stalls, now};

/// One checkpoint, as the primary saw it. The parts follow each other and make up the pause.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// When it was complete, since the epoch.
    pub ended: Duration,
    /// How long the guest stood still.
    pub pause: Duration,
    /// From the stop until the secondary has everything.
    pub transfer: Duration,
    /// From then until the secondary has put it in place.
    pub load: Duration,
    /// From then until the guest runs.
    pub resume: Duration,
    /// Pages that were sent.
    pub dirty_pages: u64,
    /// On the wire, if that is known of each.
    pub bytes: Option<u64>,
    /// Finer steps of both sides by their names.
    pub steps: Vec<(String, Duration)>,
}

/// A primary and a secondary in COLO.
pub trait Pair {
    /// Both, the primary first.
    fn processes(&self) -> [&Process; 2];

    /// Whether a thread of this name runs a vCPU.
    fn is_vcpu(thread: &str) -> bool;

    /// Waits for the end of the next checkpoint that nobody has waited for yet.
    fn wait_checkpoint(&mut self) -> Result<()>;

    /// All checkpoints so far.
    fn checkpoints(&mut self) -> Result<Vec<Checkpoint>>;

    /// On the wire for one checkpoint in the mean, after `from`; `None` if too few were taken.
    fn bytes(&mut self, from: Duration) -> Result<Option<f64>>;
}

/// What a run of one pair has shown.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// The checkpoints.
    pub checkpoints: Vec<Checkpoint>,
    /// For each the longest silence of the guest.
    pub stalls: Vec<Duration>,
    /// The usual one.
    pub usual_gap: Duration,
    /// Bytes on the wire for one checkpoint.
    pub bytes: Option<f64>,
    /// CPU time of both sides.
    pub cpu: [CpuTime; 2],
    /// Memory of the secondary.
    pub memory: Resident,
}

/// The first checkpoints are slow: what they touch is touched for the first time.
const WARM_UP: usize = 2;
/// The trace of an end may be that far behind its event; far less than from one checkpoint to the next.
const BEHIND: Duration = Duration::from_millis(5);

/// Measures so many checkpoints of a pair that is in COLO.
pub fn measure<P: Pair>(mut pair: P, line: Line, wanted: usize) -> Result<Sample> {
    for _ in 0..WARM_UP {
        pair.wait_checkpoint()?;
    }
    thread::sleep(BEHIND);
    let (from, before) = (now(), cpu(&pair)?);
    for _ in 0..wanted {
        pair.wait_checkpoint()?;
    }
    thread::sleep(BEHIND);
    let (to, after) = (now(), cpu(&pair)?);
    let [_, secondary] = pair.processes();
    let memory = Resident::of(secondary.id())?;
    line.wait(to)?;
    let mut checkpoints = pair.checkpoints()?;
    checkpoints.retain(|checkpoint| (from..to).contains(&checkpoint.ended));
    if checkpoints.len() != wanted {
        let what = format!("{} checkpoints of {wanted} are known", checkpoints.len());
        return Err(what.into());
    }
    let ends: Vec<_> = checkpoints.iter().map(|c| c.ended).collect();
    let stalls = Stalls::of(&line.finish()?, from, &ends);
    let each: Option<u64> = checkpoints.iter().map(|c| c.bytes).sum();
    let bytes = match each {
        Some(bytes) => Some(bytes as f64 / wanted as f64),
        None => pair.bytes(from)?,
    };
    Ok(Sample {
        checkpoints,
        stalls: stalls.longest,
        usual_gap: stalls.usual,
        bytes,
        cpu: [0, 1].map(|side: usize| after[side].since(before[side])),
        memory,
    })
}

fn cpu<P: Pair>(pair: &P) -> Result<[CpuTime; 2]> {
    let [primary, secondary] = pair.processes();
    let of = |process: &Process| CpuTime::of(process.id(), P::is_vcpu);
    Ok([of(primary)?, of(secondary)?])
}
