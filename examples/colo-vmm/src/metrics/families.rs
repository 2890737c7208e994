//! Which figures there are, and what they are called.

use std::fs;
use std::time::Duration;

use colo_heartbeat::{HeartbeatReport, PeerState, Phase};
use qmp_types::{ColoMode, MigrationStatus, RunState};

use super::text::{Kind, Label, Text};
use crate::figures::{Observation, PAUSE_BOUNDS};

/// The text for these guests, and this process.
pub(super) fn text(guests: &[Observation]) -> String {
    let mut page = Page {
        text: Text::default(),
        guests,
    };
    page.states();
    page.checkpoints();
    page.failovers();
    page.heartbeat();
    page.transfer();
    page.serial();
    process(&mut page.text);
    page.text.into_string()
}

struct Page<'a> {
    text: Text,
    guests: &'a [Observation],
}

impl Page<'_> {
    /// A family with at most one value for each guest.
    fn each(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        value: impl Fn(&Observation) -> Option<f64>,
    ) {
        if self.guests.iter().all(|guest| value(guest).is_none()) {
            return;
        }
        self.text.family(name, kind, help);
        for guest in self.guests {
            if let Some(value) = value(guest) {
                self.text.sample(name, &labels(guest, &[]), value);
            }
        }
    }

    /// A family of states: the present one is 1, the others are 0.
    fn state<'n>(
        &mut self,
        name: &str,
        label: &str,
        help: &str,
        all: impl Iterator<Item = &'n str> + Clone,
        present: impl Fn(&Observation) -> Option<&'static str>,
    ) {
        if self.guests.iter().all(|guest| present(guest).is_none()) {
            return;
        }
        self.text.family(name, Kind::Gauge, help);
        for guest in self.guests {
            let Some(present) = present(guest) else {
                continue;
            };
            for state in all.clone() {
                let is = u8::from(state == present);
                self.text
                    .sample(name, &labels(guest, &[(label, state)]), is);
            }
        }
    }

    fn states(&mut self) {
        self.state(
            "colo_role",
            "role",
            "Which side of a COLO pair this is.",
            ColoMode::ALL.iter().map(|mode| mode.name()),
            |guest| Some(guest.role.name()),
        );
        self.state(
            "colo_vm_state",
            "state",
            "What the guest is doing, in QMP's words.",
            RunState::ALL.iter().map(|state| state.name()),
            |guest| Some(guest.state.name()),
        );
        self.state(
            "colo_migration_state",
            "state",
            "Where the present or last migration is, in QMP's words.",
            MigrationStatus::ALL.iter().map(|status| status.name()),
            |guest| {
                Some(
                    guest
                        .migration
                        .status
                        .unwrap_or(MigrationStatus::None)
                        .name(),
                )
            },
        );
    }

    fn checkpoints(&mut self) {
        use Kind::{Counter, Gauge, Histogram};
        self.each(
            "colo_checkpoints_total",
            Counter,
            "Complete checkpoints.",
            |guest| Some(float(guest.totals.checkpoints)),
        );
        let name = "colo_checkpoint_pause_seconds";
        let help = "How long checkpoints have stopped the guest.";
        self.text.family(name, Histogram, help);
        let (bucket, sum, count) = (
            format!("{name}_bucket"),
            format!("{name}_sum"),
            format!("{name}_count"),
        );
        for guest in self.guests {
            let totals = &guest.totals;
            let mut below = 0;
            for (bound, pauses) in PAUSE_BOUNDS.iter().zip(totals.pauses) {
                below += pauses;
                let bound = bound.as_secs_f64().to_string();
                self.text
                    .sample(&bucket, &labels(guest, &[("le", &bound)]), below);
            }
            let all = labels(guest, &[("le", "+Inf")]);
            self.text.sample(&bucket, &all, totals.checkpoints);
            let plain = labels(guest, &[]);
            self.text.sample(&sum, &plain, totals.pause.as_secs_f64());
            self.text.sample(&count, &plain, totals.checkpoints);
        }
        self.each(
            "colo_checkpoint_last_pause_seconds",
            Gauge,
            "How long the last checkpoint has stopped the guest.",
            |guest| Some(guest.totals.last?.pause.as_secs_f64()),
        );
        self.each(
            "colo_checkpoint_age_seconds",
            Gauge,
            "How long ago the last checkpoint was completed.",
            |guest| Some(guest.totals.last?.age().as_secs_f64()),
        );
        let name = "colo_checkpoint_bytes_total";
        let help =
            "Bytes of all checkpoints; a secondary does not count the RAM of multifd channels.";
        self.text.family(name, Counter, help);
        for guest in self.guests {
            let totals = &guest.totals;
            for (what, bytes) in [("ram", totals.ram_bytes), ("devices", totals.device_bytes)] {
                self.text
                    .sample(name, &labels(guest, &[("content", what)]), bytes);
            }
        }
        let name = "colo_checkpoint_last_bytes";
        self.text
            .family(name, Gauge, "Bytes of the last checkpoint.");
        for guest in self.guests {
            let Some(last) = guest.totals.last else {
                continue;
            };
            for (what, bytes) in [("ram", last.ram_bytes), ("devices", last.device_bytes)] {
                self.text
                    .sample(name, &labels(guest, &[("content", what)]), bytes);
            }
        }
        self.each(
            "colo_checkpoint_dirty_pages_total",
            Counter,
            "Pages in all checkpoints that had been written.",
            |guest| Some(float(guest.totals.dirty_pages)),
        );
        self.each(
            "colo_checkpoint_last_dirty_pages",
            Gauge,
            "Pages in the last checkpoint that had been written.",
            |guest| Some(float(guest.totals.last?.dirty_pages)),
        );
        self.each(
            "colo_checkpoint_compared_pages_total",
            Counter,
            "Pages that a primary has compared with what it had sent of them.",
            |guest| Some(float(guest.totals.compared_pages)),
        );
        self.each(
            "colo_checkpoint_unchanged_pages_total",
            Counter,
            "Pages that a primary has not sent because the secondary has their content.",
            |guest| Some(float(guest.totals.unchanged_pages)),
        );
        self.each(
            "colo_checkpoint_flushed_pages_total",
            Counter,
            "Pages that a secondary has copied into its guest.",
            |guest| Some(float(guest.totals.flushed_pages)),
        );
    }

    fn failovers(&mut self) {
        let name = "colo_failovers_total";
        if self.guests.iter().all(|g| g.totals.failovers.is_empty()) {
            return;
        }
        let help = "How often this side went on alone, what had ended COLO, and who decided.";
        self.text.family(name, Kind::Counter, help);
        for guest in self.guests {
            for (failover, count) in &guest.totals.failovers {
                let own = [
                    ("cause", failover.cause),
                    ("decided_by", failover.decided_by),
                ];
                self.text.sample(name, &labels(guest, &own), count);
            }
        }
    }

    fn heartbeat(&mut self) {
        let beat = |value: fn(&HeartbeatReport) -> Option<f64>| {
            move |guest: &Observation| value(guest.heartbeat.as_ref()?)
        };
        self.state(
            "colo_heartbeat_peer",
            "state",
            "Whether the other side is heard.",
            ["unheard", "alive", "lost"].into_iter(),
            |guest| {
                Some(match guest.heartbeat.as_ref()?.peer {
                    PeerState::Unheard => "unheard",
                    PeerState::Alive => "alive",
                    PeerState::Lost => "lost",
                })
            },
        );
        self.state(
            "colo_heartbeat_phase",
            "phase",
            "What this side has decided.",
            ["paired", "asking", "alone", "stopped", "suspended"].into_iter(),
            |guest| {
                Some(match guest.heartbeat.as_ref()?.phase {
                    Phase::Paired => "paired",
                    Phase::Asking => "asking",
                    Phase::Alone => "alone",
                    Phase::Stopped => "stopped",
                    Phase::Suspended => "suspended",
                })
            },
        );
        self.each(
            "colo_heartbeat_age_seconds",
            Kind::Gauge,
            "How long ago the other side was last heard.",
            beat(|report| Some(report.peer_age?.as_secs_f64())),
        );
        self.each(
            "colo_heartbeat_missed_beats",
            Kind::Gauge,
            "Beats of the other side that are overdue.",
            beat(|report| Some(float(missed(report.peer_age?, report.rhythm.interval)))),
        );
        self.each(
            "colo_heartbeat_missed_beats_limit",
            Kind::Gauge,
            "So many overdue beats mean that the other side is lost.",
            beat(|report| Some(report.rhythm.missed.into())),
        );
        self.each(
            "colo_heartbeat_interval_seconds",
            Kind::Gauge,
            "Between two beats.",
            beat(|report| Some(report.rhythm.interval.as_secs_f64())),
        );
        self.each(
            "colo_heartbeat_connected",
            Kind::Gauge,
            "Whether there is a connection on which the other side was heard.",
            beat(|report| Some(u8::from(report.connected).into())),
        );
    }

    /// The precopy.
    fn transfer(&mut self) {
        use Kind::{Counter, Gauge};
        self.each(
            "colo_migration_transferred_bytes_total",
            Counter,
            "Bytes that the present or last migration has sent, without checkpoints.",
            |guest| Some(float(guest.migration.ram.as_ref()?.transferred)),
        );
        self.each(
            "colo_migration_remaining_bytes",
            Gauge,
            "Bytes that the migration has yet to send.",
            |guest| Some(float(guest.migration.remaining?)),
        );
        self.each(
            "colo_migration_dirty_pages_per_second",
            Gauge,
            "Pages that the guest changes meanwhile.",
            |guest| Some(float(guest.migration.ram.as_ref()?.dirty_pages_rate)),
        );
    }

    fn serial(&mut self) {
        self.each(
            "colo_serial_output_bytes_total",
            Kind::Counter,
            "Bytes that the guest has put out, those held back and dropped included.",
            |guest| Some(float(guest.serial?.0)),
        );
        self.each(
            "colo_serial_held_bytes",
            Kind::Gauge,
            "Bytes of the guest's output that are held back.",
            |guest| Some(float(guest.serial?.1 as u64)),
        );
    }
}

/// The guest's labels, then these.
fn labels<'a>(guest: &'a Observation, own: &[Label<'a>]) -> Vec<Label<'a>> {
    let name = guest.guest.as_deref().map(|name| ("guest", name));
    name.into_iter().chain(own.iter().copied()).collect()
}

/// The beats that are overdue: one may be on its way.
fn missed(age: Duration, interval: Duration) -> u64 {
    let beats = age.as_nanos() / interval.as_nanos().max(1);
    u64::try_from(beats).unwrap_or(u64::MAX)
}

#[allow(clippy::cast_precision_loss)] // a figure for people, exact up to 2^53
const fn float(value: u64) -> f64 {
    value as f64
}

/// What this process takes, under the names that Prometheus' own libraries give it. Left out where
/// `/proc` does not say.
fn process(text: &mut Text) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident: Option<u64> = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse().ok());
    if let Some(kib) = resident {
        let name = "process_resident_memory_bytes";
        text.family(name, Kind::Gauge, "Resident memory, the guest's included.");
        text.sample(name, &[], kib * 1024);
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        let name = "process_open_fds";
        text.family(name, Kind::Gauge, "Open file descriptors.");
        // Its own is one of them.
        text.sample(name, &[], descriptors.count().saturating_sub(1));
    }
}
