//! How fast the memory of a stopped guest crosses: from QEMU to QEMU, from QEMU to us, from us to
//! QEMU and from us to us, in turns on this machine, over the loopback, with the same content.
//!
//! A time is from the first connection to the confirmation: what QEMU's source calls its total
//! time, and ours measures alike. Memory is fresh in each run, on both sides, and every destination a
//! process of its own.

mod destination;
mod ours;
mod ram;
mod report;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ::tests::Result;
use ::tests::guest::{Content, write_memory};
use ::tests::harness::missing_kvm;
use ::tests::qemu::{self, Accel, Binary, Machine, Qemu};
use benches::connection::{Transport, Way};
use clap::{Parser, ValueEnum};
use migration_stream::opaque_tail::Tail;
use serde_json::json;

use destination::Destination;
use ram::Ram;
use report::Row;

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
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Way::value_variants().to_vec())]
    way: Vec<Way>,
    /// What connects the two.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    transport: Transport,
    /// Who sends and who receives.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = PAIRS)]
    pair: Vec<Pair>,
    /// What memory is before the guest moves, on both sides.
    #[arg(long, value_enum, default_value_t = State::Fresh)]
    memory_is: State,
    /// Little memory and one run: a check that everything runs, and arrives.
    #[arg(long)]
    smoke: bool,
    /// Where the figures go.
    #[arg(long, default_value = "throughput.json")]
    json: PathBuf,
    /// Where the drawing goes.
    #[arg(long, default_value = "throughput.svg")]
    svg: PathBuf,
    /// Be the destination of a run that another process measures.
    #[arg(long, hide = true)]
    destination: Option<destination::Arguments>,
}

/// What memory is before the guest moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum State {
    /// Only mapped, on both sides: each page is taken from the system when it is first touched.
    Fresh,
    /// That of the destination is all there when the source comes, that of the source only mapped.
    Ready,
    /// All there, as that of a guest that has run, and of a destination that has made ready (QEMU's
    /// `prealloc=on`).
    Populated,
}

impl State {
    const fn is_there_at_source(self) -> bool {
        matches!(self, Self::Populated)
    }

    const fn is_there_at_destination(self) -> bool {
        matches!(self, Self::Ready | Self::Populated)
    }
}

/// What memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Nothing that compresses.
    Random,
    /// 42 % zero pages.
    Mixed,
    /// Zero pages only.
    Zero,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Mixed => "mixed",
            Self::Zero => "zero",
        }
    }

    const fn content(self) -> Content {
        match self {
            Self::Random => Content::Random,
            Self::Mixed => Content::Mixed,
            Self::Zero => Content::Zero,
        }
    }

    /// A codec says most about the content that is like a guest's.
    fn is_apt_for(self, way: Way) -> bool {
        way != Way::Zstd2 || self == Self::Mixed
    }
}

/// Who sends and who receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Pair {
    #[value(name = "qemu-qemu")]
    QemuToQemu,
    #[value(name = "qemu-us")]
    QemuToUs,
    #[value(name = "us-qemu")]
    UsToQemu,
    #[value(name = "us-us")]
    UsToUs,
}

const PAIRS: [Pair; 4] = [
    Pair::QemuToQemu,
    Pair::QemuToUs,
    Pair::UsToQemu,
    Pair::UsToUs,
];

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::QemuToQemu => "QEMU to QEMU",
            Self::QemuToUs => "QEMU to us",
            Self::UsToQemu => "us to QEMU",
            Self::UsToUs => "us to us",
        })
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.destination {
        Some(destination) => destination.run(),
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
    file: &'a Path,
    transport: Transport,
    memory_is: State,
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

    fn source(&self, way: Way) -> Result<Qemu> {
        let mut vm = Machine::new(&self.machine, self.memory)
            .accel(Self::accel())
            .memory_from(self.file)
            .prealloc(self.memory_is.is_there_at_source())
            .start(self.qemu)?;
        configure(&mut vm, way)?;
        Ok(vm)
    }

    fn destination(&self, way: Way) -> Result<Qemu> {
        let prealloc = if self.memory_is.is_there_at_destination() {
            "on"
        } else {
            "off"
        };
        let memory = format!(
            "memory-backend-ram,id=ram0,size={}M,prealloc={prealloc}",
            self.memory
        );
        let mut vm = Machine::new(&self.machine, self.memory)
            .accel(Self::accel())
            .args(["-object", &memory, "-machine", "memory-backend=ram0"])
            .incoming()
            .start(self.qemu)?;
        configure(&mut vm, way)?;
        Ok(vm)
    }

    /// The memory of a source of ours.
    fn our_source(&self, blocks: &[(String, u64)]) -> Result<Ram> {
        let ram = Ram::with_content(blocks, self.file)?;
        if self.memory_is.is_there_at_source() {
            ram.populate()?;
        }
        Ok(ram)
    }

    /// A destination of ours.
    fn our_destination(&self, way: Way, blocks: &[(String, u64)]) -> Result<Destination> {
        let dir = tempfile::tempdir()?;
        let arguments = destination::Arguments {
            way,
            uri: self.transport.uri(dir.path()),
            blocks: blocks.to_vec(),
            is_populated: self.memory_is.is_there_at_destination(),
            expected: self.is_checked.then(|| self.file.to_owned()),
        };
        Destination::start(&arguments, dir)
    }

    /// How long one migration takes.
    fn run(&self, pair: Pair, way: Way, tail: &Tail, blocks: &[(String, u64)]) -> Result<Duration> {
        let config = way.multifd();
        match pair {
            Pair::QemuToQemu => {
                let mut destination = self.destination(way)?;
                let mut source = self.source(way)?;
                let uri = destination.listen(&self.transport.uri(destination.dir()))?;
                source.migrate(&uri)?;
                total_time(&mut source)
            }
            Pair::QemuToUs => {
                let mut source = self.source(way)?;
                let destination = self.our_destination(way, blocks)?;
                source.migrate(destination.uri())?;
                let time = total_time(&mut source);
                destination.join()?;
                time
            }
            Pair::UsToQemu => {
                let mut destination = self.destination(way)?;
                let uri = destination.listen(&self.transport.uri(destination.dir()))?;
                let ram = self.our_source(blocks)?;
                let time = ours::send(&uri, &self.machine, ram, tail, config)?;
                destination.wait_migration("completed")?;
                Ok(time)
            }
            Pair::UsToUs => {
                let destination = self.our_destination(way, blocks)?;
                let ram = self.our_source(blocks)?;
                let time = ours::send(destination.uri(), &self.machine, ram, tail, config)?;
                destination.join()?;
                Ok(time)
            }
        }
    }
}

fn configure(vm: &mut Qemu, way: Way) -> Result<()> {
    vm.qmp.enable(&["return-path"])?;
    // No limit: what is measured is how fast it can be.
    vm.qmp.set_parameters(json!({"max-bandwidth": 0}))?;
    way.configure(&mut vm.qmp)
}

fn total_time(source: &mut Qemu) -> Result<Duration> {
    let info = source.wait_migration("completed")?;
    let ms = info["total-time"]
        .as_u64()
        .ok_or_else(|| format!("no total time in {info}"))?;
    Ok(Duration::from_millis(ms))
}

fn measure(arguments: &Arguments) -> Result<()> {
    let (memory, runs) = if arguments.smoke {
        (64, 1)
    } else {
        (arguments.memory, arguments.runs.max(1))
    };
    let qemu = qemu::binaries()?
        .iter()
        .find(|binary| binary.is_since((11, 1)))
        .ok_or_else(|| format!("needs QEMU 11.1 or newer in {} or on PATH", qemu::VARIABLE))?;
    let (major, minor, _) = qemu.version();
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("memory");
    let mut guest = Guest {
        qemu,
        machine: format!("pc-q35-{major}.{minor}"),
        memory,
        file: &file,
        transport: arguments.transport,
        memory_is: arguments.memory_is,
        is_checked: arguments.smoke,
    };
    println!(
        "{qemu}, {memory} MiB, {runs} runs of each, {:?}, {:?}, {:?} memory",
        Guest::accel(),
        arguments.transport,
        arguments.memory_is
    );
    let mut rows = Vec::new();
    for &content in &arguments.content {
        write_memory(&file, u64::from(memory) << 20, content.content())?;
        let (tail, blocks) = devices(&mut guest)?;
        for &way in arguments.way.iter().filter(|way| content.is_apt_for(**way)) {
            let mut times = PAIRS.map(|_| Vec::new());
            for _ in 0..runs {
                for (pair, times) in PAIRS.into_iter().zip(&mut times) {
                    if !arguments.pair.contains(&pair) {
                        continue;
                    }
                    ram::warm(u64::from(memory) << 21)?;
                    times.push(guest.run(pair, way, &tail, &blocks)?);
                }
            }
            let row = Row::new(content.name(), way, memory, times);
            println!("{row}");
            rows.push(row);
        }
    }
    report::print(&rows);
    fs::write(&arguments.json, report::json(&qemu.to_string(), &rows))?;
    fs::write(&arguments.svg, report::svg(&rows))?;
    println!(
        "{} and {} written",
        arguments.json.display(),
        arguments.svg.display()
    );
    Ok(())
}

/// The devices of the machine, as it sends them, and its blocks.
fn devices(guest: &mut Guest<'_>) -> Result<(Tail, Vec<(String, u64)>)> {
    let mut source = guest.source(Way::Plain)?;
    let blocks = source.ram_blocks()?;
    let receiver = ours::Receiver::listen("tcp:127.0.0.1:0", Ram::fresh(&blocks)?, None)?;
    source.migrate(receiver.uri())?;
    total_time(&mut source)?;
    Ok((receiver.join()?.0, blocks))
}
