//! How sides are, a line each.

use std::error::Error;
use std::thread;
use std::time::Duration;

use qmp_types::{ColoFigures, ColoMode, ColoStatus, Command, MigrationInfo, StatusInfo};

use super::remote::{Remote, RemoteError};
use crate::error_chain::chain;
use crate::lossy_writer::print;
use crate::qmp::QmpAddress;

/// Prints a line for each side; with `every` again and again.
pub(super) fn show(sides: &[QmpAddress], every: Option<Duration>) -> Result<(), Box<dyn Error>> {
    let mut connected: Vec<Option<Remote>> = sides.iter().map(|_| None).collect();
    loop {
        let mut is_read = print(HEAD);
        for (address, remote) in sides.iter().zip(&mut connected) {
            match line(address, remote) {
                Ok(line) => is_read &= print(line),
                // It may come back under the same address.
                Err(error) if every.is_some() => {
                    *remote = None;
                    let side = address.to_string();
                    is_read &= print(format_args!("{side:<32} {}", chain(&error)));
                }
                Err(error) => return Err(error.into()),
            }
        }
        match every {
            // Nobody reads on: `colo-vmm status --every 1 | head`.
            _ if !is_read => return Ok(()),
            Some(every) => thread::sleep(every),
            None => return Ok(()),
        }
    }
}

const HEAD: &str = "side                             guest          migration   colo       checkpoints \
                    last pause ms  its age ms   its bytes  ahead MiB/s";

fn line(address: &QmpAddress, remote: &mut Option<Remote>) -> Result<String, RemoteError> {
    let side = match remote {
        Some(side) => side,
        None => remote.insert(Remote::connect("side", address)?),
    };
    let status: StatusInfo = side.query(&Command::QueryStatus)?;
    let migration: MigrationInfo = side.query(&Command::QueryMigrate)?;
    let colo: ColoStatus = side.query(&Command::QueryColoStatus)?;
    let figures: ColoFigures = side.query(&Command::XQueryColoFigures)?;
    // Nothing is said about events here.
    side.take_events().for_each(drop);
    let dash = || "-".to_owned();
    let state = migration.status.map_or_else(dash, |s| s.to_string());
    let mode = match (colo.mode, colo.last_mode) {
        (ColoMode::None, ColoMode::None) => dash(),
        (ColoMode::None, last) => format!("was {last}"),
        (mode, _) => mode.to_string(),
    };
    let ahead = match figures.gap_bandwidth {
        None => dash(),
        Some(0) => "no limit".to_owned(),
        Some(bytes) => mebibytes(bytes),
    };
    let last = figures.last;
    let pause = last
        .as_ref()
        .map_or_else(dash, |l| milliseconds(l.pause_us));
    let age = last.as_ref().map_or_else(dash, |l| l.age_ms.to_string());
    let bytes = last.map_or_else(dash, |l| (l.ram_bytes + l.device_bytes).to_string());
    Ok(format!(
        "{:<32} {:<14} {state:<11} {mode:<10} {:>11} {pause:>14} {age:>11} {bytes:>11} {ahead:>12}",
        address.to_string(),
        status.status.to_string(),
        figures.checkpoints
    ))
}

/// With one digit behind the point, by which a limit that is not 0 does not look like it.
fn mebibytes(bytes: u64) -> String {
    let tenths = (u128::from(bytes) * 10).div_ceil(1 << 20);
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn milliseconds(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}
