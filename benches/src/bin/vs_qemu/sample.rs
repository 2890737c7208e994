//! What a measured pair of processes shows, and how it is measured.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use ::tests::Result;
use ::tests::process::Process;
use benches::usage::{self, CpuTime, Resident};

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
    /// How many CPUs had others to run meanwhile, this process included: what disturbs.
    pub others: f64,
}

/// The first checkpoints are slow: what they touch is touched for the first time.
const WARM_UP: usize = 2;
/// Less than from one checkpoint to the next.
const BEHIND: Duration = Duration::from_millis(20);

/// Measures so many checkpoints of a pair that is in COLO.
pub fn measure<P: Pair>(mut pair: P, line: Line, wanted: usize, is_pinned: bool) -> Result<Sample> {
    if is_pinned {
        for (process, half) in pair.processes().into_iter().zip(halves()?) {
            usage::pin(process.id(), &half)?;
        }
    }
    for _ in 0..WARM_UP {
        pair.wait_checkpoint()?;
    }
    let (begun, all_before) = (Instant::now(), usage::whole_machine()?);
    let before = cpu_of(&pair)?;
    for _ in 0..wanted {
        pair.wait_checkpoint()?;
    }
    let after = cpu_of(&pair)?;
    let all = usage::whole_machine()?.saturating_sub(all_before);
    let cpu = [0, 1].map(|side: usize| after[side].since(before[side]));
    let others = all.saturating_sub(cpu[0].total + cpu[1].total);
    let others = others.div_duration_f64(begun.elapsed());
    let [_, secondary] = pair.processes();
    let memory = Resident::of(secondary.id())?;
    // The trace of an end may be behind its event, and what the guest says behind both.
    thread::sleep(BEHIND);
    let to = now();
    line.wait(to)?;
    let mut checkpoints = pair.checkpoints()?;
    checkpoints.retain(|checkpoint| checkpoint.ended < to);
    let first = checkpoints.len().checked_sub(wanted);
    let last_before = first.and_then(|first| checkpoints.get(first.checked_sub(1)?));
    let from = last_before.ok_or_else(|| {
        let known = checkpoints.len();
        format!("of {wanted} checkpoints and one before {known} are known")
    })?;
    let from = from.ended;
    checkpoints.drain(..checkpoints.len() - wanted);
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
        cpu,
        memory,
        others,
    })
}

/// The machine's CPUs, for two hosts that do not share one.
fn halves() -> Result<[Range<usize>; 2]> {
    match thread::available_parallelism()?.get() / 2 {
        0 => Err("needs two CPUs to give each side its own".into()),
        half => Ok([0..half, half..2 * half]),
    }
}

fn cpu_of<P: Pair>(pair: &P) -> Result<[CpuTime; 2]> {
    let [primary, secondary] = pair.processes();
    let of = |process: &Process| CpuTime::of(process.id(), P::is_vcpu);
    Ok([of(primary)?, of(secondary)?])
}
