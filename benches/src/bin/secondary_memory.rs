//! How much memory a secondary takes, for each cache: a pair of `colo-vmm` around a guest that uses all of
//! its memory and dirties a part of it again and again.

use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use ::tests::Result;
use ::tests::guest::{Dirtier, Filler};
use ::tests::harness::missing_kvm;
use ::tests::resident::Resident;
use ::tests::vmm::{ColoVmm, Connection, Pair};
use clap::Parser;

/// Measures what a secondary takes of memory.
#[derive(Debug, Parser)]
struct Arguments {
    /// What the secondary keeps checkpoints in.
    #[arg(long, value_delimiter = ',', default_values_t = ["mirror".to_owned(), "cow".to_owned()])]
    ram_cache: Vec<String>,
    /// Guest memory, MiB.
    #[arg(long, value_delimiter = ',', default_values_t = [256, 1024])]
    memory: Vec<u32>,
    /// Part of it that the guest dirties between two checkpoints, in a hundred.
    #[arg(long, default_value_t = 10)]
    dirtied: u32,
    /// Checkpoints to be seen.
    #[arg(long, default_value_t = 20)]
    checkpoints: usize,
    /// Milliseconds from one checkpoint to the next.
    #[arg(long, default_value_t = 200)]
    delay: u32,
}

/// Between two looks: several in a checkpoint.
const LOOK: Duration = Duration::from_millis(3);

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("secondary_memory: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if let Some(reason) = missing_kvm() {
        return Err(reason.into());
    }
    println!(
        "| cache | guest MiB | dirtied MiB | looks | median MiB | most MiB | median/guest | most/guest | flush ms p50 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for &memory in &arguments.memory {
        for cache in &arguments.ram_cache {
            println!("{}", measure(arguments, cache, memory)?);
        }
    }
    Ok(())
}

/// One line of the table.
fn measure(arguments: &Arguments, cache: &str, memory: u32) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let pages = (memory << 8) * arguments.dirtied / 100;
    let guest = Filler {
        end: memory << 20,
        then: Dirtier {
            start: 16 << 20,
            pages,
        },
    };
    guest.write_disk(&disk)?;
    let mut pair = Pair::in_colo(
        &colo_vmm(cache, memory, &disk),
        Connection::channels(2),
        arguments.delay,
    )?;
    let mut looks = Vec::new();
    let wanted = pair.secondary.checkpoints()?.len() + arguments.checkpoints;
    while pair.secondary.checkpoints()?.len() < wanted {
        for _ in 0..10 {
            looks.push(Resident::of(pair.secondary.process.id())?.total());
            thread::sleep(LOOK);
        }
    }
    let mut flushes: Vec<u64> = pair
        .secondary
        .checkpoints()?
        .iter()
        .filter_map(|checkpoint| {
            let steps = checkpoint["steps"].as_array()?;
            let is_flush =
                |s: &&serde_json::Value| s["step"].as_str().is_some_and(|s| s.contains("flush"));
            steps.iter().find(is_flush)?["us"].as_u64()
        })
        .collect();
    flushes.sort_unstable();
    looks.sort_unstable();
    let (Some(&most), median) = (looks.last(), looks[looks.len() / 2]) else {
        return Err("no look was taken".into());
    };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let ratio = |bytes: u64| mib(bytes) / f64::from(memory);
    Ok(format!(
        "| {cache} | {memory} | {:.1} | {} | {:.1} | {:.1} | {:.3} | {:.3} | {:.1} |",
        f64::from(pages) / 256.0,
        looks.len(),
        mib(median),
        mib(most),
        ratio(median),
        ratio(most),
        flushes
            .get(flushes.len() / 2)
            .map_or(0.0, |&us| us as f64 / 1e3),
    ))
}

fn colo_vmm(cache: &str, memory: u32, disk: &Path) -> ColoVmm {
    ColoVmm::new("colo-vmm")
        .memory(memory)
        .args(["--ram-cache", cache, "--guest"])
        .args([format!("boot:{}", disk.display())])
}
