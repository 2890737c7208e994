//! How fast the memory of a stopped guest crosses: from QEMU to QEMU, from QEMU to us, from us to
//! QEMU and from us to us, one after the other over the same link, with the same content.
//!
//! A time is from the first connection to the confirmation: what QEMU's source calls its total
//! time, and ours measures alike. Every side is a process of its own, with new memory in each run.

mod ours;
mod ram;
mod side;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ::tests::Result;
use ::tests::guest::{Content, write_memory};
use ::tests::harness::missing_kvm;
use ::tests::qemu::{self, Accel, Binary, Machine, Qemu};
use ::tests::vmm;
use benches::iperf;
use benches::link::{Cable, Link, LinkArgs};
use benches::render;
use benches::report::{Ends, Kind, Migration, Report, State};
use benches::usage::CpuTime;
use benches::way::Way;
use clap::{Parser, ValueEnum};
use serde_json::json;

use ram::Ram;
use side::{Side, Told};

/// Measures how fast a guest's memory crosses, beside QEMU.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs of each case, of which the median is told.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Guest memory, MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// What memory holds.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::value_variants().to_vec())]
    content: Vec<Kind>,
    /// How it crosses; by `zstd-2` only what is mixed.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Way::Plain, Way::Multifd2])]
    way: Vec<Way>,
    #[command(flatten)]
    link: LinkArgs,
    /// Who sends and who receives.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Ends::value_variants().to_vec())]
    ends: Vec<Ends>,
    /// What memory is before the guest moves, on both sides.
    #[arg(long, value_enum, default_value_t = State::Populated)]
    memory_is: State,
    /// Little memory and one run: a check that everything runs, and arrives.
    #[arg(long)]
    smoke: bool,
    /// Write the figures here.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Be one side of a run that another process measures.
    #[arg(long, hide = true)]
    side: Option<Side>,
}

const fn content(kind: Kind) -> Content {
    match kind {
        Kind::Random => Content::Random,
        Kind::Mixed => Content::Mixed,
        Kind::Zero => Content::Zero,
    }
}

/// A codec says most about the content that is like a guest's.
fn is_apt(kind: Kind, way: Way) -> bool {
    way != Way::Zstd2 || kind == Kind::Mixed
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.side {
        Some(side) => side.run(),
        None => measure(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("throughput: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The machine on both sides.
#[derive(Debug)]
struct Guest<'a> {
    qemu: &'a Binary,
    machine: String,
    memory: u32,
    /// What the source's memory begins as.
    file: &'a Path,
    /// The devices, as a QEMU has sent them.
    devices: &'a Path,
    blocks: Vec<(String, u64)>,
    is_populated: bool,
    /// Whether what arrived at us is compared with the file.
    is_checked: bool,
}

impl Guest<'_> {
    fn accel() -> Accel {
        if missing_kvm().is_none() {
            Accel::Kvm
        } else {
            Accel::Tcg
        }
    }

    fn source(&self, cable: &Cable, way: Way) -> Result<Qemu> {
        let mut vm = Machine::new(&self.machine, self.memory)
            .accel(Self::accel())
            .memory_from(self.file)
            .prealloc(self.is_populated)
            .start_as(self.qemu, |command| cable.on(vmm::Side::Primary, command))?;
        configure(&mut vm, way)?;
        Ok(vm)
    }

    fn destination(&self, cable: &Cable, way: Way) -> Result<(Qemu, String)> {
        let prealloc = if self.is_populated { "on" } else { "off" };
        let memory = format!(
            "memory-backend-ram,id=ram0,size={}M,prealloc={prealloc}",
            self.memory
        );
        let mut vm = Machine::new(&self.machine, self.memory)
            .accel(Self::accel())
            .args(["-object", &memory, "-machine", "memory-backend=ram0"])
            .incoming()
            .start_as(self.qemu, |command| cable.on(vmm::Side::Secondary, command))?;
        configure(&mut vm, way)?;
        let uri = vm.listen(&cable.uri(vm.dir(), "migration"))?;
        Ok((vm, uri))
    }

    /// A source of ours that sends at once.
    fn our_source(&self, cable: &Cable, way: Way, uri: String) -> Result<side::Started> {
        let side = Side::Source {
            way,
            uri,
            machine: self.machine.clone(),
            blocks: self.blocks.clone(),
            content: self.file.to_owned(),
            devices: self.devices.to_owned(),
            is_populated: self.is_populated,
        };
        side.start(cable)
    }

    /// A destination of ours, with its sockets in `dir`.
    fn our_destination(&self, cable: &Cable, way: Way, dir: &Path) -> Result<side::Started> {
        let side = Side::Destination {
            way,
            uri: cable.uri(dir, "migration"),
            blocks: self.blocks.clone(),
            is_populated: self.is_populated,
            expected: self.is_checked.then(|| self.file.to_owned()),
        };
        side.start(cable)
    }

    /// One migration: its time, and the CPU time of both sides.
    fn run(&self, cable: &Cable, ends: Ends, way: Way) -> Result<Told> {
        let dir = tempfile::tempdir()?;
        match ends {
            Ends::QemuQemu => {
                let (mut destination, uri) = self.destination(cable, way)?;
                let mut source = self.source(cable, way)?;
                let before = cpu(&destination)?;
                let told = migrate(&mut source, &uri)?;
                destination.wait_migration("completed")?;
                Ok(with_cpu(told, cpu(&destination)? - before))
            }
            Ends::QemuUs => {
                let mut source = self.source(cable, way)?;
                let destination = self.our_destination(cable, way, dir.path())?;
                let told = migrate(&mut source, &destination.uri()?);
                let theirs = destination.join()?;
                Ok(with_cpu(told?, Duration::from_secs_f64(theirs.cpu_seconds)))
            }
            Ends::UsQemu => {
                let (mut destination, uri) = self.destination(cable, way)?;
                let before = cpu(&destination)?;
                let told = self.our_source(cable, way, uri)?.join()?;
                destination.wait_migration("completed")?;
                Ok(with_cpu(told, cpu(&destination)? - before))
            }
            Ends::UsUs => {
                let destination = self.our_destination(cable, way, dir.path())?;
                let told = self.our_source(cable, way, destination.uri()?)?.join()?;
                let theirs = destination.join()?;
                Ok(with_cpu(told, Duration::from_secs_f64(theirs.cpu_seconds)))
            }
        }
    }
}

fn with_cpu(told: Told, other: Duration) -> Told {
    Told {
        cpu_seconds: told.cpu_seconds + other.as_secs_f64(),
        ..told
    }
}

/// CPU time of a QEMU so far.
fn cpu(vm: &Qemu) -> Result<Duration> {
    Ok(CpuTime::of(vm.process.id(), |_| false)?.total)
}

fn configure(vm: &mut Qemu, way: Way) -> Result<()> {
    vm.qmp.enable(&["return-path"])?;
    // No limit: what is measured is how fast it can be.
    vm.qmp.set_parameters(json!({"max-bandwidth": 0}))?;
    way.configure(&mut vm.qmp)
}

/// Has a QEMU migrate: its time and its CPU time.
fn migrate(source: &mut Qemu, uri: &str) -> Result<Told> {
    let before = cpu(source)?;
    source.migrate(uri)?;
    let info = source.wait_migration("completed")?;
    let ms = info["total-time"]
        .as_u64()
        .ok_or_else(|| format!("no total time in {info}"))?;
    Ok(Told {
        seconds: Duration::from_millis(ms).as_secs_f64(),
        cpu_seconds: (cpu(source)? - before).as_secs_f64(),
    })
}

fn measure(arguments: &Arguments) -> Result<()> {
    let (memory, runs, ends) = if arguments.smoke {
        (64, 1, Ends::value_variants())
    } else {
        (
            arguments.memory,
            arguments.runs.max(1),
            arguments.ends.as_slice(),
        )
    };
    let qemu = qemu::binaries()?
        .iter()
        .find(|binary| binary.is_since((11, 1)))
        .ok_or_else(|| format!("needs QEMU 11.1 or newer in {} or on PATH", qemu::VARIABLE))?;
    let (major, minor, _) = qemu.version();
    let dir = tempfile::tempdir()?;
    let (file, devices) = (dir.path().join("memory"), dir.path().join("devices"));
    let mut guest = Guest {
        qemu,
        machine: format!("pc-q35-{major}.{minor}"),
        memory,
        file: &file,
        devices: &devices,
        blocks: Vec::new(),
        is_populated: arguments.memory_is == State::Populated,
        is_checked: arguments.smoke,
    };
    let mut report = Report::new(Some(qemu));
    for cable in arguments.link.lay(arguments.smoke)? {
        let link = cable.link();
        let seconds = if arguments.smoke { 1 } else { 3 };
        report.rates.push(iperf::measure(&cable, seconds)?);
        for &kind in &arguments.content {
            write_memory(&file, u64::from(memory) << 20, content(kind))?;
            find_devices(&mut guest)?;
            for &way in arguments.way.iter().filter(|way| is_apt(kind, **way)) {
                eprintln!("{link} {kind} {way}");
                let mut measured: Vec<_> = (ends.iter())
                    .map(|&ends| Migration {
                        link,
                        way,
                        content: kind,
                        memory_is: arguments.memory_is,
                        memory_mib: memory,
                        ends,
                        seconds: Vec::new(),
                        cpu_seconds: Vec::new(),
                    })
                    .collect();
                for _ in 0..runs {
                    for migration in &mut measured {
                        ram::warm(u64::from(memory) << 21)?;
                        let told = guest.run(&cable, migration.ends, way)?;
                        migration.seconds.push(told.seconds);
                        migration.cpu_seconds.push(told.cpu_seconds);
                    }
                }
                report.migrations.append(&mut measured);
                if let Some(json) = &arguments.json {
                    report.write(json)?;
                }
            }
        }
    }
    print!("{}", render::tables(&report));
    Ok(())
}

/// Learns the machine's blocks, and writes its devices as it sends them.
fn find_devices(guest: &mut Guest<'_>) -> Result<()> {
    let here = Cable::lay(Link::UNIX)?;
    let mut source = guest.source(&here, Way::Plain)?;
    guest.blocks = source.ram_blocks()?;
    let dir = tempfile::tempdir()?;
    let uri = here.uri(dir.path(), "devices");
    let receiver = ours::Receiver::listen(&uri, Ram::fresh(&guest.blocks)?, None)?;
    migrate(&mut source, receiver.uri())?;
    fs::write(guest.devices, receiver.join()?.0.as_bytes())?;
    Ok(())
}
