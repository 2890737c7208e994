//! The command line: a module for each subcommand that has none of its own elsewhere.

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::demo::{self, DemoArgs};
use crate::lifecycle::{self, FailoverArgs, PairArgs, RejoinArgs, StatusArgs};
use crate::standby::{self, StandbyArgs};

mod guest;
mod machine;
mod run;
mod values;

use guest::GuestArgs;
pub(crate) use machine::{MEMORY_MIB, VCPUS, max_device_state, mebibytes};
pub use machine::{MachineArgs, WorkloadArgs};
use run::RunArgs;
pub(crate) use run::TAKES_OVER_BLINDLY;
pub use values::{GuestArg, PeerLossArg, RamCacheArg, ResumeArg, SerialArg, SkipUnchangedArg};

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

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// Whatever the user should read.
    pub fn run(self) -> Result<ExitCode, Box<dyn Error>> {
        match self.command {
            Command::Run(args) => run::run(&args),
            Command::Guest(args) => guest::write(&args),
            Command::Demo(args) => Ok(demo::run(&args)?),
            Command::Pair(args) => lifecycle::pair(&args).map(|()| ExitCode::SUCCESS),
            Command::Failover(args) => lifecycle::failover(&args).map(|()| ExitCode::SUCCESS),
            Command::Rejoin(args) => lifecycle::rejoin(&args).map(|()| ExitCode::SUCCESS),
            Command::Status(args) => lifecycle::status(&args).map(|()| ExitCode::SUCCESS),
            Command::Standby(args) => standby::run(&args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::migration::MigrationOptions;

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
}
