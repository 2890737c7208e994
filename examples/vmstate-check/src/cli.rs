//! The command line.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use tool_support::output::ascii_json;

use crate::finding::{Finding, Severity, is_compatible};
use crate::{Dump, check};

/// The exit code for what is no verdict: options or dumps that cannot be used.
pub const UNUSABLE: Verdict = Verdict(2);

/// Says whether the device state of one build loads in another.
///
/// SRC and DEST are dumps of the source and of the destination: what `qemu-system-… -M MACHINE
/// -dump-vmstate FILE` writes. The exit code is 0 if streams load, 1 if they do not, and 2 if the
/// dumps cannot be read.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// The dumps, the source's first.
    #[arg(value_names = ["SRC", "DEST"], num_args = 2, required_unless_present = "src")]
    files: Vec<PathBuf>,
    /// The source's dump.
    #[arg(
        short,
        long,
        value_name = "FILE",
        requires = "dest",
        conflicts_with = "files"
    )]
    src: Option<PathBuf>,
    /// The destination's dump.
    #[arg(
        short,
        long,
        value_name = "FILE",
        requires = "src",
        conflicts_with = "files"
    )]
    dest: Option<PathBuf>,
    /// Compare in the other direction: streams of DEST in SRC.
    #[arg(short, long)]
    reverse: bool,
    /// Compare only this kind of device; several may be named.
    #[arg(long, value_name = "NAME")]
    device: Vec<String>,
    /// Leave out what only may stand against loading.
    #[arg(long)]
    no_warnings: bool,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
}

/// What a comparison came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict(u8);

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        verdict.0.into()
    }
}

impl Cli {
    /// Compares, and writes what was found to `out`.
    ///
    /// # Errors
    /// A dump cannot be read, the source lacks a device that was named, or nothing can be written;
    /// for people.
    pub fn run(self, out: &mut impl Write) -> Result<Verdict, Box<dyn Error>> {
        let (mut source, mut destination) = self.dumps()?;
        if self.reverse {
            std::mem::swap(&mut source, &mut destination);
        }
        if !self.device.is_empty() {
            if let Some(name) = self.device.iter().find(|n| source.device(n).is_none()) {
                return Err(format!("the source has no device '{name}'").into());
            }
            source.retain(|name| self.device.iter().any(|d| d == name));
        }
        let mut findings = check(&source, &destination);
        let is_compatible = is_compatible(&findings);
        if self.no_warnings {
            findings.retain(|f| f.severity() == Severity::Error);
        }
        if self.json {
            let report = json!({"compatible": is_compatible, "findings": findings});
            writeln!(out, "{}", ascii_json(&format!("{report:#}")))?;
        } else {
            write(out, &findings, is_compatible)?;
        }
        out.flush()?;
        Ok(Verdict(u8::from(!is_compatible)))
    }

    fn dumps(&self) -> Result<(Dump, Dump), Box<dyn Error>> {
        let (source, destination): (&Path, &Path) =
            match (&self.src, &self.dest, self.files.as_slice()) {
                (Some(source), Some(destination), _) => (source, destination),
                (_, _, [source, destination]) => (source, destination),
                _ => return Err("a source's and a destination's dump are needed".into()),
            };
        Ok((Dump::read(source)?, Dump::read(destination)?))
    }
}

fn write(out: &mut impl Write, findings: &[Finding], is_compatible: bool) -> std::io::Result<()> {
    for finding in findings {
        writeln!(out, "{finding}")?;
    }
    let count = |severity| {
        let count = findings.iter().filter(|f| f.severity() == severity).count();
        format!("{count} {severity}{}", if count == 1 { "" } else { "s" })
    };
    let verdict = if is_compatible {
        "compatible"
    } else {
        "not compatible"
    };
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    writeln!(out, "{verdict}: {errors}, {warnings}")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_fit_each_other() {
        Cli::command().debug_assert();
        let accepts = |args: &str| Cli::try_parse_from(args.split(' ')).is_ok();
        assert!(accepts("check a b"));
        assert!(accepts("check -s a -d b"));
        assert!(accepts("check --src a --dest b --reverse"));
        assert!(accepts("check -r a b --json --device pit --device rtc"));
        assert!(!accepts("check a"));
        assert!(!accepts("check a b c"));
        assert!(!accepts("check -s a"));
        assert!(!accepts("check -d a b"));
        assert!(!accepts("check --json"));
    }
}
