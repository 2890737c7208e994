//! `colo-vmm run`.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use colo_core::Deadlines;
use migration_stream::io::SendMode;
use multifd::ZstdRange;
use qmp_types::{RunState, SessionConfig};
use uuid::Uuid;

use super::machine::{MachineArgs, WorkloadArgs, max_device_state, mebibytes};
use super::values::{
    GuestArg, IncomingArg, PeerLossArg, RamCacheArg, ResumeArg, SerialArg, SkipUnchangedArg,
};
use crate::console::Console;
use crate::cpu_args::CpuArgs;
use crate::event_loop::{self, Ender, Ending, GuestEnds, Request};
use crate::heartbeat::HeartbeatArgs;
use crate::lossy_writer::print_error;
use crate::machine::GuestImage;
use crate::memory::populated;
use crate::metrics;
use crate::migration::{Boundaries, Boundary, Halt, IncomingMode, Migration, MigrationOptions};
use crate::monitor::{self, COMMANDS, Monitor};
use crate::operator::{EventBus, Operator};
use crate::qmp::{self, QmpAddress};
use crate::vm::Vm;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    cpu: CpuArgs,
    #[command(flatten)]
    workload: WorkloadArgs,
    /// What to run: workload, answers, boot:FILE, flat:FILE[@ADDRESS] or kernel:FILE.
    #[arg(long, default_value = "workload")]
    guest: GuestArg,
    /// The kernel's initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0 reboot=t panic=-1].
    #[arg(long)]
    cmdline: Option<String>,
    /// The guest's serial line: stdio, file:PATH or null.
    #[arg(long, default_value = "stdio")]
    serial: SerialArg,
    /// Serve QMP here: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    qmp: Option<QmpAddress>,
    /// Serve figures for Prometheus here, at /metrics: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<QmpAddress>,
    /// Wait for a guest instead of starting one: `defer` until QMP says `migrate-incoming`, or an
    /// address to listen at.
    #[arg(long, value_name = "defer|URI")]
    incoming: Option<IncomingArg>,
    /// Do not start the guest before QMP says `cont`.
    #[arg(long)]
    paused: bool,
    /// A guest that resets the machine (0xfe to port 0x64, or a triple fault) boots again instead of
    /// ending this process.
    #[arg(long)]
    reboot: bool,
    /// A guest that shuts down does not end this process.
    #[arg(long)]
    no_shutdown: bool,
    /// Hash guest RAM and device state at every COLO checkpoint.
    #[arg(long)]
    verify: bool,
    /// What a COLO secondary keeps checkpoints in until they are complete: a second copy of RAM, or
    /// copies of what either side has dirtied.
    #[arg(long, default_value_t = RamCacheArg::Cow, value_enum)]
    ram_cache: RamCacheArg,
    /// What to do when COLO has lost the other side: wait for `x-colo-lost-heartbeat`, or take over. At most one
    /// side may take over by itself. Without --heartbeat a side that was only frozen or cut off runs its guest
    /// again later, and there are two.
    #[arg(long, default_value = "wait", value_name = "wait|take-over")]
    on_peer_loss: PeerLossArg,
    /// As a primary, hold the guest's serial output until the secondary has received the checkpoint that contains
    /// its cause. Give both sides the option: each may come to be the primary.
    #[arg(long)]
    output_commit: bool,
    /// As a primary, when the guest resumes in a checkpoint. `copied` needs `--output-commit`, and memory for the
    /// copies.
    #[arg(long, default_value_t = ResumeArg::Loaded, value_enum,
          requires_if("copied", "output_commit"))]
    resume: ResumeArg,
    /// As a primary with multifd, send pages between checkpoints too, at most this many MiB a second; 0 for no
    /// limit. Fewer pages are then left for the checkpoint.
    #[arg(long, value_name = "MIB")]
    gap_bandwidth: Option<u64>,
    /// The most device state of an incoming guest, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = max_device_state())]
    max_device_state: u64,
    /// Take all of guest RAM from the system before the guest runs or arrives. It arrives faster, and takes all of
    /// its memory at once. Without effect on a COLO secondary.
    #[arg(long)]
    prealloc: bool,
    /// Do not ask for huge pages for guest RAM. With them there are fewer page faults, but a byte
    /// that is written may take 2 MiB.
    #[arg(long)]
    no_huge_pages: bool,
    /// As a source over unix sockets, splice pages into the connection instead of copying them. Only where the
    /// connection goes straight to the peer: a proxy that moves bytes by `splice(2)` would tear checkpoints.
    #[arg(long)]
    splice_send: bool,
    /// As a source with multifd compressed by zstd, go up with the level where the network is the
    /// bottleneck and down where the processors are, within -7 to 12 (auto:MIN:MAX: within others,
    /// -100 to 20) [default: the parameter `multifd-zstd-level`].
    #[arg(long, value_name = "auto[:MIN:MAX]")]
    zstd_level: Option<ZstdRange>,
    /// As a primary, do not send pages that were written without being changed. `auto` compares pages as long as
    /// that saves time, as measured.
    #[arg(long, default_value_t = SkipUnchangedArg::Off, value_enum, value_name = "WHEN")]
    skip_unchanged: SkipUnchangedArg,
    /// The VM's UUID. Both sides must have the same where multifd channels or the capability
    /// `validate-uuid` compare it.
    #[arg(long)]
    uuid: Option<Uuid>,
    #[command(flatten)]
    heartbeat: HeartbeatArgs,
    /// How long the other side may be silent when it owes an answer, ms. For the primary's next
    /// checkpoint the secondary waits at least three times its own `x-checkpoint-delay`.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    peer_timeout: Option<u64>,
    /// Note in this file where something of a migration begins or ends; for tests.
    #[arg(long, value_name = "FILE", hide = true)]
    boundaries: Option<PathBuf>,
    /// Die there; for tests.
    #[arg(long, value_name = "NAME#OCCURRENCE", hide = true)]
    die_at: Option<Boundary>,
    /// Wait there until somebody has had the FIFO open for writing; for tests.
    #[arg(long, value_name = "NAME#OCCURRENCE=FIFO", hide = true)]
    halt_at: Option<Halt>,
}

impl RunArgs {
    pub(super) fn migration_options(&self) -> io::Result<MigrationOptions> {
        let log = self.boundaries.as_ref().map(File::create).transpose()?;
        let boundaries = Boundaries::new(log, self.die_at.clone(), self.halt_at.clone());
        let defaults = MigrationOptions::default();
        let timeout = self.peer_timeout.map(Duration::from_millis);
        Ok(MigrationOptions {
            verify: self.verify,
            ram_cache: self.ram_cache.into(),
            on_peer_loss: self.on_peer_loss.into(),
            deadlines: timeout.map_or(defaults.deadlines, Deadlines::all),
            io_limit: timeout.unwrap_or(defaults.io_limit),
            uuid: self.uuid,
            output_commit: self.output_commit,
            resume: self.resume.into(),
            skip_unchanged: self.skip_unchanged.into(),
            gap: self.gap_bandwidth.map(|mib| mib.saturating_mul(1 << 20)),
            send_mode: match self.splice_send {
                true => SendMode::Splice,
                false => SendMode::Copy,
            },
            zstd_level: self.zstd_level,
            max_device_state: mebibytes(self.max_device_state),
            prealloc: self.prealloc,
            boundaries: Arc::new(boundaries),
        })
    }

    /// What runs, as far as options fit it.
    pub(super) fn image(&self) -> Result<GuestImage, String> {
        let is_kernel = matches!(self.guest, GuestArg::Kernel(_));
        for (option, given, fits, of) in [
            ("--initrd", self.initrd.is_some(), is_kernel, "kernel:FILE"),
            (
                "--cmdline",
                self.cmdline.is_some(),
                is_kernel,
                "kernel:FILE",
            ),
            (
                "--fill-ram",
                self.workload.fill_ram,
                self.guest == GuestArg::Workload,
                "workload",
            ),
        ] {
            if given && !fits {
                return Err(format!("{option} is an option of --guest {of}"));
            }
        }
        Ok(match &self.guest {
            GuestArg::Workload => GuestImage::Workload(
                self.workload
                    .config(self.machine.memory, self.machine.vcpus),
            ),
            GuestArg::Answers => GuestImage::Answers,
            GuestArg::Boot(file) => GuestImage::BootSector(file.clone()),
            GuestArg::Flat(file, address) => GuestImage::Flat {
                file: file.clone(),
                address: *address,
            },
            GuestArg::Kernel(file) => GuestImage::Kernel {
                file: file.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone().unwrap_or_else(|| CMDLINE.to_owned()),
            },
        })
    }

    /// Says what an operator of this side should know before it matters.
    fn warn(&self) {
        if self.on_peer_loss == PeerLossArg::TakeOver && !self.heartbeat.is_on() {
            print_error(format!("colo-vmm: warning: {TAKES_OVER_BLINDLY}"));
        }
    }
}

/// The kernel's command line if none is given.
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1";

/// What an operator should know of a side that takes over without a heartbeat.
pub(crate) const TAKES_OVER_BLINDLY: &str = "--on-peer-loss take-over without --heartbeat: a peer that was only frozen or cut off, and wakes \
     after this side has taken over, is a second guest";

/// How long QMP clients have to take their last replies.
const QMP_FAREWELL: Duration = Duration::from_secs(1);

/// Runs a guest to its end.
pub(super) fn run(args: &RunArgs) -> Result<ExitCode, Box<dyn Error>> {
    // Before there are threads, which inherit the mask.
    let signals = event_loop::ending_signals()?;
    let image = args.image()?;
    args.warn();
    let sink = args
        .serial
        .sink()
        .map_err(|error| format!("the serial line's file: {error}"))?;
    let console = Console::new(sink);
    let loaded = args.incoming.is_none().then(|| image.clone());
    let machine = args
        .machine
        .build(loaded, console.sink(), args.cpu.options())?;
    if !args.no_huge_pages
        && let Err(error) = machine.memory().advise_huge_pages()
    {
        tracing::info!(%error, "guest ram is in small pages");
    }
    if args.prealloc && args.incoming.is_none() {
        populated(machine.memory().populate()?)?;
    }
    let (state, mode) = match args.incoming {
        None => (RunState::PreLaunch, IncomingMode::None),
        Some(_) => (RunState::InMigrate, IncomingMode::Deferred),
    };
    let events = Arc::new(EventBus::new());
    let vm = Vm::new(machine, state, Arc::clone(&events)).resetting_to(image);
    let vm = Arc::new(vm);
    let ender = Ender::new()?;
    let fatal = ender.clone();
    let on_fatal = move || fatal.end(Request::IncomingFailed);
    let options = args.migration_options()?;
    let migration = Migration::new(Arc::clone(&vm), console, mode, options, on_fatal)
        .map_err(|error| -> Box<dyn Error> { error })?;
    if args.on_peer_loss == PeerLossArg::TakeOver && args.heartbeat.asks() {
        return Err("a side that asks the arbiter does not take over without it".into());
    }
    args.heartbeat
        .start(&migration, args.uuid, args.incoming.is_some())?;
    let quit = ender.clone();
    let monitor = Monitor::new(Arc::clone(&migration), move || quit.end(Request::Quit));
    let monitor: Arc<dyn Operator> = Arc::new(monitor);
    let config = SessionConfig {
        version: monitor::version(),
        oob: true,
        commands: COMMANDS,
    };
    let server = match &args.qmp {
        None => None,
        Some(address) => Some(
            qmp::serve(address, config, monitor, &events)
                .map_err(|error| format!("qmp at {address}: {error}"))?,
        ),
    };
    let _metrics = match &args.metrics {
        None => None,
        Some(address) => {
            let migration = Arc::clone(&migration);
            Some(metrics::serve(address, move || vec![migration.observe()])?)
        }
    };
    match &args.incoming {
        None if args.paused => {}
        None => {
            vm.resume()?;
        }
        Some(incoming) => {
            vm.set_autostart(!args.paused);
            if let IncomingArg::Uri(address) = incoming {
                migration
                    .start_incoming(address, true)
                    .map_err(|error| error.desc)?;
            }
        }
    }
    let input = (args.serial == SerialArg::Stdio).then(|| io::stdin().as_raw_fd());
    let ends = GuestEnds {
        reboot: args.reboot,
        no_shutdown: args.no_shutdown,
    };
    let ending = event_loop::run(&migration, signals, &ender, input, ends)?;
    migration.end();
    vm.stop(RunState::Shutdown)?;
    if let Some(server) = server {
        server.shutdown(Instant::now() + QMP_FAREWELL);
    }
    Ok(match ending {
        Ending::Guest(exit) => {
            if exit.status() != 0 {
                print_error(format!("colo-vmm: {exit}"));
            }
            ExitCode::from(exit.status())
        }
        Ending::Signal(signal) => {
            tracing::info!(signal, "ended by a signal");
            ExitCode::SUCCESS
        }
        Ending::Request(Request::Quit) => ExitCode::SUCCESS,
        Ending::Request(Request::IncomingFailed) => {
            let error = migration.status().info().error_desc.unwrap_or_default();
            print_error(format!("colo-vmm: incoming migration: {error}"));
            ExitCode::FAILURE
        }
    })
}
