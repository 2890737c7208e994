//! A pair's life in one command each: what QMP takes seven to twelve commands for.
//!
//! | command | what it does |
//! |---|---|
//! | `colo-vmm pair` | starts two sides on this machine, or takes two that run anywhere, and brings them into COLO |
//! | `colo-vmm failover` | has a side go on alone |
//! | `colo-vmm rejoin` | gives a survivor a new secondary, while its guest runs on |
//! | `colo-vmm status` | says how the sides are, once or again and again |
//!
//! Each of them is an operator like any other: it says to the QMP sockets what a person would.

mod procedure;
mod progress;
mod remote;
mod start;
mod status;

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use migration_net::Address;
use qmp_types::MultiFdCompression;

use self::procedure::Connection;
use self::remote::Remote;
use self::start::{Started, start};
use crate::cli::TAKES_OVER_BLINDLY;
use crate::lossy_writer::print_error;
use crate::lossy_writer::say;
use crate::qmp::QmpAddress;

/// How long a side may take to answer, or to do what it was told at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the two sides are to be connected.
#[derive(Clone, Debug, Args)]
pub struct ConnectionArgs {
    /// Where the secondary listens for the guest. With port 0 it takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "tcp:127.0.0.1:0")]
    address: Address,
    /// Number of multifd channels; 0 for one plain connection.
    #[arg(long, value_name = "N", default_value_t = 2)]
    multifd: u8,
    /// How the channels compress pages.
    #[arg(long, value_enum, default_value_t = Method::None)]
    compression: Method,
    /// Between two checkpoints, ms.
    #[arg(long, value_name = "MS", default_value_t = 200)]
    delay: u32,
    /// The most that precopy sends, bytes a second; 0 for as much as there can be.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    max_bandwidth: u64,
    /// How long the guest may stand still at the end of precopy, ms. It stands still at every
    /// checkpoint afterwards.
    #[arg(long, value_name = "MS", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(1..=2_000_000))]
    downtime_limit: u64,
    /// How long until the first checkpoint, s; 0 for as long as it takes. A migration
    /// that takes longer is cancelled, and its guest runs on where it was.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// Slow the guest down while it writes memory as fast as pages leave, more and more until precopy
    /// comes to its end.
    #[arg(long)]
    auto_converge: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    None,
    Zlib,
    Zstd,
}

impl ConnectionArgs {
    fn connection(&self) -> Result<Connection, String> {
        if self.compression != Method::None && self.multifd == 0 {
            return Err("only multifd channels compress".into());
        }
        Ok(Connection {
            address: self.address.clone(),
            multifd: self.multifd,
            compression: match self.compression {
                Method::None => MultiFdCompression::None,
                Method::Zlib => MultiFdCompression::Zlib,
                Method::Zstd => MultiFdCompression::Zstd,
            },
            delay: self.delay,
            max_bandwidth: self.max_bandwidth,
            downtime_limit: self.downtime_limit,
            auto_converge: self.auto_converge,
            limit: (self.timeout > 0).then(|| Duration::from_secs(self.timeout)),
        })
    }
}

/// `colo-vmm pair`.
#[derive(Clone, Debug, Args)]
pub struct PairArgs {
    /// Start both sides on this machine; sockets, logs and serial lines go into this directory.
    #[arg(long, value_name = "DIR", required_unless_present_all = ["primary", "secondary"],
          conflicts_with_all = ["primary", "secondary"])]
    dir: Option<PathBuf>,
    /// QMP of the side whose guest it is, if it runs already.
    #[arg(long, value_name = "QMP", requires = "secondary")]
    primary: Option<QmpAddress>,
    /// QMP of the side that stands by, if it runs already: with `--incoming defer`.
    #[arg(long, value_name = "QMP", requires = "primary")]
    secondary: Option<QmpAddress>,
    #[command(flatten)]
    connection: ConnectionArgs,
    /// What both sides run: options of `colo-vmm run`. Where they name an address for --metrics, the
    /// secondary takes the next port, or the path with .secondary behind it.
    #[arg(last = true, value_name = "RUN OPTIONS", conflicts_with = "primary")]
    run: Vec<String>,
}

/// `colo-vmm failover`.
#[derive(Clone, Debug, Args)]
pub struct FailoverArgs {
    /// QMP of the side that is to go on.
    #[arg(value_name = "QMP")]
    survivor: QmpAddress,
    /// Do not ask the arbiter first: the other side certainly does not run.
    #[arg(long)]
    override_arbiter: bool,
}

/// `colo-vmm rejoin`.
#[derive(Clone, Debug, Args)]
pub struct RejoinArgs {
    /// QMP of the side that goes on, whichever it was.
    #[arg(value_name = "QMP")]
    survivor: QmpAddress,
    /// Start the new secondary on this machine; its socket, log and serial line go into this
    /// directory.
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "secondary",
        conflicts_with = "secondary"
    )]
    dir: Option<PathBuf>,
    /// QMP of the new secondary, if it runs already: with `--incoming defer`.
    #[arg(long, value_name = "QMP")]
    secondary: Option<QmpAddress>,
    #[command(flatten)]
    connection: ConnectionArgs,
    /// What the new secondary runs: options of `colo-vmm run`, those of the survivor.
    #[arg(last = true, value_name = "RUN OPTIONS", conflicts_with = "secondary")]
    run: Vec<String>,
}

/// `colo-vmm status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// QMP of each side.
    #[arg(value_name = "QMP", required = true)]
    sides: Vec<QmpAddress>,
    /// Say it again and again, until Ctrl-C.
    #[arg(long)]
    watch: bool,
    /// How often, ms.
    #[arg(long, value_name = "MS", default_value_t = 1000, requires = "watch",
          value_parser = clap::value_parser!(u64).range(1..))]
    interval: u64,
}

/// Brings two sides into COLO.
///
/// # Errors
/// Whatever the user should read. What was started for it is ended.
pub fn pair(args: &PairArgs) -> Result<(), Box<dyn Error>> {
    let connection = args.connection.connection()?;
    let (mut primary, mut secondary) = match (&args.primary, &args.secondary, &args.dir) {
        (Some(primary), Some(secondary), _) => (
            (Remote::connect("primary", primary)?, None),
            (Remote::connect("secondary", secondary)?, None),
        ),
        (_, _, Some(dir)) => {
            if takes_over_blindly(&args.run) {
                // Each side says so in its log.
                print_error(format!("warning: {TAKES_OVER_BLINDLY}"));
            }
            let secondary = start("secondary", dir, true, &for_secondary(&args.run)?)?;
            let primary = start("primary", dir, false, &args.run)?;
            (primary, secondary)
        }
        _ => return Err("neither --dir nor --primary and --secondary".into()),
    };
    let first = procedure::replicate(&mut primary.0, &mut secondary.0, &connection)?;
    for side in [&mut primary, &mut secondary] {
        said(side);
    }
    say(format_args!(
        "first checkpoint after {} ms",
        first.as_millis()
    ));
    Ok(())
}

/// Whether sides with these options take over without knowing whether the other one lives.
fn takes_over_blindly(run: &[String]) -> bool {
    let takes_over = run.iter().enumerate().any(|(i, word)| {
        word == "--on-peer-loss=take-over"
            || word == "--on-peer-loss" && run.get(i + 1).is_some_and(|value| value == "take-over")
    });
    let watches = |word: &String| word == "--heartbeat" || word.starts_with("--heartbeat=");
    takes_over && !run.iter().any(watches)
}

/// The options of the secondary, whose primary on the same machine has `run`: two cannot serve figures
/// at one address.
fn for_secondary(run: &[String]) -> Result<Vec<String>, String> {
    const OPTION: &str = "--metrics";
    let mut options = run.to_vec();
    let mut names_it = false;
    for option in &mut options {
        let joined = option
            .strip_prefix(OPTION)
            .and_then(|rest| rest.strip_prefix('='));
        match joined {
            Some(address) => *option = format!("{OPTION}={}", beside(address)?),
            None if names_it => *option = beside(option)?,
            None => {}
        }
        names_it = option == OPTION;
    }
    Ok(options)
}

/// The address beside `address`. A free port stays one.
fn beside(address: &str) -> Result<String, String> {
    let parsed: QmpAddress = address.parse().map_err(|e| format!("--metrics: {e}"))?;
    let next = match parsed {
        QmpAddress::Unix(path) => {
            let mut path = path.into_os_string();
            path.push(".secondary");
            QmpAddress::Unix(path.into())
        }
        QmpAddress::Tcp { host, port } => QmpAddress::Tcp {
            host,
            port: match port {
                0 => 0,
                port => port
                    .checked_add(1)
                    .ok_or("--metrics: there is no port behind 65535 for the secondary")?,
            },
        },
    };
    Ok(next.spelled())
}

/// Has a side go on alone.
///
/// # Errors
/// Whatever the user should read.
pub fn failover(args: &FailoverArgs) -> Result<(), Box<dyn Error>> {
    let mut survivor = Remote::connect("survivor", &args.survivor)?;
    let time = procedure::go_on_alone(&mut survivor, args.override_arbiter)?;
    say(format_args!("goes on alone after {} ms", time.as_millis()));
    Ok(())
}

/// Gives a survivor a new secondary.
///
/// # Errors
/// Whatever the user should read. A secondary that was started for it is ended; the survivor's guest
/// runs on in any case.
pub fn rejoin(args: &RejoinArgs) -> Result<(), Box<dyn Error>> {
    let connection = args.connection.connection()?;
    let mut survivor = Remote::connect("survivor", &args.survivor)?;
    procedure::check_alone(&mut survivor)?;
    let mut secondary = match (&args.secondary, &args.dir) {
        (Some(secondary), _) => (Remote::connect("secondary", secondary)?, None),
        (None, Some(dir)) => start("secondary", dir, true, &args.run)?,
        (None, None) => return Err("neither --dir nor --secondary".into()),
    };
    procedure::watch(&mut survivor, &mut secondary.0, &connection)?;
    let first = procedure::replicate(&mut survivor, &mut secondary.0, &connection)?;
    said(&mut secondary);
    say(format_args!(
        "first checkpoint after {} ms",
        first.as_millis()
    ));
    Ok(())
}

/// Says how sides are.
///
/// # Errors
/// Whatever the user should read; with `--watch` a side that cannot be asked is said to be gone.
pub fn status(args: &StatusArgs) -> Result<(), Box<dyn Error>> {
    status::show(
        &args.sides,
        args.watch.then(|| Duration::from_millis(args.interval)),
    )
}

/// Says what was started, and lets it run on when this process ends.
fn said(side: &mut (Remote, Option<Started>)) {
    if let Some(started) = side.1.take() {
        let (pid, qmp) = (started.pid(), started.qmp());
        say(format_args!("{}: process {pid}, qmp {qmp}", side.0.name()));
        started.keep();
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    enum Command {
        Pair(PairArgs),
        Failover(FailoverArgs),
        Rejoin(RejoinArgs),
        Status(StatusArgs),
    }

    #[test]
    fn the_options_fit_each_other() {
        let accepts = |line: &str| {
            Command::try_parse_from(["colo-vmm"].into_iter().chain(line.split(' '))).is_ok()
        };
        for line in [
            "pair --dir d",
            "pair --dir d --multifd 4 --compression zstd -- --memory 512 --sim",
            "pair --dir d --timeout 18446744073709551615 --auto-converge",
            "pair --primary unix:a --secondary tcp:far:4444 --address tcp:far:9998",
            "failover unix:a",
            "failover unix:a --override-arbiter",
            "rejoin unix:a --dir d -- --sim",
            "rejoin unix:a --secondary unix:b --delay 50",
            "status unix:a unix:b --watch --interval 100",
        ] {
            assert!(accepts(line), "{line}");
        }
        for line in [
            "pair",
            "pair --primary unix:a",
            "pair --dir d --primary unix:a --secondary unix:b",
            "rejoin unix:a",
            "failover",
            "status",
            "status unix:a --interval 100",
            "status unix:a --watch --interval 0",
            "pair --dir d --address nowhere",
            "pair --primary unix:a --secondary unix:b -- --memory 512",
            "rejoin unix:a --secondary unix:b -- --sim",
        ] {
            assert!(!accepts(line), "{line}");
        }
    }

    #[test]
    fn the_secondary_of_a_pair_serves_its_figures_beside_its_primary_s() {
        let options = |line: &str| {
            let run: Vec<String> = line.split(' ').map(str::to_owned).collect();
            for_secondary(&run).map(|options| options.join(" "))
        };
        for (run, secondary) in [
            ("--memory 16 --sim", "--memory 16 --sim"),
            (
                "--metrics tcp:127.0.0.1:9100 --sim",
                "--metrics tcp:127.0.0.1:9101 --sim",
            ),
            ("--metrics=tcp:[::1]:9100", "--metrics=tcp:[::1]:9101"),
            ("--metrics tcp:a:0", "--metrics tcp:a:0"),
            (
                "--sim --metrics unix:/run/figures",
                "--sim --metrics unix:/run/figures.secondary",
            ),
        ] {
            assert_eq!(options(run).as_deref(), Ok(secondary), "{run}");
        }
        for run in ["--metrics tcp:a:65535", "--metrics nowhere"] {
            let error = options(run).unwrap_err();
            assert!(error.starts_with("--metrics: "), "{error}");
        }
    }

    #[test]
    fn a_pair_that_takes_over_needs_a_heartbeat_to_know_when() {
        let blindly = |line: &str| {
            let run: Vec<String> = line.split(' ').map(str::to_owned).collect();
            takes_over_blindly(&run)
        };
        assert!(blindly("--sim --on-peer-loss take-over"));
        assert!(blindly("--on-peer-loss=take-over --heartbeat-interval 5"));
        for line in [
            "--sim",
            "--on-peer-loss wait",
            "--on-peer-loss take-over --heartbeat unix:x",
            "--heartbeat=unix:x --on-peer-loss=take-over",
        ] {
            assert!(!blindly(line), "{line}");
        }
    }

    #[test]
    fn nothing_but_channels_compresses() {
        let args = |line: &str| match Command::try_parse_from(line.split(' ')) {
            Ok(Command::Pair(args)) => args.connection.connection(),
            _ => Err(line.to_owned()),
        };
        assert!(args("colo-vmm pair --dir d --multifd 1 --compression zlib").is_ok());
        assert!(args("colo-vmm pair --dir d --multifd 0 --compression zlib").is_err());
    }
}
