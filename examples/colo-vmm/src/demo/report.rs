//! What the demo has to show: figures, as a table for people and as JSON for programs.
//!
//! The JSON object has the fields of [`Report`], named as here. Times are milliseconds (`_ms`),
//! sizes bytes (`_bytes`) unless the name says MiB, throughput is 10^6 bytes a second.

use std::fmt::{self, Write as _};

use qmp_types::ColoCheckpoint;
use serde::Serialize;

use super::figures::Spread;
use super::proof::Proof;
use super::side::Role;

/// All there is to show.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was run.
    pub setup: Setup,
    /// Until COLO.
    pub precopy: Precopy,
    /// The checkpoints.
    pub checkpoints: Checkpoints,
    /// How one side went on alone; `null` if nobody was killed.
    pub failover: Option<Failover>,
    /// Whether the guest lost anything.
    pub proof: Proof,
    /// `pass` if the proof has no violation.
    pub verdict: Verdict,
}

/// What was run.
#[derive(Debug, Serialize)]
pub struct Setup {
    /// `kvm` or `sim`.
    pub machine: &'static str,
    /// Guest RAM, MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Pages that each vCPU dirties again and again.
    pub dirty_pages: u32,
    /// `tcp` or `unix`.
    pub transport: String,
    /// Number of multifd channels; 0: everything on one connection.
    pub multifd_channels: u8,
    /// `none` or `zstd`.
    pub compression: String,
    /// Between two checkpoints.
    pub checkpoint_delay_ms: u32,
    /// When the guest ran again in a checkpoint: when it was `loaded`, `received` or `copied`, its output
    /// held until that had arrived.
    pub resume: String,
    /// What may be sent between checkpoints, MiB a second, 0 for no limit; `null` if nothing is.
    pub gap_bandwidth_mib: Option<u64>,
    /// Whether both sides hashed RAM and device state at every checkpoint, which takes its time.
    pub verify: bool,
}

/// Until COLO.
#[derive(Debug, Serialize)]
pub struct Precopy {
    /// From the command `migrate` until the primary says that it is in COLO.
    pub total_ms: f64,
    /// On the wire, all channels.
    pub wire_bytes: u64,
    /// Those bytes in that time, 10^6 bytes a second.
    pub throughput_mb_s: f64,
    /// Guest RAM.
    pub guest_bytes: u64,
    /// How often the dirty log was read.
    pub passes: u64,
}

/// The checkpoints that both sides have told of.
#[derive(Debug, Serialize)]
pub struct Checkpoints {
    /// How many the primary has told of.
    pub primary: u64,
    /// How many the secondary has told of.
    pub secondary: u64,
    /// How long the primary's guest stood still.
    pub pause_ms: Option<Spread>,
    /// How long RAM and device state took to leave.
    pub transfer_ms: Option<Spread>,
    /// From the primary's guest standing still until the secondary had loaded the checkpoint.
    pub loaded_ms: Option<Spread>,
    /// How long the secondary's guest stood still.
    pub secondary_pause_ms: Option<Spread>,
    /// RAM on the wire, with its headers.
    pub ram_bytes: Option<Spread>,
    /// Pages that were sent ahead of the checkpoint.
    pub ahead_pages: Option<Spread>,
    /// Pages on the wire within it.
    pub dirty_pages: Option<Spread>,
    /// Pages the secondary copied from its cache: those that either side had dirtied.
    pub flushed_pages: Option<Spread>,
    /// Device state on the wire.
    pub device_bytes: Option<Spread>,
    /// The primary's steps in order.
    pub primary_steps: Vec<StepMean>,
    /// The secondary's steps in order.
    pub secondary_steps: Vec<StepMean>,
}

/// What one step takes.
#[derive(Debug, PartialEq, Serialize)]
pub struct StepMean {
    /// The step.
    pub step: String,
    /// Its mean over all checkpoints of the side; a checkpoint without it counts as 0.
    pub mean_ms: f64,
}

/// How one side went on alone.
#[derive(Debug, Serialize)]
pub struct Failover {
    /// Who was killed.
    pub killed: Role,
    /// From the kill until the survivor said that it had lost the other side.
    pub noticed_ms: f64,
    /// From the kill until the survivor had said that the failover is complete and its guest runs.
    pub completed_ms: f64,
    /// From the kill to the first output of the survivor's guest: of the secondary, its first byte
    /// at all; of the primary, its first byte after it had noticed the loss, since until then it
    /// prints as if nothing had happened.
    pub first_output_ms: f64,
}

/// The result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The guest lost nothing.
    Pass,
    /// It did.
    Fail,
}

fn us_to_ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

impl Checkpoints {
    /// The figures of both sides' reports.
    pub fn of(primary: &[ColoCheckpoint], secondary: &[ColoCheckpoint]) -> Self {
        let counts =
            |field: fn(&ColoCheckpoint) -> u64| Spread::of_counts(primary.iter().map(field));
        let times = |side: &[ColoCheckpoint], field: fn(&ColoCheckpoint) -> u64| {
            Spread::of(side.iter().map(field).map(us_to_ms))
        };
        Self {
            primary: primary.len() as u64,
            secondary: secondary.len() as u64,
            pause_ms: times(primary, |report| report.pause_us),
            transfer_ms: times(primary, |report| report.transfer_us),
            loaded_ms: times(primary, |report| report.loaded_us),
            secondary_pause_ms: times(secondary, |report| report.pause_us),
            ram_bytes: counts(|report| report.ram_bytes),
            ahead_pages: counts(|report| report.ahead_pages),
            dirty_pages: counts(|report| report.dirty_pages),
            flushed_pages: Spread::of_counts(secondary.iter().map(|report| report.flushed_pages)),
            device_bytes: counts(|report| report.device_bytes),
            primary_steps: step_means(primary),
            secondary_steps: step_means(secondary),
        }
    }
}

fn step_means(reports: &[ColoCheckpoint]) -> Vec<StepMean> {
    let mut means: Vec<StepMean> = Vec::new();
    for taken in reports.iter().flat_map(|report| &report.steps) {
        let share = us_to_ms(taken.us) / reports.len() as f64;
        match means.iter_mut().find(|mean| mean.step == taken.step) {
            Some(mean) => mean.mean_ms += share,
            None => means.push(StepMean {
                step: taken.step.clone(),
                mean_ms: share,
            }),
        }
    }
    means
}

/// Width of the first column.
const LABEL: usize = 30;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.setup)?;
        self.precopy.table(f)?;
        self.checkpoints.table(f)?;
        if let Some(failover) = &self.failover {
            failover.table(f)?;
        }
        self.proof.table(f, self.setup.verify)?;
        match (self.verdict, &self.failover) {
            (Verdict::Fail, _) => f.write_str("FAILED: the guest was not carried on intact"),
            (Verdict::Pass, None) => f.write_str("passed: the pair stayed in step"),
            (Verdict::Pass, Some(failover)) => write!(
                f,
                "passed: the {} was killed, and the guest lost nothing",
                failover.killed
            ),
        }
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.vcpus == 1 { "" } else { "s" };
        write!(
            f,
            "{} guest: {} MiB, {} vCPU{plural}, {} dirty pages; over {}, ",
            if self.machine == "sim" {
                "simulated"
            } else {
                "KVM"
            },
            self.memory_mib,
            self.vcpus,
            self.dirty_pages,
            self.transport,
        )?;
        match self.multifd_channels {
            0 => f.write_str("one connection")?,
            channels => write!(
                f,
                "{channels} multifd channels, compression {}",
                self.compression
            )?,
        }
        write!(f, "; a checkpoint every {} ms", self.checkpoint_delay_ms)?;
        match self.gap_bandwidth_mib {
            None => {}
            Some(0) => f.write_str(", pages sent between them")?,
            Some(mib) => write!(f, ", pages sent between them at {mib} MiB/s")?,
        }
        if self.resume != "loaded" {
            write!(f, ", resumed when {}", self.resume)?;
        }
        if self.verify {
            f.write_str(", verified (pauses include the hashing)")?;
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, label: &str, text: impl fmt::Display) -> fmt::Result {
    writeln!(f, "{label:LABEL$}{text}")
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

impl Precopy {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        line(
            f,
            "precopy",
            format_args!(
                "{:.0} ms, {} passes over {} of guest memory",
                self.total_ms,
                self.passes,
                megabytes(self.guest_bytes)
            ),
        )?;
        line(
            f,
            "on the wire",
            format_args!(
                "{}, {:.1} MB/s\n",
                megabytes(self.wire_bytes),
                self.throughput_mb_s
            ),
        )
    }
}

impl Checkpoints {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = format!(
            "checkpoints: {} primary, {} secondary",
            self.primary, self.secondary
        );
        writeln!(
            f,
            "{counts:LABEL$}  {:>12}{:>12}{:>12}{:>12}",
            "mean", "p50", "p99", "max"
        )?;
        for (label, spread, decimals) in [
            ("  pause of the primary, ms", self.pause_ms, 2),
            ("  transfer, ms", self.transfer_ms, 2),
            ("  stop until loaded, ms", self.loaded_ms, 2),
            ("  pause of the secondary, ms", self.secondary_pause_ms, 2),
            ("  RAM, bytes", self.ram_bytes, 0),
            ("  pages sent ahead", self.ahead_pages, 0),
            ("  dirty pages", self.dirty_pages, 0),
            ("  flushed pages", self.flushed_pages, 0),
            ("  device state, bytes", self.device_bytes, 0),
        ] {
            let Some(spread) = spread else { continue };
            let mut row = format!("{label:width$}", width = counts.len().max(LABEL) + 2);
            for value in [spread.mean, spread.p50, spread.p99, spread.max] {
                write!(row, "{value:>12.decimals$}")?;
            }
            writeln!(f, "{row}")?;
        }
        for (label, steps) in [
            ("steps of the primary, mean ms", &self.primary_steps),
            ("steps of the secondary, mean ms", &self.secondary_steps),
        ] {
            if steps.is_empty() {
                continue;
            }
            writeln!(f, "\n{label}")?;
            let width = counts.len().max(LABEL) + 2;
            // Steps that have nothing to do would only hide the others.
            for step in steps.iter().filter(|step| step.mean_ms >= 0.0005) {
                let name = format!("  {}", step.step);
                writeln!(f, "{name:width$}{:>12.3}", step.mean_ms)?;
            }
        }
        writeln!(f)
    }
}

impl Failover {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "failover, ms since the {} was killed", self.killed)?;
        for (label, ms) in [
            ("  loss noticed", self.noticed_ms),
            ("  first output of survivor", self.first_output_ms),
            ("  failover complete", self.completed_ms),
        ] {
            line(f, label, format_args!("{ms:.2}"))?;
        }
        writeln!(f)
    }
}

impl Proof {
    fn table(&self, f: &mut fmt::Formatter<'_>, verified: bool) -> fmt::Result {
        let lines = format!(
            "{} of the primary, {} of the secondary",
            self.primary_lines, self.secondary_lines
        );
        line(f, "counter lines", lines)?;
        if let Some(cut) = self.cut_bytes {
            line(
                f,
                "lines of the guest",
                format_args!(
                    "{}: the primary's first {cut} bytes, then the secondary's",
                    self.guest_lines
                ),
            )?;
            line(f, "lines printed twice", self.repeated_lines)?;
        }
        if verified {
            line(f, "checkpoints with equal hashes", self.equal_hashes)?;
        }
        writeln!(f)?;
        for violation in &self.violations {
            writeln!(f, "violation: {violation}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use qmp_types::{ColoCheckpointStep, ColoMode};

    use super::super::proof::Violation;
    use super::*;

    fn checkpoint(pause_us: u64, steps: &[(&str, u64)]) -> ColoCheckpoint {
        ColoCheckpoint {
            mode: ColoMode::Primary,
            checkpoint: 1,
            pause_us,
            transfer_us: pause_us / 2,
            loaded_us: pause_us + 500,
            ahead_pages: 3,
            compared_pages: 0,
            unchanged_pages: 0,
            ram_bytes: 1000,
            dirty_pages: 5,
            flushed_pages: 7,
            device_bytes: 300,
            steps: steps
                .iter()
                .map(|&(step, us)| ColoCheckpointStep {
                    step: step.to_owned(),
                    us,
                })
                .collect(),
            serial_bytes: 0,
            ram_hash: None,
            device_hash: None,
        }
    }

    fn report() -> Report {
        let primary = [
            checkpoint(4000, &[("stop-vm", 1000), ("send-ram", 2000)]),
            checkpoint(
                8000,
                &[("stop-vm", 2000), ("send-ram", 5000), ("nothing", 0)],
            ),
        ];
        let secondary = [checkpoint(3000, &[("flush", 1500)])];
        Report {
            setup: Setup {
                machine: "kvm",
                memory_mib: 256,
                vcpus: 1,
                dirty_pages: 2560,
                transport: "tcp".to_owned(),
                multifd_channels: 2,
                compression: "zstd".to_owned(),
                checkpoint_delay_ms: 200,
                resume: "copied".to_owned(),
                gap_bandwidth_mib: Some(64),
                verify: true,
            },
            precopy: Precopy {
                total_ms: 100.0,
                wire_bytes: 11_000_000,
                throughput_mb_s: 110.0,
                guest_bytes: 256 << 20,
                passes: 3,
            },
            checkpoints: Checkpoints::of(&primary, &secondary),
            failover: Some(Failover {
                killed: Role::Primary,
                noticed_ms: 1.0,
                completed_ms: 9.5,
                first_output_ms: 8.25,
            }),
            proof: Proof {
                primary_lines: 100,
                secondary_lines: 30,
                guest_lines: 120,
                cut_bytes: Some(813),
                repeated_lines: 10,
                equal_hashes: 1,
                violations: vec![],
            },
            verdict: Verdict::Pass,
        }
    }

    #[test]
    fn a_step_that_not_every_checkpoint_has_counts_as_nothing_there() {
        let reports = [
            checkpoint(0, &[("a", 3000), ("b", 500)]),
            checkpoint(0, &[("a", 1000)]),
        ];
        let mean = |step: &str, mean_ms| StepMean {
            step: step.to_owned(),
            mean_ms,
        };
        assert_eq!(step_means(&reports), [mean("a", 2.0), mean("b", 0.25)]);
        assert_eq!(step_means(&[]), []);
    }

    #[test]
    fn the_table_is_aligned() {
        assert_eq!(
            report().to_string(),
            "\
KVM guest: 256 MiB, 1 vCPU, 2560 dirty pages; over tcp, 2 multifd channels, compression zstd; \
a checkpoint every 200 ms, pages sent between them at 64 MiB/s, resumed when copied, verified (pauses include the hashing)

precopy                       100 ms, 3 passes over 268.4 MB of guest memory
on the wire                   11.0 MB, 110.0 MB/s

checkpoints: 2 primary, 1 secondary          mean         p50         p99         max
  pause of the primary, ms                   6.00        4.00        8.00        8.00
  transfer, ms                               3.00        2.00        4.00        4.00
  stop until loaded, ms                      6.50        4.50        8.50        8.50
  pause of the secondary, ms                 3.00        3.00        3.00        3.00
  RAM, bytes                                 1000        1000        1000        1000
  pages sent ahead                              3           3           3           3
  dirty pages                                   5           5           5           5
  flushed pages                                 7           7           7           7
  device state, bytes                         300         300         300         300

steps of the primary, mean ms
  stop-vm                                   1.500
  send-ram                                  3.500

steps of the secondary, mean ms
  flush                                     1.500

failover, ms since the primary was killed
  loss noticed                1.00
  first output of survivor    8.25
  failover complete           9.50

counter lines                 100 of the primary, 30 of the secondary
lines of the guest            120: the primary's first 813 bytes, then the secondary's
lines printed twice           10
checkpoints with equal hashes 1

passed: the primary was killed, and the guest lost nothing"
        );
    }

    #[test]
    fn a_violation_is_shown_and_decides() {
        let mut report = report();
        report.proof.violations = vec![Violation::Leaked { bytes: 9 }];
        report.verdict = Verdict::Fail;
        let table = report.to_string();
        assert!(table.ends_with(
            "violation: the secondary printed 9 bytes while it was the secondary\n\
             FAILED: the guest was not carried on intact"
        ));
    }

    #[test]
    fn the_json_has_every_figure_under_its_name() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "setup": {
                    "machine": "kvm", "memory_mib": 256, "vcpus": 1, "dirty_pages": 2560,
                    "transport": "tcp", "multifd_channels": 2, "compression": "zstd",
                    "checkpoint_delay_ms": 200, "resume": "copied",
                    "gap_bandwidth_mib": 64, "verify": true,
                },
                "precopy": {
                    "total_ms": 100.0, "wire_bytes": 11_000_000, "throughput_mb_s": 110.0,
                    "guest_bytes": 268_435_456, "passes": 3,
                },
                "checkpoints": {
                    "primary": 2, "secondary": 1,
                    "pause_ms": {"mean": 6.0, "p50": 4.0, "p99": 8.0, "max": 8.0},
                    "transfer_ms": {"mean": 3.0, "p50": 2.0, "p99": 4.0, "max": 4.0},
                    "loaded_ms": {"mean": 6.5, "p50": 4.5, "p99": 8.5, "max": 8.5},
                    "secondary_pause_ms": {"mean": 3.0, "p50": 3.0, "p99": 3.0, "max": 3.0},
                    "ram_bytes": {"mean": 1000.0, "p50": 1000.0, "p99": 1000.0, "max": 1000.0},
                    "ahead_pages": {"mean": 3.0, "p50": 3.0, "p99": 3.0, "max": 3.0},
                    "dirty_pages": {"mean": 5.0, "p50": 5.0, "p99": 5.0, "max": 5.0},
                    "flushed_pages": {"mean": 7.0, "p50": 7.0, "p99": 7.0, "max": 7.0},
                    "device_bytes": {"mean": 300.0, "p50": 300.0, "p99": 300.0, "max": 300.0},
                    "primary_steps": [
                        {"step": "stop-vm", "mean_ms": 1.5}, {"step": "send-ram", "mean_ms": 3.5},
                        {"step": "nothing", "mean_ms": 0.0},
                    ],
                    "secondary_steps": [{"step": "flush", "mean_ms": 1.5}],
                },
                "failover": {
                    "killed": "primary", "noticed_ms": 1.0, "completed_ms": 9.5,
                    "first_output_ms": 8.25,
                },
                "proof": {
                    "primary_lines": 100, "secondary_lines": 30, "guest_lines": 120,
                    "cut_bytes": 813, "repeated_lines": 10, "equal_hashes": 1, "violations": [],
                },
                "verdict": "pass",
            })
        );
    }
}
