//! What the demo can be told.

use clap::{Args, ValueEnum};
use qmp_types::MultiFdCompression;

use super::report::Setup;
use crate::cli::{MEMORY_MIB, RamCacheArg, ResumeArg, VCPUS};

/// What the demo shows.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Who is killed after the checkpoints.
    #[arg(long, value_enum, default_value_t = Victim::Primary)]
    pub failover: Victim,
    /// Number of multifd channels; 0 for one plain connection.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub multifd: u8,
    /// How the channels compress pages.
    #[arg(long, value_enum, default_value_t = Compression::None)]
    pub compression: Compression,
    /// Guest RAM, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(MEMORY_MIB))]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(VCPUS))]
    pub vcpus: u8,
    /// Pages that each vCPU of the guest dirties again and again.
    #[arg(long, value_name = "N", default_value_t = 2560)]
    pub dirty_pages: u32,
    /// Checkpoints to take before the failover, at least.
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoints: u64,
    /// Between two checkpoints, ms.
    #[arg(long, value_name = "MS", default_value_t = 200)]
    pub delay: u32,
    /// What the pair is connected by.
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub transport: Transport,
    /// What the secondary keeps checkpoints in.
    #[arg(long, value_enum, default_value_t = RamCacheArg::Cow)]
    pub ram_cache: RamCacheArg,
    /// When the primary's guest runs again in a checkpoint. With `copied` its output is held until the
    /// secondary has the checkpoint that it came from.
    #[arg(long, value_enum, default_value_t = ResumeArg::Loaded)]
    pub resume: ResumeArg,
    /// Send pages between checkpoints, at most this many MiB a second; 0 for no limit.
    #[arg(long, value_name = "MIB")]
    pub gap_bandwidth: Option<u64>,
    /// Turns of an empty loop that each vCPU of the guest makes after it has dirtied its pages.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub pass_delay: u32,
    /// Compare hashes of guest RAM and device state at every checkpoint; makes pauses longer.
    #[arg(long)]
    pub verify: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Run a simulated guest; needs no KVM.
    #[arg(long)]
    pub sim: bool,
    /// Keep the serial lines' and logs' directory.
    #[arg(long)]
    pub keep: bool,
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Victim {
    /// The side whose guest's output goes out: the secondary takes over.
    Primary,
    /// The side that stands by: the primary goes on alone.
    Secondary,
    /// Nobody: both are told to quit.
    None,
}

/// How multifd channels compress pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Not at all.
    None,
    /// zstd, one stream a channel.
    Zstd,
}

impl Compression {
    pub(super) const fn parameter(self) -> MultiFdCompression {
        match self {
            Self::None => MultiFdCompression::None,
            Self::Zstd => MultiFdCompression::Zstd,
        }
    }
}

/// What the pair is connected by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP over the loopback interface.
    Tcp,
    /// A Unix socket.
    Unix,
}

impl DemoArgs {
    /// The command line that both sides have in common.
    pub(super) fn machine_args(&self) -> Vec<String> {
        let mut line = vec!["run".to_owned()];
        for (option, value) in [
            ("--guest", "workload".to_owned()),
            ("--memory", self.memory.to_string()),
            ("--vcpus", self.vcpus.to_string()),
            ("--dirty-pages", self.dirty_pages.to_string()),
            ("--pass-delay", self.pass_delay.to_string()),
            ("--ram-cache", name(&self.ram_cache)),
            ("--resume", name(&self.resume)),
        ] {
            line.extend([option.to_owned(), value]);
        }
        if let Some(mib) = self.gap_bandwidth {
            line.extend(["--gap-bandwidth".to_owned(), mib.to_string()]);
        }
        for (option, given) in [
            ("--sim", self.sim),
            ("--verify", self.verify),
            ("--output-commit", self.resume == ResumeArg::Copied),
        ] {
            if given {
                line.push(option.to_owned());
            }
        }
        line
    }

    /// The part of the report that says what was run.
    pub(super) fn setup(&self) -> Setup {
        Setup {
            machine: if self.sim { "sim" } else { "kvm" },
            memory_mib: self.memory,
            vcpus: self.vcpus,
            dirty_pages: self.dirty_pages,
            transport: name(&self.transport),
            multifd_channels: self.multifd,
            compression: name(&self.compression),
            checkpoint_delay_ms: self.delay,
            resume: name(&self.resume),
            gap_bandwidth_mib: self.gap_bandwidth,
            verify: self.verify,
        }
    }
}

/// The name a value has on the command line.
fn name(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::demo::DemoError;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        demo: DemoArgs,
    }

    fn parse(line: &str) -> Result<DemoArgs, clap::Error> {
        let words = ["demo"].into_iter().chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.demo)
    }

    #[test]
    fn without_options_ten_checkpoints_are_taken_and_the_primary_killed() {
        let args = parse("").unwrap();
        assert_eq!((args.checkpoints, args.failover), (10, Victim::Primary));
        assert_eq!((args.multifd, args.transport), (2, Transport::Tcp));
        assert_eq!(
            args.machine_args().join(" "),
            "run --guest workload --memory 256 --vcpus 1 --dirty-pages 2560 --pass-delay 0 --ram-cache cow --resume loaded"
        );
        let args =
            parse("--sim --verify --memory 32 --ram-cache mirror --resume received").unwrap();
        assert_eq!(
            args.machine_args().join(" "),
            "run --guest workload --memory 32 --vcpus 1 --dirty-pages 2560 --pass-delay 0 --ram-cache mirror --resume received --sim --verify"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(parse("--failover both").is_err());
        assert!(parse("--checkpoints 0").is_err());
        let args = parse("--multifd 0 --compression zstd --sim").unwrap();
        assert!(matches!(
            crate::demo::run(&args),
            Err(DemoError::CompressionWithoutMultifd)
        ));
    }
}
