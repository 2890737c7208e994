//! A VMM of one vCPU and a serial line, whose guest counts. It migrates to another process, to a file and
//! back, and goes on when its process is killed. `README.md` says how to run it.

mod colo;
mod guest;
mod machine;
mod migrate;
mod vcpu;

use std::fs::File;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::{Parser, Subcommand};
use colo_core::Outcome;
use migration_net::{Address, Listener};
use migration_stream::{BoxError, VmControl};

use self::machine::Machine;

/// A VMM of one vCPU whose guest counts.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Multifd channels.
    #[arg(long, global = true, default_value_t = 0)]
    channels: u8,
    /// Seconds that the guest runs before it leaves.
    #[arg(long, global = true, default_value_t = 1.0)]
    after: f64,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the guest.
    Run,
    /// Runs the guest, and then sends it to another process.
    Send { to: Address },
    /// Waits for a guest, and runs it.
    Receive { at: Address },
    /// Runs the guest, and then writes it into a file.
    Save { path: String },
    /// Runs the guest that is in a file.
    Restore { path: String },
    /// Runs the guest, protected by a secondary.
    Primary { to: Address, beats: Address },
    /// Protects a primary's guest.
    Secondary { at: Address, beats: Address },
}

fn main() -> Result<(), BoxError> {
    let arguments = Arguments::parse();
    let route = migrate::route(arguments.channels)?;
    let mut machine = Machine::new()?;
    let log = machine.log()?;
    let is_source = matches!(
        arguments.command,
        Command::Run | Command::Send { .. } | Command::Save { .. } | Command::Primary { .. }
    );
    if is_source {
        machine.vm.resume()?;
        thread::sleep(Duration::try_from_secs_f64(arguments.after)?);
    }
    match arguments.command {
        Command::Run => {}
        Command::Send { to } => match migrate::away(&route, &mut machine, log, &to) {
            Ok(_) => return Ok(()),
            Err(error) => stays(&*error),
        },
        Command::Save { path } => match migrate::save(&route, &mut machine, log, &path) {
            Ok(()) => return Ok(()),
            Err(error) => stays(&*error),
        },
        // ANCHOR: receive
        Command::Receive { at } => {
            let from = route.accept(Listener::bind(&at)?)?;
            migrate::receive(&route, &mut machine, from)?;
        }
        // ANCHOR_END: receive
        // ANCHOR: restore
        Command::Restore { path } => {
            migrate::receive(&route, &mut machine, Arc::new(File::open(path)?))?;
        }
        // ANCHOR_END: restore
        Command::Primary { to, beats } => {
            let ended = colo::primary(&route, machine, log, &to, beats);
            ended.map_or_else(|error| stays(&*error), went_on);
        }
        Command::Secondary { at, beats } => {
            went_on(colo::secondary(&route, machine, log, &at, beats)?);
        }
    }
    wait()
}

/// The vCPU's thread goes on.
fn wait() -> ! {
    loop {
        thread::park();
    }
}

/// The guest has not left. It runs on here, unless its outcome is unknown: then it stays paused.
fn stays(error: &(dyn std::error::Error + 'static)) {
    eprintln!("the guest stays: {error}");
}

/// COLO has ended. The heartbeat lasts as long as the guest.
fn went_on((outcome, _heartbeat): colo::Ended) {
    match outcome {
        Outcome::TookOver => wait(),
        other => {
            eprintln!("the guest does not run here: {other:?}");
            std::process::exit(1);
        }
    }
}
