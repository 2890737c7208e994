//! What was measured: as a table, as JSON, and drawn.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use benches::chart::{self, Bar, Group, Series};
use benches::host::Host;
use colo_vmm::demo::Spread;
use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::sample::Sample;
use crate::yardstick::Yardstick;

/// The name of our pair among those of QEMU's machines.
pub const OURS: &str = "colo-vmm";

/// The name of a pair whose primary is a QEMU of this machine.
pub fn name(machine: &str, is_standby: bool) -> String {
    if is_standby {
        format!("{machine} to standby")
    } else {
        machine.to_owned()
    }
}

/// All there is to show.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured.
    pub host: Host,
    /// Whose QEMU it was.
    pub qemu: Option<String>,
    /// One for each case.
    pub rows: Vec<Row>,
}

/// One case.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// The case.
    pub case: Case,
    /// Further options of our sides.
    pub colo_options: Vec<String>,
    /// By [`name`], or [`OURS`].
    pub pairs: BTreeMap<String, Figures>,
    /// What the machine itself makes of our median pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yardstick: Option<Yardstick>,
}

/// What one pair has shown in one case. Times are milliseconds.
#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Every pause.
    pub pauses_ms: Vec<f64>,
    /// The longest silence of the guest's serial line around each checkpoint.
    pub stalls_ms: Vec<f64>,
    /// How long the primary's guest stood still.
    pub pause_ms: Spread,
    /// From the stop until the secondary had everything.
    pub transfer_ms: Spread,
    /// Until it had put it in place.
    pub load_ms: Spread,
    /// Until the guest ran.
    pub resume_ms: Spread,
    /// How long its client heard nothing.
    pub stall_ms: Spread,
    /// The usual silence: the time of one pass of the guest.
    pub usual_gap_ms: f64,
    /// Pages that were sent for a checkpoint.
    pub sent_pages: Spread,
    /// On the wire for a checkpoint, in the mean.
    pub bytes: Option<f64>,
    /// CPU time for a checkpoint and the time before it, in the mean.
    pub cpu: Cpu,
    /// Memory of the secondary.
    pub memory: Memory,
    /// How many CPUs others took meanwhile, in the run in which that was most: a figure that was
    /// disturbed says nothing.
    pub others_cpus: f64,
    /// The steps of both sides.
    pub steps: BTreeMap<String, Spread>,
}

/// CPU time for one checkpoint and the guest's work between two, in the mean.
#[derive(Debug, Serialize, Deserialize)]
pub struct Cpu {
    /// All of the primary.
    pub primary_ms: f64,
    /// All of the secondary.
    pub secondary_ms: f64,
    /// Of the primary without the threads that run a vCPU.
    pub primary_without_guest_ms: f64,
    /// Of the secondary without them.
    pub secondary_without_guest_ms: f64,
    /// Seconds of both sides for 10^9 bytes on the wire.
    pub s_per_gb: Option<f64>,
    /// The same without the threads that run a vCPU.
    pub s_per_gb_without_guest: Option<f64>,
}

/// Resident memory of the secondary's process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memory {
    /// `VmHWM`, bytes.
    pub peak: u64,
    /// `Pss` behind the last checkpoint, bytes.
    pub proportional: u64,
    /// The first over guest RAM.
    pub peak_over_ram: f64,
}

const fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Figures {
    /// Those of several runs; `None` without a checkpoint.
    pub fn of(samples: &[Sample], case: &Case) -> Option<Self> {
        let checkpoints = || samples.iter().flat_map(|s| &s.checkpoints);
        let spread = |part: fn(&crate::sample::Checkpoint) -> Duration| {
            Spread::of(checkpoints().map(|c| ms(part(c))))
        };
        let mut steps = BTreeMap::<_, Vec<f64>>::new();
        for (name, time) in checkpoints().flat_map(|c| &c.steps) {
            steps.entry(name.clone()).or_default().push(ms(*time));
        }
        let steps = steps
            .into_iter()
            .filter_map(|(name, times)| Some((name, Spread::of(times)?)));
        let runs = samples.len() as f64;
        let bytes: Option<f64> = samples.iter().map(|s| s.bytes).sum();
        let gaps = Spread::of(samples.iter().map(|s| ms(s.usual_gap)))?;
        let stalls: Vec<f64> = (samples.iter().flat_map(|s| &s.stalls).copied())
            .map(ms)
            .collect();
        Some(Self {
            pauses_ms: checkpoints().map(|c| ms(c.pause)).collect(),
            pause_ms: spread(|c| c.pause)?,
            transfer_ms: spread(|c| c.transfer)?,
            load_ms: spread(|c| c.load)?,
            resume_ms: spread(|c| c.resume)?,
            stall_ms: Spread::of(stalls.iter().copied())?,
            stalls_ms: stalls,
            usual_gap_ms: gaps.p50,
            sent_pages: Spread::of_counts(checkpoints().map(|c| c.dirty_pages))?,
            bytes: bytes.map(|bytes| bytes / runs),
            cpu: Cpu::of(
                samples,
                checkpoints().count(),
                bytes.map(|bytes| bytes / runs),
            ),
            memory: Memory::of(samples, case),
            others_cpus: samples.iter().map(|s| s.others).fold(0.0, f64::max),
            steps: steps.collect(),
        })
    }
}

impl Cpu {
    fn of(samples: &[Sample], checkpoints: usize, bytes: Option<f64>) -> Self {
        let each = |side: usize, time: fn(benches::usage::CpuTime) -> Duration| {
            let all: Duration = samples.iter().map(|s| time(s.cpu[side])).sum();
            ms(all) / checkpoints as f64
        };
        let without_guest = |side| each(side, |cpu| cpu.total.saturating_sub(cpu.vcpus));
        let primary_ms = each(0, |cpu| cpu.total);
        let secondary_ms = each(1, |cpu| cpu.total);
        let (primary_without_guest_ms, secondary_without_guest_ms) =
            (without_guest(0), without_guest(1));
        // Seconds for 10^9 bytes are nanoseconds for a byte.
        let per_gb = |ms: f64| bytes.filter(|b| *b > 0.0).map(|bytes| ms * 1e6 / bytes);
        Self {
            primary_ms,
            secondary_ms,
            primary_without_guest_ms,
            secondary_without_guest_ms,
            s_per_gb: per_gb(primary_ms + secondary_ms),
            s_per_gb_without_guest: per_gb(primary_without_guest_ms + secondary_without_guest_ms),
        }
    }
}

impl Memory {
    fn of(samples: &[Sample], case: &Case) -> Self {
        let most = |bytes: fn(&Sample) -> u64| samples.iter().map(bytes).max().unwrap_or(0);
        let peak = most(|s| s.memory.peak);
        Self {
            peak,
            proportional: most(|s| s.memory.proportional),
            peak_over_ram: peak as f64 / (f64::from(case.memory_mib) * f64::from(1 << 20)),
        }
    }
}

impl Report {
    /// Takes a row in; one of the same case makes way, for those who are measured anew.
    pub fn add(&mut self, new: Row) {
        let is_same = |row: &&mut Row| row.case == new.case && row.colo_options == new.colo_options;
        match self.rows.iter_mut().find(is_same) {
            Some(row) => {
                row.pairs.extend(new.pairs);
                row.yardstick = new.yardstick.or(row.yardstick.take());
            }
            None => self.rows.push(new),
        }
    }

    /// The JSON object.
    pub fn json(&self) -> serde_json::Result<String> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text)
    }

    /// Bars of the median pause, each with a line as far as p99.
    pub fn svg(&self) -> String {
        const COLOURS: [&str; 5] = ["#1b4f72", "#9aa0a6", "#d5b27f", "#7fb3d5", "#77aa77"];
        let mut names: Vec<&str> = vec![OURS];
        for name in self.rows.iter().flat_map(|row| row.pairs.keys()) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let titles: Vec<_> = names.iter().map(|name| title(name)).collect();
        let series: Vec<_> = (titles.iter().zip(COLOURS.iter().cycle()))
            .map(|(name, colour)| Series { name, colour })
            .collect();
        let group = |row: &Row| {
            let bars = row.pairs.iter().map(|(name, figures)| {
                let Spread { p50, p99, .. } = figures.pause_ms;
                Bar {
                    series: names.iter().position(|n| n == name).unwrap_or(0),
                    value: p50,
                    reaches: Some(p99),
                    text: format!("{p50:.1} ms, p99 {p99:.1}"),
                }
            });
            Group {
                label: label(row),
                bars: bars.collect(),
            }
        };
        let groups: Vec<_> = self.rows.iter().map(group).collect();
        chart::bars(&series, &groups)
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut table = String::from(HEAD);
        // Writing to a string cannot fail.
        for row in &self.rows {
            let _ = write!(table, "{}", row.lines());
        }
        table
    }
}

/// How a pair is called in the drawing and the table.
fn title(name: &str) -> String {
    if name == OURS {
        name.to_owned()
    } else {
        format!("QEMU {name}")
    }
}

fn label(row: &Row) -> String {
    let mut label = row.case.to_string();
    for option in &row.colo_options {
        label.push(' ');
        label.push_str(option);
    }
    label
}

/// Above the lines of [`Row::lines`].
pub const HEAD: &str = "\
| case | pair | pages sent | pause mean | p50 | p99 | max | transfer | load | resume | stall p50 | max | usual gap \
| MB | others' CPUs | CPU ms | without guest | s/GB | memory/RAM | ours over it: pause p50 | p99 | stall | CPU |\n\
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";

impl Row {
    /// A line for each pair: what it has shown, and how much of that ours needs.
    pub fn lines(&self) -> String {
        let mut lines = String::new();
        let ours = self.pairs.get(OURS);
        for (name, figures) in &self.pairs {
            let pause = figures.pause_ms;
            let none = || "-".to_owned();
            let cpu = &figures.cpu;
            let _ = write!(
                lines,
                "| {} | {} | {:.0} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} \
                 | {} | {:.2} | {:.1} | {:.1} | {} | {:.2} |",
                label(self),
                title(name),
                figures.sent_pages.p50,
                pause.mean,
                pause.p50,
                pause.p99,
                pause.max,
                figures.transfer_ms.p50,
                figures.load_ms.p50,
                figures.resume_ms.p50,
                figures.stall_ms.p50,
                figures.stall_ms.max,
                figures.usual_gap_ms,
                figures
                    .bytes
                    .map_or_else(none, |b| format!("{:.2}", b / 1e6)),
                figures.others_cpus,
                cpu.primary_ms + cpu.secondary_ms,
                cpu.primary_without_guest_ms + cpu.secondary_without_guest_ms,
                (cpu.s_per_gb_without_guest).map_or_else(none, |s| format!("{s:.2}")),
                figures.memory.peak_over_ram,
            );
            let ratios = ours
                .filter(|_| name != OURS)
                .map(|ours| ratios(ours, figures));
            match ratios {
                Some([pause, p99, stall, cpu]) => {
                    let _ = writeln!(
                        lines,
                        " **{pause:.3}** | {p99:.3} | {stall:.3} | {cpu:.3} |"
                    );
                }
                None => lines.push_str(" | | | |\n"),
            }
        }
        if let Some(Yardstick { wakes, time_ms, .. }) = &self.yardstick {
            let _ = writeln!(
                lines,
                "| {} | the machine, {wakes} wakes | | {:.1} | {:.1} | {:.1} | {:.1} | | | | | | | | | | | | | | | | |",
                label(self),
                time_ms.mean,
                time_ms.p50,
                time_ms.p99,
                time_ms.max,
            );
        }
        lines
    }
}

/// Ours over theirs: median and p99 of the pause, median of the stall, CPU time besides the guests'.
fn ratios(ours: &Figures, theirs: &Figures) -> [f64; 4] {
    let cpu = |f: &Figures| f.cpu.primary_without_guest_ms + f.cpu.secondary_without_guest_ms;
    [
        |f: &Figures| f.pause_ms.p50,
        |f: &Figures| f.pause_ms.p99,
        |f: &Figures| f.stall_ms.p50,
        cpu,
    ]
    .map(|of| of(ours) / of(theirs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::Checkpoint;
    use benches::connection::{Transport, Way};

    fn case() -> Case {
        Case {
            transport: Transport::Unix,
            way: Way::Multifd2,
            dirty_pages: 256,
            memory_mib: 256,
            is_filled: true,
            pass_delay: 0,
            delay_ms: 200,
            is_pinned: false,
        }
    }

    fn figures(pauses: [u64; 3]) -> Figures {
        let checkpoint = |pause| Checkpoint {
            pause: Duration::from_millis(pause),
            steps: vec![("flush".to_owned(), Duration::from_millis(1))],
            ..Checkpoint::default()
        };
        let sample = Sample {
            checkpoints: pauses.map(checkpoint).to_vec(),
            stalls: pauses.map(|p| Duration::from_millis(p + 1)).to_vec(),
            bytes: Some(2e6),
            cpu: [benches::usage::CpuTime {
                total: Duration::from_millis(90),
                vcpus: Duration::from_millis(60),
            }; 2],
            memory: benches::usage::Resident {
                peak: 512 << 20,
                proportional: 0,
            },
            ..Sample::default()
        };
        Figures::of(&[sample], &case()).unwrap()
    }

    fn report() -> Report {
        let row = |name: &str, pauses| Row {
            case: case(),
            colo_options: Vec::new(),
            pairs: [(name.to_owned(), figures(pauses))].into(),
            yardstick: None,
        };
        let mut report = Report {
            host: Host::this(),
            qemu: None,
            rows: Vec::new(),
        };
        report.add(row(OURS, [1, 1, 9]));
        report.add(row("pc", [1, 4, 9]));
        report.add(row(OURS, [1, 2, 9]));
        report
    }

    #[test]
    fn cpu_time_and_memory_are_put_beside_what_was_done() {
        let Figures { cpu, memory, .. } = figures([1, 2, 3]);
        assert_eq!((cpu.primary_ms, cpu.primary_without_guest_ms), (30.0, 10.0));
        assert_eq!(cpu.s_per_gb, Some(30.0));
        assert_eq!(cpu.s_per_gb_without_guest, Some(10.0));
        assert_eq!(memory.peak_over_ram, 2.0);
    }

    #[test]
    fn pairs_of_one_case_share_a_row_and_the_later_figures_count() {
        let report = report();
        assert_eq!(report.rows.len(), 1);
        let lines = report.rows[0].lines();
        let (ours, theirs) = lines.split_once('\n').unwrap();
        assert!(ours.contains("| colo-vmm |"), "{ours}");
        assert!(
            theirs.contains(" **0.500** | 1.000 | 0.600 | 1.000 |"),
            "{theirs}"
        );
        let columns = |line: &str| line.matches('|').count();
        for line in HEAD.lines().chain(lines.lines()) {
            assert_eq!(columns(line), columns(ours), "{line}");
        }
    }

    #[test]
    fn what_was_written_can_be_added_to() {
        let report = report();
        let text = report.json().unwrap();
        let read: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(read.json().unwrap(), text);
        let drawing = read.svg();
        for name in ["colo-vmm", "QEMU pc", "unix multifd-2 256 pages"] {
            assert!(drawing.contains(name), "{name}");
        }
    }
}
