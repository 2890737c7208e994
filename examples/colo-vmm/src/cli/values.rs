//! Values that options have.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use colo_core::{OnPeerLoss, Resume};
use migration_stream::{Escaped, WhenToCompare};
use qmp_types::MigrationAddress;
use ram_cache::CacheKind;

use crate::lossy_writer::LossyWriter;
use crate::machine::SerialSink;

/// The value of `--incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum IncomingArg {
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
    /// When the secondary has received all of the checkpoint, and will load it whatever happens here.
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
    /// Pages are compared as long as that saves time.
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
            Self::Stdio => Box::new(LossyWriter::new(io::stdout())),
            // It may be a FIFO.
            Self::File(path) => Box::new(LossyWriter::new(File::create(path)?)),
            Self::Null => Box::new(io::sink()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
