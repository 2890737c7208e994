//! What a measured pair of processes shows, and how it is measured.

use std::thread;
use std::time::{Duration, Instant};

use ::tests::Result;
use ::tests::process::Process;
use ::tests::vmm::LINE;
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
    fn is_vcpu(&self, thread: &str) -> bool;

    /// Has a pair whose guest runs alone begin, and waits until it is in COLO.
    fn enter(&mut self) -> Result<()>;

    /// Waits for the end of the next checkpoint that nobody has waited for yet.
    fn wait_checkpoint(&mut self) -> Result<()>;

    /// All checkpoints so far.
    fn checkpoints(&mut self) -> Result<Vec<Checkpoint>>;

    /// On the wire for one checkpoint in the mean, after `from`; `None` if too few were taken.
    fn bytes(&mut self, from: Duration) -> Result<Option<f64>>;
}

/// A pair whose guest runs alone still, and what is heard of it.
pub type Started = (Box<dyn Pair>, Line);

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
/// After a guest has first been heard.
const SETTLED: Duration = Duration::from_millis(500);
/// Less than from one checkpoint to the next.
const BEHIND: Duration = Duration::from_millis(20);

/// Brings a pair into COLO, and measures so many checkpoints.
pub fn measure((mut pair, line): Started, wanted: usize) -> Result<Sample> {
    pair.enter()?;
    for _ in 0..WARM_UP {
        pair.wait_checkpoint()?;
    }
    let (begun, all_before) = (Instant::now(), usage::whole_machine()?);
    let before = cpu_of(&*pair)?;
    for _ in 0..wanted {
        pair.wait_checkpoint()?;
    }
    let after = cpu_of(&*pair)?;
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

fn cpu_of(pair: &dyn Pair) -> Result<[CpuTime; 2]> {
    let [primary, secondary] = pair.processes();
    let of = |process: &Process| CpuTime::of(process.id(), |thread| pair.is_vcpu(thread));
    Ok([of(primary)?, of(secondary)?])
}

/// The guest's progress, passes a second: alone, and then under checkpoints, for `seconds` each.
pub fn measure_work(
    (mut pair, line): Started,
    interval: Duration,
    seconds: u32,
) -> Result<[f64; 2]> {
    let length = Duration::from_secs(seconds.into());
    let mark = || (Instant::now(), line.bytes());
    let passes = |(begun, before): (Instant, u64), (ended, after): (Instant, u64)| {
        (after - before) as f64 / LINE as f64 / (ended - begun).as_secs_f64()
    };
    // It has just begun, with pages that it touches for the first time.
    thread::sleep(SETTLED);
    let begun = mark();
    thread::sleep(length);
    let alone = passes(begun, mark());
    pair.enter()?;
    for _ in 0..WARM_UP {
        pair.wait_checkpoint()?;
    }
    // One whose end is heard when it comes: there may be others of which nobody has heard yet.
    loop {
        let asked = Instant::now();
        pair.wait_checkpoint()?;
        if asked.elapsed() > interval / 4 {
            break;
        }
    }
    let begun = mark();
    // Whole intervals, so that each has its checkpoint.
    while begun.0.elapsed() + interval / 2 < length {
        pair.wait_checkpoint()?;
    }
    Ok([alone, passes(begun, mark())])
}
