//! The command line: one function for each subcommand.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use colo_core::{Deadlines, OnPeerLoss, Resume};
use migration_stream::Escaped;
use migration_stream::unchanged::WhenToCompare;
use multifd::ZstdRange;
use qmp_types::{MigrationAddress, RunState, SessionConfig};
use ram_cache::CacheKind;
use uuid::Uuid;

use crate::console::Console;
use crate::cpu_args::CpuArgs;
use crate::demo::{self, DemoArgs};
use crate::event_loop::{self, Ender, Ending, GuestEnds, Request};
use crate::guest::{WorkloadConfig, workload};
use crate::heartbeat::HeartbeatArgs;
use crate::lifecycle::{self, FailoverArgs, PairArgs, RejoinArgs, StatusArgs};
use crate::machine::{
    CpuOptions, GuestImage, KvmMachine, Machine, MachineConfig, SerialSink, SimMachine,
};
use crate::memory::{Memory, populated};
use crate::metrics;
use crate::migration::{Boundaries, Boundary, Halt, IncomingMode, Migration, MigrationOptions};
use crate::monitor::{self, COMMANDS, Monitor};
use crate::operator::{EventBus, Operator};
use crate::outlet::{Outlet, complain};
use crate::qmp::{self, QmpAddress};
use crate::standby::{self, StandbyArgs};
use crate::vm::Vm;

/// A small KVM VMM that outlives its host.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a guest.
    Run(Box<RunArgs>),
    /// Write the built-in guest to a file: a boot sector, which QEMU boots as well.
    Guest(GuestArgs),
    /// Run a COLO pair on this machine, kill one side, and show what the guest lost: nothing.
    Demo(DemoArgs),
    /// Bring two sides into COLO, and start them for it if they do not run yet.
    Pair(PairArgs),
    /// Have a side of a pair go on alone.
    Failover(FailoverArgs),
    /// Give a survivor a new secondary, while its guest runs on.
    Rejoin(RejoinArgs),
    /// Say how the sides of a pair are.
    Status(StatusArgs),
    /// Hold guests of QEMU, and restore them when their primary is lost.
    Standby(StandbyArgs),
}

/// Guest RAM that can be asked for, MiB: up to what page tables of four levels reach.
pub(crate) const MEMORY_MIB: RangeInclusive<u64> = 1..=(1 << 28) - 1;
/// How many vCPUs can be asked for. KVM may allow fewer.
pub(crate) const VCPUS: RangeInclusive<i64> = 1..=255;

/// Reads the value of `--max-device-state`, MiB.
pub(crate) fn max_device_state() -> RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=1 << 20)
}

/// Bytes of so many MiB.
pub(crate) fn mebibytes(count: u64) -> usize {
    usize::try_from(count).map_or(usize::MAX, |count| count.saturating_mul(1 << 20))
}

/// What a machine consists of.
#[derive(Clone, Debug, Args)]
pub struct MachineArgs {
    /// Guest RAM, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(MEMORY_MIB))]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(VCPUS))]
    pub vcpus: u8,
    /// Run a simulated guest in this process; needs no KVM, and runs only the workload.
    #[arg(long)]
    pub sim: bool,
}

/// The built-in guest's parameters.
#[derive(Clone, Debug, Args)]
pub struct WorkloadArgs {
    /// Pages that each vCPU of the workload dirties in a pass.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub dirty_pages: u32,
    /// Turns of an empty loop that each vCPU of the workload makes after a pass.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub pass_delay: u32,
    /// Before the workload begins every page of RAM is written to, so that none is zero. Above 4 GiB,
    /// where the guest does not reach, colo-vmm writes; the file of `colo-vmm guest` fills what is
    /// below 3 GiB.
    #[arg(long)]
    pub fill_ram: bool,
}

impl WorkloadArgs {
    /// The workload for a machine of this size.
    #[must_use]
    pub fn config(&self, memory_mib: u64, cpus: u8) -> WorkloadConfig {
        WorkloadConfig {
            memory_mib,
            dirty_pages: self.dirty_pages,
            pass_delay: self.pass_delay,
            cpus,
            fills_ram: self.fill_ram,
            ..WorkloadConfig::default()
        }
    }
}

#[derive(Debug, Args)]
struct RunArgs {
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
    /// What to do when COLO has lost the other side: wait for `x-colo-lost-heartbeat`, or take over.
    /// At most one of the two sides may take over by itself. Without a heartbeat nobody knows whether
    /// the other side is dead: one that was only frozen, or cut off, for longer than this side waits
    /// runs its guest again when it wakes, and then there are two. Only --heartbeat has it stop.
    #[arg(long, default_value = "wait", value_name = "wait|take-over")]
    on_peer_loss: PeerLossArg,
    /// As a primary, let out what the guest says on its serial line only once the secondary has
    /// received the checkpoint that contains what it came from. Say so on both sides: each may come
    /// to be the primary.
    #[arg(long)]
    output_commit: bool,
    /// As a primary, when the guest runs again in a checkpoint. `copied` needs `--output-commit`, and
    /// takes up memory for the copies.
    #[arg(long, default_value_t = ResumeArg::Loaded, value_enum,
          requires_if("copied", "output_commit"))]
    resume: ResumeArg,
    /// As a primary with multifd, send pages between checkpoints already, at most this many MiB a
    /// second, so that fewer are left for the checkpoint; 0 for no limit.
    #[arg(long, value_name = "MIB")]
    gap_bandwidth: Option<u64>,
    /// How much device state a guest that comes in may have, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = max_device_state())]
    max_device_state: u64,
    /// Take all of guest RAM from the system before the guest runs, or while it is waited for, unless it
    /// is for COLO: it arrives faster then, and takes up as much as it may ever have.
    #[arg(long)]
    prealloc: bool,
    /// Do not ask for huge pages for guest RAM. With them there are fewer page faults, and pages are
    /// lent (--splice-send) at less cost, but a byte that is written may take 2 MiB.
    #[arg(long)]
    no_huge_pages: bool,
    /// Lend pages to a peer on the same host instead of copying them into the connection. Only where the
    /// connection goes straight to the peer: a proxy that moves bytes by `splice(2)` would tear checkpoints.
    #[arg(long)]
    splice_send: bool,
    /// Copy pages into the connections to a peer on the same host: the default.
    #[arg(long, overrides_with = "splice_send")]
    no_lending: bool,
    /// As a source with multifd compressed by zstd, go up with the level where the network is the
    /// bottleneck and down where the processors are, within -7 to 12 (auto:MIN:MAX: within others,
    /// -100 to 20) [default: the parameter `multifd-zstd-level`].
    #[arg(long, value_name = "auto[:MIN:MAX]")]
    zstd_level: Option<ZstdRange>,
    /// As a primary, leave out of checkpoints the pages that were written without being changed: those
    /// of which the secondary has the content. `auto` compares pages as long as that pays, by what
    /// it measures.
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

/// The value of `--incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum IncomingArg {
    Defer,
    Uri(MigrationAddress),
}

impl FromStr for IncomingArg {
    type Err = String;

    fn from_str(arg: &str) -> Result<Self, String> {
        match arg {
            "defer" => Ok(Self::Defer),
            uri => uri
                .parse()
                .map(Self::Uri)
                .map_err(|e: qmp_types::QmpError| e.desc),
        }
    }
}

/// The value of `--ram-cache`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RamCacheArg {
    /// A second copy of guest RAM.
    Mirror,
    /// Guest RAM is a private mapping of the last checkpoint.
    Cow,
}

impl From<RamCacheArg> for CacheKind {
    fn from(arg: RamCacheArg) -> Self {
        match arg {
            RamCacheArg::Mirror => Self::Mirror,
            RamCacheArg::Cow => Self::Cow,
        }
    }
}

/// The value of `--resume`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ResumeArg {
    /// When the secondary has loaded the checkpoint, as with QEMU.
    Loaded,
    /// When the secondary has received all of it, and goes on to load it whatever happens here.
    Received,
    /// When it was copied on this side.
    Copied,
}

impl From<ResumeArg> for Resume {
    fn from(arg: ResumeArg) -> Self {
        match arg {
            ResumeArg::Loaded => Self::OnLoaded,
            ResumeArg::Received => Self::OnReceived,
            ResumeArg::Copied => Self::OnLocalCopy,
        }
    }
}

/// The value of `--skip-unchanged`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SkipUnchangedArg {
    /// All dirty pages are sent.
    Off,
    /// Pages are compared as long as it pays.
    Auto,
    /// Pages are compared in every checkpoint.
    Always,
}

impl From<SkipUnchangedArg> for Option<WhenToCompare> {
    fn from(arg: SkipUnchangedArg) -> Self {
        match arg {
            SkipUnchangedArg::Off => None,
            SkipUnchangedArg::Auto => Some(WhenToCompare::WhenItPays),
            SkipUnchangedArg::Always => Some(WhenToCompare::Always),
        }
    }
}

/// The value of `--on-peer-loss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PeerLossArg {
    /// Wait for an operator.
    Wait,
    /// Go on.
    TakeOver,
}

impl From<PeerLossArg> for OnPeerLoss {
    fn from(arg: PeerLossArg) -> Self {
        match arg {
            PeerLossArg::Wait => Self::Wait,
            PeerLossArg::TakeOver => Self::TakeOver,
        }
    }
}

impl RunArgs {
    fn migration_options(&self) -> io::Result<MigrationOptions> {
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
            lends: self.splice_send && !self.no_lending,
            zstd_level: self.zstd_level,
            max_device_state: mebibytes(self.max_device_state),
            prealloc: self.prealloc,
            boundaries: Arc::new(boundaries),
        })
    }
}

#[derive(Debug, Args)]
struct GuestArgs {
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    workload: WorkloadArgs,
}

/// Load address of a flat binary if none is given.
const FLAT_ADDRESS: u64 = 0x1_0000;

/// The value of `--guest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestArg {
    /// The built-in guest.
    Workload,
    /// The built-in guest that answers on its serial line.
    Answers,
    /// A boot sector.
    Boot(PathBuf),
    /// Real-mode code and its address.
    Flat(PathBuf, u64),
    /// A Linux kernel.
    Kernel(PathBuf),
}

impl FromStr for GuestArg {
    type Err = String;

    fn from_str(arg: &str) -> Result<Self, String> {
        match arg.split_once(':') {
            None if arg == "workload" => Ok(Self::Workload),
            None if arg == "answers" => Ok(Self::Answers),
            Some(("boot", file)) => Ok(Self::Boot(file.into())),
            Some(("kernel", file)) => Ok(Self::Kernel(file.into())),
            Some(("flat", rest)) => match rest.rsplit_once('@') {
                None => Ok(Self::Flat(rest.into(), FLAT_ADDRESS)),
                Some((file, address)) => number(address)
                    .map(|address| Self::Flat(file.into(), address))
                    .ok_or_else(|| format!("'{}' is not an address", Escaped(address))),
            },
            _ => Err(
                "expected workload, answers, boot:FILE, flat:FILE[@ADDRESS] or kernel:FILE".into(),
            ),
        }
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The value of `--serial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialArg {
    /// Standard input and output.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// Nowhere.
    Null,
}

impl FromStr for SerialArg {
    type Err = String;

    fn from_str(arg: &str) -> Result<Self, String> {
        match arg.split_once(':') {
            None if arg == "stdio" => Ok(Self::Stdio),
            None if arg == "null" => Ok(Self::Null),
            Some(("file", path)) => Ok(Self::File(path.into())),
            _ => Err("expected stdio, file:PATH or null".into()),
        }
    }
}

impl SerialArg {
    /// The sink it names.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn sink(&self) -> io::Result<SerialSink> {
        Ok(match self {
            Self::Stdio => Box::new(Outlet::new(io::stdout())),
            // It may be a FIFO.
            Self::File(path) => Box::new(Outlet::new(File::create(path)?)),
            Self::Null => Box::new(io::sink()),
        })
    }
}

impl MachineArgs {
    /// A stopped machine with `guest` in it, or an empty one for an incoming migration.
    ///
    /// # Errors
    /// See [`MachineError`](crate::machine::MachineError).
    pub fn build(
        &self,
        guest: Option<GuestImage>,
        serial: SerialSink,
        cpu: CpuOptions,
    ) -> Result<Box<dyn Machine>, Box<dyn Error>> {
        let config = MachineConfig {
            memory: Arc::new(Memory::new(self.memory.saturating_mul(1 << 20))?),
            vcpus: self.vcpus,
            guest,
            serial,
            cpu,
        };
        Ok(if self.sim {
            Box::new(SimMachine::new(config)?)
        } else {
            Box::new(KvmMachine::new(config)?)
        })
    }
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// Whatever the user should read.
    pub fn run(self) -> Result<ExitCode, Box<dyn Error>> {
        match self.command {
            Command::Run(args) => run(&args),
            Command::Guest(args) => guest(&args),
            Command::Demo(args) => Ok(demo::run(&args)?),
            Command::Pair(args) => lifecycle::pair(&args).map(|()| ExitCode::SUCCESS),
            Command::Failover(args) => lifecycle::failover(&args).map(|()| ExitCode::SUCCESS),
            Command::Rejoin(args) => lifecycle::rejoin(&args).map(|()| ExitCode::SUCCESS),
            Command::Status(args) => lifecycle::status(&args).map(|()| ExitCode::SUCCESS),
            Command::Standby(args) => standby::run(&args),
        }
    }
}

/// The kernel's command line if none is given.
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1";

impl RunArgs {
    /// What runs, as far as options fit it.
    fn image(&self) -> Result<GuestImage, String> {
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
            complain(format!("colo-vmm: warning: {TAKES_OVER_BLINDLY}"));
        }
    }
}

/// What an operator should know of a side that takes over without a heartbeat.
pub(crate) const TAKES_OVER_BLINDLY: &str = "--on-peer-loss take-over without --heartbeat: a peer that was only frozen or cut off, and wakes \
     after this side has taken over, is a second guest";

/// How long QMP clients have to take their last replies.
const QMP_FAREWELL: Duration = Duration::from_secs(1);

fn run(args: &RunArgs) -> Result<ExitCode, Box<dyn Error>> {
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
            migration.set_autostart(!args.paused);
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
                complain(format!("colo-vmm: {exit}"));
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
            complain(format!("colo-vmm: incoming migration: {error}"));
            ExitCode::FAILURE
        }
    })
}

fn guest(args: &GuestArgs) -> Result<ExitCode, Box<dyn Error>> {
    if args.machine.sim {
        return Err("--sim: the simulated guest is in no file".into());
    }
    let config = args
        .workload
        .config(args.machine.memory, args.machine.vcpus);
    let sector = workload(&config)?;
    fs::write(&args.out, sector)
        .map_err(|error| format!("cannot write {}: {error}", args.out.display()))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn refusal(line: &str) -> String {
        let words = ["colo-vmm"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(words) {
            Err(error) => error.to_string(),
            Ok(Cli {
                command: Command::Run(args),
            }) => args.image().err().unwrap_or_default(),
            Ok(_) => String::new(),
        }
    }

    #[test]
    fn a_number_out_of_range_is_told_the_range_that_there_is() {
        for (line, range) in [
            ("run --vcpus 256", "1..=255"),
            ("run --vcpus 0", "1..=255"),
            ("demo --vcpus 256", "1..=255"),
            ("run --memory 0", "1..=268435455"),
            ("demo --memory 18446744073709551615", "1..=268435455"),
            ("run --peer-timeout 0", "1..18446744073709551615"),
            ("run --max-device-state 0", "1..=1048576"),
            (
                "standby --incoming unix:x --restore-into unix:y --max-device-state 0",
                "1..=1048576",
            ),
        ] {
            let refusal = refusal(line);
            assert!(refusal.contains(range), "{line}: {refusal}");
        }
        assert_eq!(refusal("run --vcpus 255 --memory 4096"), "");
    }

    #[test]
    fn the_limit_of_device_state_is_that_of_the_command_line() {
        for (line, expected) in [
            ("run", MigrationOptions::default().max_device_state),
            ("run --max-device-state 3", 3 << 20),
        ] {
            let words = ["colo-vmm"].into_iter().chain(line.split(' '));
            let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else {
                panic!("{line}");
            };
            let options = args.migration_options().unwrap();
            assert_eq!(options.max_device_state, expected);
        }
    }

    #[test]
    fn an_option_that_would_do_nothing_is_refused() {
        for line in [
            "run --initrd x",
            "run --guest answers --cmdline x",
            "run --guest boot:x --fill-ram",
            "run --heartbeat-interval 100",
            "run --on-heartbeat-loss take-over",
        ] {
            assert_ne!(refusal(line), "", "{line}");
        }
        for line in [
            "run --guest kernel:x --initrd y --cmdline z",
            "run --fill-ram",
            "run --uuid 8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a11 --heartbeat unix:x --arbiter file:y",
        ] {
            assert_eq!(refusal(line), "", "{line}");
        }
    }

    #[test]
    fn guests_are_named_by_kind_and_file() {
        assert_eq!("workload".parse(), Ok(GuestArg::Workload));
        assert_eq!("answers".parse(), Ok(GuestArg::Answers));
        assert_eq!("boot:a:b".parse(), Ok(GuestArg::Boot("a:b".into())));
        assert_eq!("flat:x".parse(), Ok(GuestArg::Flat("x".into(), 0x1_0000)));
        assert_eq!(
            "flat:x@0x8000".parse(),
            Ok(GuestArg::Flat("x".into(), 0x8000))
        );
        assert!("flat:x@y".parse::<GuestArg>().is_err());
        assert!("vmlinux".parse::<GuestArg>().is_err());
        assert_eq!("file:x".parse(), Ok(SerialArg::File("x".into())));
        assert!("tty".parse::<SerialArg>().is_err());
    }
}
