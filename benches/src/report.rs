//! What was measured, as JSON: all of one run, or the part that one program has measured.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use ::tests::Result;
use ::tests::qemu::Binary;
use clap::ValueEnum;
use colo_vmm::demo::Spread;
use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::host::Host;
use crate::link::Link;
use crate::way::{Way, name};

/// Our pair with the options that resume the guest on loaded, which are the default.
pub const OURS: &str = "colo-vmm";
/// The options of local-copy resume.
pub const LOCAL_COPY: &str = "--resume copied --output-commit";

/// The name of our pair with further options of both sides.
#[must_use]
pub fn ours_with(options: &str) -> String {
    format!("{OURS} {options}").trim().to_owned()
}

/// Figures, and where they were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where it was measured.
    pub host: Host,
    /// The QEMU, if there was one.
    pub qemu: Option<String>,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoints: Vec<Checkpoints>,
    /// Progress of guests under checkpoints.
    #[serde(default)]
    pub guest_work: Vec<GuestWork>,
    /// Rates of links.
    #[serde(default)]
    pub rates: Vec<Rate>,
    /// Migrations of stopped guests.
    #[serde(default)]
    pub migrations: Vec<Migration>,
    /// Failovers.
    #[serde(default)]
    pub failovers: Vec<Failover>,
}

/// Checkpoints of one pair in one case. Times are milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoints {
    /// The case.
    pub case: Case,
    /// Who was measured: [`ours_with`] some options, or QEMU and its machine.
    pub pair: String,
    /// Every pause.
    pub pauses_ms: Vec<f64>,
    /// How long the primary's guest stood still.
    pub pause_ms: Spread,
    /// From the pause's begin until the secondary had everything.
    pub transfer_ms: Spread,
    /// From then until the secondary had loaded it.
    pub load_ms: Spread,
    /// From then until the guest ran.
    pub resume_ms: Spread,
    /// The longest silence of the guest's serial line around each checkpoint.
    pub stall_ms: Spread,
    /// The usual silence: the time of one pass of the guest.
    pub usual_gap_ms: f64,
    /// Pages that were sent for a checkpoint.
    pub sent_pages: Spread,
    /// Bytes on the wire for a checkpoint, in the mean.
    pub bytes: Option<f64>,
    /// CPU time of both sides for a checkpoint, without the threads that run a vCPU, in the mean.
    pub cpu_ms: f64,
    /// The peak of the secondary's resident memory over guest RAM.
    pub memory_over_ram: f64,
    /// How many CPUs others took meanwhile, the measuring program included.
    pub others_cpus: f64,
    /// The steps of both sides.
    pub steps: BTreeMap<String, Spread>,
}

impl Checkpoints {
    /// The median pause for a thousand pages sent, ms.
    #[must_use]
    pub fn pause_per_thousand(&self) -> f64 {
        self.pause_ms.p50 / self.sent_pages.p50 * 1e3
    }

    /// The rate of the median transfer, 10^9 bytes a second.
    #[must_use]
    pub fn transfer_rate(&self) -> Option<f64> {
        Some(self.bytes? / self.transfer_ms.p50 / 1e6)
    }
}

/// A guest's own progress, alone and under checkpoints, in passes a second, one of each a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestWork {
    /// The case.
    pub case: Case,
    /// As in [`Checkpoints`].
    pub pair: String,
    /// Without a secondary.
    pub alone: Vec<f64>,
    /// Under checkpoints.
    pub protected: Vec<f64>,
}

impl GuestWork {
    /// The part of its progress that the guest lost, in the median round: 0 to 1, or below 0 by
    /// chance.
    #[must_use]
    pub fn slowdown(&self) -> f64 {
        let rounds = self.alone.iter().zip(&self.protected);
        median(rounds.map(|(alone, protected)| 1.0 - protected / alone))
    }
}

/// The rate of a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The link.
    pub link: Link,
    /// What iperf3 moved in each run, 10^9 bytes a second.
    pub gb_per_s: Vec<f64>,
    /// Why it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// Source and destination of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Ends {
    QemuQemu,
    QemuUs,
    UsQemu,
    UsUs,
}

/// What memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Nothing that compresses.
    Random,
    /// 42 % zero pages.
    Mixed,
    /// Zero pages only.
    Zero,
}

/// What memory is before the guest moves, on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Only mapped: each page is taken from the system when it is first touched.
    Fresh,
    /// All there, as that of a guest that has run, and of a destination that has made ready (QEMU's
    /// `prealloc=on`).
    Populated,
}

macro_rules! displayed_by_name {
    ($($type:ty)*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&name(*self))
            }
        }
    )*};
}
displayed_by_name!(Ends Kind State);

/// Migrations of a stopped guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    /// What joins the two sides.
    pub link: Link,
    /// How pages cross.
    pub way: Way,
    /// What guest memory holds.
    pub content: Kind,
    /// What it is before.
    pub memory_is: State,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Who sends and who receives.
    pub ends: Ends,
    /// From the first connection to the confirmation, of each run.
    pub seconds: Vec<f64>,
    /// CPU time of both sides in each run, seconds.
    pub cpu_seconds: Vec<f64>,
}

impl Migration {
    /// The median time, seconds.
    #[must_use]
    pub fn time(&self) -> f64 {
        median(self.seconds.iter().copied())
    }

    /// Guest memory, 10^9 bytes.
    #[must_use]
    pub fn gigabytes(&self) -> f64 {
        f64::from(self.memory_mib) * f64::from(1 << 20) / 1e9
    }

    /// CPU seconds of both sides for 10^9 bytes of guest memory, in the median.
    #[must_use]
    pub fn cpu_per_gigabyte(&self) -> f64 {
        median(self.cpu_seconds.iter().copied()) / self.gigabytes()
    }
}

/// From the SIGKILL of the primary to the first byte of the survivor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failover {
    /// What goes on, and by whose decision.
    pub case: String,
    /// What joins the two sides.
    pub link: Link,
    /// Between two beats of the heart, ms.
    pub beat_ms: u32,
    /// Beats that have to be missing.
    pub missed: u32,
    /// From one checkpoint to the next, ms.
    pub interval_ms: u32,
    /// Each failover.
    pub times_ms: Vec<f64>,
}

/// The median, of an even number the upper one; NaN of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Report {
    /// One of this machine without figures.
    #[must_use]
    pub fn new(qemu: Option<&Binary>) -> Self {
        Self {
            host: Host::this(),
            qemu: qemu.map(ToString::to_string),
            checkpoints: Vec::new(),
            guest_work: Vec::new(),
            rates: Vec::new(),
            migrations: Vec::new(),
            failovers: Vec::new(),
        }
    }

    /// Reads one that was written.
    ///
    /// # Errors
    /// The file cannot be read, or is no report.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
        serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", file.display()).into())
    }

    /// Writes it.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, file: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()).into())
    }

    /// Takes the figures of another part of the same run in.
    ///
    /// # Errors
    /// It is of another machine, commit or QEMU.
    pub fn merge(&mut self, part: Self) -> Result<()> {
        if part.host != self.host {
            return Err(format!("{:?} is not {:?}", part.host, self.host).into());
        }
        match (&self.qemu, part.qemu) {
            (Some(ours), Some(theirs)) if *ours != theirs => {
                return Err(format!("{theirs} is not {ours}").into());
            }
            (None, theirs) => self.qemu = theirs,
            _ => {}
        }
        self.checkpoints.extend(part.checkpoints);
        self.guest_work.extend(part.guest_work);
        self.rates.extend(part.rates);
        self.migrations.extend(part.migrations);
        self.failovers.extend(part.failovers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> Report {
        let mut report = Report::new(None);
        report.rates.push(Rate {
            link: Link::VETH,
            gb_per_s: vec![1.5],
            skipped: None,
        });
        report
    }

    #[test]
    fn parts_of_one_run_add_up_and_are_read_as_they_were_written() {
        let mut report = Report::new(None);
        report.merge(part()).unwrap();
        report.merge(part()).unwrap();
        assert_eq!(report.rates.len(), 2);
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write(file.path()).unwrap();
        assert_eq!(Report::read(file.path()).unwrap(), report);
    }

    #[test]
    fn figures_of_another_machine_or_qemu_are_refused() {
        let mut report = part();
        let mut other = part();
        other.host.kernel = "another".to_owned();
        assert!(report.merge(other).is_err());
        report.qemu = Some("QEMU 11.1.3".to_owned());
        let mut other = part();
        other.qemu = Some("QEMU 11.2.0".to_owned());
        let error = report.merge(other).unwrap_err();
        assert_eq!(error.to_string(), "QEMU 11.2.0 is not QEMU 11.1.3");
        assert_eq!(report.rates.len(), 1);
    }

    #[test]
    fn a_slowdown_is_that_of_the_median_round() {
        let work = GuestWork {
            case: Case {
                link: Link::UNIX,
                way: Way::Plain,
                dirty_pages: 1,
                memory_mib: 1,
                is_filled: true,
                pass_delay: 0,
                interval_ms: 50,
            },
            pair: OURS.to_owned(),
            alone: vec![100.0, 200.0, 100.0],
            protected: vec![90.0, 100.0, 110.0],
        };
        assert!((work.slowdown() - 0.1).abs() < 1e-9);
    }
}
