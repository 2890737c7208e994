//! The command line.

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use migration_stream::io::PositionedFile;
use multifd::{Address, ChannelCount, Compression, MultifdConfig, ZlibLevel, ZstdLevel};

use crate::extract::Extract;
use crate::incoming::{ListenConfig, Listening};
use crate::inspection::Inspection;
use crate::report::Report;
use crate::scan::{FileOrigin, scan};
use crate::state;

/// Says what is in a migration stream of QEMU: configuration, RAM blocks and their pages, devices
/// with their fields, and what each part takes up.
///
/// The stream is a file (of `migrate file:PATH`, plain or with mapped-ram), or comes from a source
/// that migrates to --listen; that one is told at the end that the migration has failed, so that its
/// guest runs on there.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// The file.
    #[arg(required_unless_present = "listen")]
    file: Option<PathBuf>,
    /// Listen here, at tcp:HOST:PORT or unix:PATH, for a source.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "file")]
    listen: Option<Address>,
    /// Where in the file the stream begins, bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
    /// Show every field of every device.
    #[arg(long, conflicts_with = "json")]
    fields: bool,
    /// Print JSON as QEMU's analyze-migration.py does: with `-d state` or `-d desc`.
    #[arg(
        long,
        value_name = "WHAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "state"
    )]
    json: Option<Json>,
    /// Write each RAM block, desc.json and state.json into this directory.
    #[arg(long, value_name = "DIR")]
    extract: Option<PathBuf>,
    /// The source has multifd with this many channels.
    #[arg(long, value_name = "N", value_parser = channel_count, conflicts_with_all = ["file", "extract"])]
    multifd: Option<ChannelCount>,
    /// The compression of the source's channels.
    #[arg(
        long,
        value_name = "METHOD",
        default_value = "none",
        requires = "multifd"
    )]
    compression: Method,
    /// Take the stream of a source without return path, which cannot be told to keep its guest: when
    /// it has sent everything it stands still there, and `cont` has it run on.
    #[arg(long, conflicts_with = "file")]
    without_return_path: bool,
    /// How long the source may be silent, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Json {
    /// The devices' fields.
    State,
    /// The description of the devices.
    Desc,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Method {
    None,
    Zlib,
    Zstd,
}

impl From<Method> for Compression {
    fn from(method: Method) -> Self {
        match method {
            Method::None => Self::None,
            Method::Zlib => Self::Zlib(ZlibLevel::default()),
            Method::Zstd => Self::Zstd(ZstdLevel::default()),
        }
    }
}

fn channel_count(s: &str) -> Result<ChannelCount, String> {
    s.parse()
        .ok()
        .and_then(ChannelCount::new)
        .ok_or_else(|| "expected 1 to 255 channels".into())
}

impl Cli {
    /// Does what it says.
    ///
    /// # Errors
    /// Whatever went wrong, for people.
    pub fn run(self) -> Result<(), Box<dyn Error>> {
        let mut extract = self.extract.as_ref().map(Extract::into).transpose()?;
        let found = self.inspect(extract.as_mut())?;
        if let Some(extract) = &extract {
            let desc = state::description(&found)?;
            extract.write("desc.json", &state::text(&desc)?)?;
            extract.write("state.json", &state::text(&state::state(&found)?)?)?;
        }
        match self.json {
            Some(Json::State) => println!("{}", state::text(&state::state(&found)?)?),
            Some(Json::Desc) => println!("{}", state::text(&state::description(&found)?)?),
            None => print!("{}", Report::new(&found).text(self.fields)?),
        }
        Ok(())
    }

    fn inspect(&self, extract: Option<&mut Extract>) -> Result<Inspection, Box<dyn Error>> {
        let Some(at) = &self.listen else {
            let path = self.file.as_deref().ok_or("neither a file nor --listen")?;
            let opened = File::open(path);
            let file = opened.map_err(|e| format!("opening {}: {e}", path.display()))?;
            let bar = ProgressBar::new(file.metadata()?.len()).with_style(
                ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}")?,
            );
            let file: Arc<dyn PositionedFile> = Arc::new(file);
            let (mut origin, reader) = FileOrigin::open(file, self.offset);
            let found = scan(reader, &mut origin, extract, &mut |offset| {
                bar.set_position(offset);
            });
            bar.finish_and_clear();
            return Ok(found?);
        };
        let timeout = Duration::from_secs(self.timeout);
        let listening = Listening::open(ListenConfig {
            at: at.clone(),
            multifd: self.multifd.map(|channels| MultifdConfig {
                channels,
                compression: self.compression.into(),
                stall_limit: timeout,
                ..MultifdConfig::default()
            }),
            without_return_path: self.without_return_path,
            timeout,
        })?;
        eprintln!("listening on {}", listening.address());
        let (mut origin, reader) = listening.accept()?;
        let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template(
            "{spinner} {bytes}, {bytes_per_sec}",
        )?);
        let found = scan(reader, &mut origin, extract, &mut |offset| {
            bar.set_position(offset);
        });
        bar.finish_and_clear();
        Ok(found?)
    }
}

/// An error and its causes, on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let mut said: Vec<String> = Vec::new();
    for cause in causes.map(ToString::to_string) {
        if said.last() != Some(&cause) {
            said.push(cause);
        }
    }
    said.join(": ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_fit_each_other() {
        Cli::command().debug_assert();
        let parse = |args: &str| Cli::try_parse_from(args.split(' '));
        assert_eq!(parse("inspect f --json").unwrap().json, Some(Json::State));
        assert_eq!(parse("inspect --json f").unwrap().json, Some(Json::State));
        assert_eq!(
            parse("inspect f --json=desc").unwrap().json,
            Some(Json::Desc)
        );
        assert!(parse("inspect --listen unix:x --multifd 4 --compression zstd").is_ok());
        assert!(parse("inspect f --extract d --json").is_ok());
        for wrong in [
            "inspect",
            "inspect f --listen tcp::1",
            "inspect f --multifd 2",
            "inspect --listen tcp::1 --compression zlib",
            "inspect --listen tcp::1 --multifd 2 --extract d",
            "inspect f --fields --json",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
