//! A guest under load for a long time, with checkpoints every 100 ms, while one side after the other
//! is killed and replaced.
//!
//! After every death exactly one guest runs, finds its memory sound, and counts on from no less than
//! the last complete checkpoint. Meanwhile the memory and the file descriptors of the processes that
//! survive stay what they were: a process that has outlived many peers has no more of either than one
//! that has outlived its first.
//!
//! That takes a quarter of a minute, with `COLO_ALL=1` a minute, and as many seconds as
//! `COLO_SOAK_SECONDS` says.

use std::collections::VecDeque;
use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::harness::{self, Needs};
use tests::resident::Resident;
use tests::succession::Succession;
use tests::vmm::{ColoVmm, Connection, LINE, Side, Vmm, check_count, first_line};
use tests::{Result, sample};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run([kvm(
        "guest_under_load_outlives_all_its_hosts_which_stay_as_they_are",
        soak,
    )])
}

/// Between two checkpoints, ms.
const DELAY: u32 = 100;
/// What the guest writes to in each pass, of [`MEMORY`] MiB.
const DIRTY_PAGES: u32 = 2560;
const MEMORY: u32 = 64;

/// How much more memory a process may have after many peers than after its first. What is left
/// between two looks is the allocator's, and pages of the guest and its cache that were not touched
/// before; the machine's own memory is counted in both.
const SLACK_KIB: u64 = (2 << 10) + HUGE_PAGE_KIB;
/// The system gives the guest's RAM one, or a page of 4 KiB if it has none just then.
const HUGE_PAGE_KIB: u64 = 2 << 10;

/// Who dies, in any order, again and again. The primary more rarely: a process that outlives many
/// secondaries is what shows a leak.
const VICTIMS: [Side; 3] = [Side::Primary, Side::Secondary, Side::Secondary];
/// Deaths that there are in any case.
const LEAST: usize = 2 * VICTIMS.len();

fn soak() -> Result<()> {
    let seconds = match std::env::var("COLO_SOAK_SECONDS") {
        Ok(number) => number.parse()?,
        Err(_) if sample::is_everything() => 60,
        Err(_) => 15,
    };
    let seed = sample::seed()?;
    let begun = Instant::now();
    let until = begun + Duration::from_secs(seconds);
    let mut tally = Tally::default();
    run(&mut sample::random("soak")?, until, &mut tally).map_err(|e| {
        let after = begun.elapsed().as_secs();
        format!(
            "after {after} s, {} deaths, seed {seed}: {e}",
            tally.deaths()
        )
    })?;
    println!("{}", tally.report(begun.elapsed()));
    tally.check()
}

fn run(random: &mut fastrand::Rng, until: Instant, tally: &mut Tally) -> Result<()> {
    let vmm = ColoVmm::new("colo-vmm")
        .memory(MEMORY)
        .dirty_pages(DIRTY_PAGES);
    let mut guest = Succession::begin(vmm, Connection::channels(2), DELAY)?;
    let mut count = Count::default();
    let mut peers = 0;
    let mut victims = Vec::new();
    while Instant::now() < until || tally.deaths() < LEAST {
        let death = Instant::now() + Duration::from_millis(random.u64(300..4000));
        while Instant::now() < death {
            count.look(&mut guest.primary)?;
            thread::sleep(Duration::from_millis(20));
        }
        // A side that stands by puts nothing out.
        let secondary = guest.secondary.as_mut().ok_or("no secondary")?;
        assert_eq!(secondary.output()?, b"");
        tally.checkpoints += guest.primary.checkpoints()?.len();
        if victims.is_empty() {
            victims.extend(VICTIMS);
            random.shuffle(&mut victims);
        }
        let victim = victims.pop().ok_or("no victim")?;
        let mut dead = guest.kill(victim)?;
        match victim {
            Side::Primary => {
                tally.primaries += 1;
                peers = 0;
                count.hear_last(&mut dead)?;
            }
            Side::Secondary => tally.secondaries += 1,
        }
        drop(dead);
        guest.go_on_alone()?;
        peers += 1;
        count.go_on(victim, &mut guest.primary)?;
        guest.rejoin()?;
        guest.primary.wait_checkpoints(3)?;
        tally.note(peers, Usage::of(&guest.primary)?);
    }
    Ok(())
}

/// What is known of how far the guest has counted.
#[derive(Default)]
struct Count {
    /// The byte of all that the guest has said at which the primary's output begins.
    begin: u64,
    /// Lines that had been said when so many checkpoints had been reported.
    marks: VecDeque<(u64, usize)>,
    /// Lines that the last complete checkpoint contains for certain.
    safe: u64,
}

impl Count {
    fn look(&mut self, primary: &mut Vmm) -> Result<()> {
        // In this order: the lines may be more than the checkpoint contains that comes next, never
        // more than the one after it.
        let reported = primary.checkpoints()?.len();
        self.reported(reported);
        let lines = (self.begin + primary.output()?.len() as u64) / LINE;
        let reported = primary.checkpoints()?.len();
        self.marks.push_back((lines, reported));
        Ok(())
    }

    fn reported(&mut self, checkpoints: usize) {
        while let Some((lines, at)) = self.marks.front().copied() {
            if at + 2 > checkpoints {
                break;
            }
            self.safe = lines;
            self.marks.pop_front();
        }
    }

    /// What the dead primary has reported, and said.
    fn hear_last(&mut self, dead: &mut Vmm) -> Result<()> {
        self.reported(dead.checkpoints()?.len());
        check_count(self.begin, &dead.output()?)?;
        Ok(())
    }

    /// The survivor's guest runs, alone, and from where it has to.
    fn go_on(&mut self, victim: Side, survivor: &mut Vmm) -> Result<()> {
        self.marks.clear();
        survivor.wait_lines(3)?;
        let output = survivor.output()?;
        if victim == Side::Primary {
            let (begin, line) = first_line(&output)?;
            if begin < self.safe * LINE {
                return Err(format!(
                    "the survivor begins before line {line}, the last checkpoint had {}",
                    self.safe
                )
                .into());
            }
            self.begin = begin;
        }
        check_count(self.begin, &output)?;
        let status = survivor.qmp.execute("query-colo-status", Value::Null)?;
        assert_eq!(status["mode"], "none");
        Ok(())
    }
}

/// What a process takes of its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    resident_kib: u64,
    descriptors: usize,
}

impl Usage {
    fn of(vmm: &Vmm) -> Result<Self> {
        let process = vmm.process.id();
        Ok(Self {
            resident_kib: Resident::of(process)?.total() >> 10,
            descriptors: fs::read_dir(format!("/proc/{process}/fd"))?.count(),
        })
    }
}

/// What has happened.
#[derive(Default)]
struct Tally {
    primaries: usize,
    secondaries: usize,
    checkpoints: usize,
    /// Primaries in COLO: how many peers the process had outlived, and what it took then.
    usages: Vec<(usize, Usage)>,
}

impl Tally {
    const fn deaths(&self) -> usize {
        self.primaries + self.secondaries
    }

    fn note(&mut self, peers: usize, usage: Usage) {
        self.usages.push((peers, usage));
    }

    /// The most that `of` is among processes that have outlived `peers`.
    fn most(&self, of: fn(&Usage) -> u64, peers: impl Fn(usize) -> bool) -> u64 {
        let these = self.usages.iter().filter(|(n, _)| peers(*n));
        these.map(|(_, usage)| of(usage)).max().unwrap_or(0)
    }

    fn report(&self, time: Duration) -> String {
        let rss = |usage: &Usage| usage.resident_kib;
        let fds = |usage: &Usage| usage.descriptors as u64;
        let oldest = self.usages.iter().map(|(n, _)| *n).max().unwrap_or(0);
        format!(
            "{} s, {} checkpoints, {} primaries and {} secondaries killed; a survivor of its first \
             peer has at most {} KiB and {} descriptors, one of more peers (up to {oldest}) {} KiB and {}",
            time.as_secs(),
            self.checkpoints,
            self.primaries,
            self.secondaries,
            self.most(rss, |n| n == 1),
            self.most(fds, |n| n == 1),
            self.most(rss, |n| n > 1),
            self.most(fds, |n| n > 1),
        )
    }

    fn check(&self) -> Result<()> {
        let rss = |usage: &Usage| usage.resident_kib;
        let fds = |usage: &Usage| usage.descriptors as u64;
        assert!(self.primaries > 0 && self.secondaries > 0, "too few deaths");
        // They have the same connections open, whatever has become of the earlier ones.
        let (first, later) = (self.most(fds, |n| n == 1), self.most(fds, |n| n > 1));
        if later > first {
            return Err(format!("file descriptors grow from {first} to {later}").into());
        }
        let (first, later) = (self.most(rss, |n| n == 1), self.most(rss, |n| n > 1));
        if later > first + SLACK_KIB {
            return Err(format!("memory grows from {first} to {later} KiB").into());
        }
        Ok(())
    }
}
