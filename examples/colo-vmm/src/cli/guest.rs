//! `colo-vmm guest`.

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::machine::{MachineArgs, WorkloadArgs};
use crate::guest::workload;

#[derive(Debug, Args)]
pub(super) struct GuestArgs {
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    workload: WorkloadArgs,
}

/// Writes the guest to its file.
pub(super) fn write(args: &GuestArgs) -> Result<ExitCode, Box<dyn Error>> {
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
