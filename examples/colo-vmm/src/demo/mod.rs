//! `colo-vmm demo`: plays the operator of a COLO pair, and checks what became of its guest.
//!
//! [`run`] is the procedure of QEMU's COLO document, top to bottom, with two processes of this
//! program on this machine: start both, set capabilities and parameters, migrate, let them take
//! checkpoints, pull one side's plug, tell the other to go on. Everything goes through the
//! processes' command lines and QMP sockets, as it would for any other operator.
//!
//! - `args`: what it can be told
//! - `side`: one process and its QMP connection
//! - `proof`: what the guest's output proves
//! - `report`, `figures`: what it took, as a table and as JSON
//! - `progress`: the line that shows what is going on
//! - `error`: what can go wrong on the way

mod args;
mod error;
mod figures;
mod progress;
mod proof;
mod report;
mod side;

use std::env;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use qmp_types::{
    ColoExitReason, Command, Event, InetSocketAddress, Migrate, MigrateIncoming,
    MigrateSetParameters, MigrationAddress, MigrationCapability, MigrationCapabilityStatus,
    MigrationInfo, MigrationStatus, SocketAddress, StatusInfo,
};
use tempfile::TempDir;

pub use args::{Compression, DemoArgs, Transport, Victim};
pub use error::{DemoError, LastWords};
pub use figures::Spread;
pub use side::Role;

use crate::lossy_writer::print_error;
use crate::machine::kvm_unavailable;
use progress::Progress;
use proof::{Evidence, LINE, prove};
use report::{Checkpoints, Failover, Precopy, Report, Verdict};
use side::Side;

/// How long the guest may take to print its first line, ready to be migrated.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long the secondary may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(30);
/// How long the migration may take until COLO.
const MIGRATION_LIMIT: Duration = Duration::from_secs(600);
/// How long a checkpoint may take, besides the delay before it.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(60);
/// How long the survivor may take to notice, to take over, and to print.
const FAILOVER_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at a migration's progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// How long the guest may stand still at the hand-over, ms: generous, since COLO is what is shown.
const DOWNTIME_LIMIT_MS: u64 = 1000;
/// Lines that the survivor prints before its end.
const ENCORE_LINES: u64 = 20;

/// Plays the demo, and prints what came of it. Succeeds if the guest lost nothing.
///
/// # Errors
/// The demo could not be played to its end.
pub fn run(args: &DemoArgs) -> Result<ExitCode, DemoError> {
    if args.compression != Compression::None && args.multifd == 0 {
        return Err(DemoError::CompressionWithoutMultifd);
    }
    if !args.sim
        && let Some(error) = kvm_unavailable()
    {
        return Err(DemoError::Kvm(error));
    }
    side::catch_interrupts()?;
    let mut dir = tempfile::Builder::new()
        .prefix("colo-vmm-demo-")
        .tempdir()
        .map_err(DemoError::host("make a temporary directory"))?;
    if args.keep {
        dir.disable_cleanup(true);
        print_error(format_args!(
            "serial lines and logs are kept in {}",
            dir.path().display()
        ));
    }
    let report = play(args, &dir)?;
    match print(args, &report) {
        // Nobody reads it. The exit status says how it went.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed.map_err(DemoError::host("print the report"))?,
    }
    Ok(match report.verdict {
        Verdict::Pass => ExitCode::SUCCESS,
        Verdict::Fail => ExitCode::FAILURE,
    })
}

fn print(args: &DemoArgs, report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, report)?;
        writeln!(out)
    } else {
        writeln!(out, "{report}")
    }
}

fn play(args: &DemoArgs, dir: &TempDir) -> Result<Report, DemoError> {
    let progress = Progress::new(args.json);
    let mut pair = Pair::start(args, dir.path())?;

    progress.says("waiting for the guest");
    pair.wait_for_guest()?;
    pair.prepare(args)?;
    let precopy = pair.migrate(args, dir.path(), &progress)?;
    progress.says("in COLO");
    pair.take_checkpoints(args, &progress)?;

    progress.says("failover");
    let mut leaked = pair.secondary.printed();
    let failover = match args.failover {
        Victim::Primary => Some(fail_over(&mut pair.primary, &mut pair.secondary)?),
        Victim::Secondary => Some(fail_over(&mut pair.secondary, &mut pair.primary)?),
        Victim::None => {
            pair.primary.quit()?;
            pair.secondary.quit()?;
            None
        }
    };
    if args.failover != Victim::Primary {
        leaked = pair.secondary.printed();
    }
    drop(progress);

    let (primary, secondary) = (&pair.primary, &pair.secondary);
    let proof = prove(&Evidence {
        killed: failover.as_ref().map(|failover| failover.killed),
        primary: &primary.output()?,
        secondary: &secondary.output()?,
        leaked,
        primary_checkpoints: primary.checkpoints(),
        secondary_checkpoints: secondary.checkpoints(),
        verify: args.verify,
    });
    Ok(Report {
        setup: args.setup(),
        precopy,
        checkpoints: Checkpoints::of(primary.checkpoints(), secondary.checkpoints()),
        failover,
        verdict: if proof.holds() {
            Verdict::Pass
        } else {
            Verdict::Fail
        },
        proof,
    })
}

/// Both sides.
struct Pair {
    primary: Side,
    secondary: Side,
}

impl Pair {
    fn start(args: &DemoArgs, dir: &Path) -> Result<Self, DemoError> {
        let program = env::current_exe().map_err(DemoError::host("find this program"))?;
        let common = args.machine_args();
        let incoming = ["--incoming".to_owned(), "defer".to_owned()];
        let secondary = [common.as_slice(), &incoming].concat();
        Ok(Self {
            primary: Side::start(Role::Primary, &program, &common, dir)?,
            secondary: Side::start(Role::Secondary, &program, &secondary, dir)?,
        })
    }

    /// Waits until the guest counts.
    fn wait_for_guest(&mut self) -> Result<(), DemoError> {
        self.primary.wait("first line", BOOT_LIMIT, |side| {
            Ok((side.printed() >= LINE as u64).then_some(()))
        })
    }

    /// Capabilities and parameters.
    fn prepare(&mut self, args: &DemoArgs) -> Result<(), DemoError> {
        let multifd = (args.multifd > 0).then_some(MigrationCapability::Multifd);
        let capabilities: Vec<_> = [
            MigrationCapability::ReturnPath,
            MigrationCapability::XColo,
            MigrationCapability::Events,
        ]
        .into_iter()
        .chain(multifd)
        .map(|capability| MigrationCapabilityStatus {
            capability,
            state: true,
        })
        .collect();
        let common = MigrateSetParameters {
            multifd_channels: multifd.map(|_| args.multifd),
            multifd_compression: multifd.map(|_| args.compression.parameter()),
            ..MigrateSetParameters::default()
        };
        let primary = MigrateSetParameters {
            x_checkpoint_delay: Some(args.delay),
            max_bandwidth: Some(0),
            downtime_limit: Some(DOWNTIME_LIMIT_MS),
            ..common.clone()
        };
        for (side, parameters) in [(&mut self.secondary, common), (&mut self.primary, primary)] {
            side.execute(&Command::MigrateSetCapabilities {
                capabilities: capabilities.clone(),
            })?;
            side.execute(&Command::MigrateSetParameters(Box::new(parameters)))?;
        }
        Ok(())
    }

    /// From here to COLO.
    fn migrate(
        &mut self,
        args: &DemoArgs,
        dir: &Path,
        progress: &Progress,
    ) -> Result<Precopy, DemoError> {
        let address = self.listen(args, dir)?;
        let began = Instant::now();
        self.primary.execute(&Command::Migrate(Migrate {
            address,
            resume: false,
        }))?;
        let mut ram = None;
        let total = self
            .primary
            .wait("status colo", MIGRATION_LIMIT, |primary| {
                // The event says when, the query how much.
                let in_colo = primary.take_event(|event| {
                    let status = MigrationStatus::Colo;
                    *event == Event::Migration { status }
                });
                let info: MigrationInfo = primary.query(&Command::QueryMigrate)?;
                check_migration(primary, &info)?;
                // QEMU leaves it out in status `colo`.
                ram = info.ram.or(ram);
                if let Some(ram) = &ram {
                    progress.migrated(ram.transferred, ram.remaining);
                }
                if in_colo.is_none() {
                    primary.listen("status colo", PROGRESS_EVERY)?;
                }
                Ok(in_colo.map(|at| at.duration_since(began)))
            })?;
        let ram = ram.unwrap_or_default();
        Ok(Precopy {
            total_ms: ms(total),
            wire_bytes: ram.transferred,
            throughput_mb_s: ram.transferred as f64 / total.as_secs_f64() / 1e6,
            guest_bytes: ram.total,
            passes: ram.dirty_sync_count,
        })
    }

    /// Lets the secondary listen, and says where it does.
    fn listen(&mut self, args: &DemoArgs, dir: &Path) -> Result<MigrationAddress, DemoError> {
        let address = match args.transport {
            // Port 0 is any that is free.
            Transport::Tcp => SocketAddress::Inet(InetSocketAddress::new("127.0.0.1", "0")),
            Transport::Unix => {
                SocketAddress::unix(dir.join("migration.sock").display().to_string())
            }
        };
        self.secondary
            .execute(&Command::MigrateIncoming(MigrateIncoming {
                address: MigrationAddress::Socket(address),
                exit_on_error: true,
            }))?;
        self.secondary
            .wait("socket-address in query-migrate", LISTEN_LIMIT, |side| {
                let info: MigrationInfo = side.query(&Command::QueryMigrate)?;
                check_migration(side, &info)?;
                let mut addresses = info.socket_address.unwrap_or_default().into_iter();
                Ok(addresses.next().map(MigrationAddress::Socket))
            })
    }

    /// Waits for checkpoints of both sides.
    fn take_checkpoints(&mut self, args: &DemoArgs, progress: &Progress) -> Result<(), DemoError> {
        let limit = CHECKPOINT_LIMIT + Duration::from_millis(args.delay.into());
        let mut taken = 0;
        let mut deadline = Instant::now() + limit;
        while taken < args.checkpoints {
            let waiting_for = format!("checkpoint {}", taken + 1);
            for side in [&mut self.primary, &mut self.secondary] {
                side.listen(&waiting_for, side::SLICE)?;
                side.check_colo()?;
            }
            let behind = if self.primary.checkpoints().len() < self.secondary.checkpoints().len() {
                &self.primary
            } else {
                &self.secondary
            };
            let both = behind.checkpoints().len() as u64;
            if both > taken {
                taken = both;
                deadline = Instant::now() + limit;
                let last = self.primary.checkpoints().last();
                progress.checkpoint(
                    taken,
                    args.checkpoints,
                    last.map_or(0, |last| last.pause_us),
                );
            } else if Instant::now() >= deadline {
                return Err(behind.too_late(&waiting_for, limit));
            }
        }
        Ok(())
    }
}

/// Fails if the migration has.
fn check_migration(side: &Side, info: &MigrationInfo) -> Result<(), DemoError> {
    match info.status {
        Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => Err(DemoError::Migration {
            role: side.role(),
            cause: info
                .error_desc
                .clone()
                .unwrap_or_else(|| "no cause given".to_owned()),
            stderr: side.last_words(),
        }),
        _ => Ok(()),
    }
}

/// Kills one side, lets the other take over and run on for a while, and ends it.
fn fail_over(victim: &mut Side, survivor: &mut Side) -> Result<Failover, DemoError> {
    // Whatever the secondary prints, it prints as the survivor. The primary prints all the time.
    let secondary = survivor.role() == Role::Secondary;
    let early_watch = secondary.then(|| survivor.watch_output());
    let killed = victim.kill()?;
    let noticed = survivor.wait("COLO_EXIT for an error", FAILOVER_LIMIT, |side| {
        let reason = ColoExitReason::Error;
        Ok(side.take_event(
            |event| matches!(event, Event::ColoExit { reason: given, .. } if *given == reason),
        ))
    })?;
    let watch = early_watch.unwrap_or_else(|| survivor.watch_output());
    survivor.execute(&Command::XColoLostHeartbeat)?;
    survivor.wait("completed failover", FAILOVER_LIMIT, |side| {
        let info: MigrationInfo = side.query(&Command::QueryMigrate)?;
        check_migration(side, &info)?;
        let status: StatusInfo = side.query(&Command::QueryStatus)?;
        let completed = info.status == Some(MigrationStatus::Completed) && status.running;
        Ok(completed.then_some(()))
    })?;
    let completed = killed.elapsed();
    survivor.wait("output after the failover", FAILOVER_LIMIT, |_| {
        Ok(watch.is_finished().then_some(()))
    })?;
    let first_output = watch.finish();
    victim.end()?;

    let enough = survivor.printed() + ENCORE_LINES * LINE as u64;
    survivor.wait("lines after the failover", FAILOVER_LIMIT, |side| {
        Ok((side.printed() >= enough).then_some(()))
    })?;
    survivor.quit()?;
    Ok(Failover {
        killed: victim.role(),
        noticed_ms: ms(noticed.duration_since(killed)),
        completed_ms: ms(completed),
        first_output_ms: ms(first_output.map_or(completed, |at| at.duration_since(killed))),
    })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
