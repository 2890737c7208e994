//! The command line.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use migration_net::Address;
use migration_stream::StreamReader;
use migration_stream::io::PositionedFile;
use multifd::{ChannelCount, Compression, MultifdConfig, ZlibLevel, ZstdLevel};

use crate::extract::Extract;
use crate::incoming::{ListenConfig, Listening};
use crate::inspection::Inspection;
use crate::report::Report;
use crate::scan::{FileOrigin, Origin, PipeOrigin, scan};
use crate::state;
use tool_support::input::{Input, find_stream};
use tool_support::number;
use tool_support::output::complain;

/// Says what is in a migration stream of QEMU: configuration, RAM blocks and their pages, devices
/// with their fields, and what each part takes up.
///
/// The stream is in a file (of `migrate file:PATH`, plain or with mapped-ram, or of `virsh save`), comes
/// through a pipe, or from a source that migrates to --listen; the source is told at the end that the
/// migration has failed, so that its guest runs on there.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// The file, a FIFO, or - for standard input (`zstd -dc FILE.zst | stream-inspect -`).
    #[arg(required_unless_present = "listen")]
    file: Option<PathBuf>,
    /// Listen here, at tcp:HOST:PORT or unix:PATH, for a source.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "file")]
    listen: Option<Address>,
    /// Where in the file the stream begins, bytes (0x1000, 4096, 4k).
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = number::bytes)]
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
    /// How much device state the guest may have, in MiB or with a unit: the graphics memory of a
    /// virtio-gpu is part of it.
    #[arg(long, value_name = "MIB", default_value = "512", value_parser = number::mebibytes)]
    max_device_state: u64,
    /// Take the stream of a source without return path, which cannot be told to keep its guest: when
    /// it has sent everything it stands still there, and `cont` has it run on.
    #[arg(long, conflicts_with = "file")]
    without_return_path: bool,
    /// How long the source may be silent, and how long all its connections may take to come, seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = number::number)]
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
    number::number(s)
        .ok()
        .and_then(|n| u8::try_from(n).ok())
        .and_then(ChannelCount::new)
        .ok_or_else(|| "expected 1 to 255 channels".into())
}

impl Cli {
    /// Reads the stream and writes what was found to `out`.
    ///
    /// # Errors
    /// Whatever went wrong, for people.
    pub fn run(self, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
        let mut extract = self.extract.as_ref().map(Extract::into).transpose()?;
        let found = self.inspect(extract.as_mut())?;
        if let Some(extract) = &extract {
            let desc = state::description(&found)?;
            extract.write("desc.json", &state::text(&desc)?)?;
            extract.write("state.json", &state::text(&state::state(&found)?)?)?;
        }
        match self.json {
            Some(Json::State) => writeln!(out, "{}", state::text(&state::state(&found)?)?)?,
            Some(Json::Desc) => writeln!(out, "{}", state::text(&state::description(&found)?)?)?,
            None => write!(out, "{}", Report::new(&found).text(self.fields)?)?,
        }
        out.flush()?;
        Ok(())
    }

    fn inspect(&self, extract: Option<&mut Extract>) -> Result<Inspection, Box<dyn Error>> {
        let Some(at) = &self.listen else {
            let path = self.file.as_deref().ok_or("neither a file nor --listen")?;
            return self.inspect_input(path, extract);
        };
        let timeout = Duration::from_secs(self.timeout);
        let listening = Listening::open(ListenConfig {
            at: at.clone(),
            multifd: self.multifd.map(|channels| {
                MultifdConfig::new(channels)
                    .compression(self.compression.into())
                    .stall_limit(timeout)
            }),
            without_return_path: self.without_return_path,
            timeout,
        })?;
        complain(format_args!("listening on {}", listening.address()));
        let (mut origin, reader) = listening.accept()?;
        self.watched(reader, &mut origin, extract, None)
    }

    fn inspect_input(
        &self,
        path: &Path,
        extract: Option<&mut Extract>,
    ) -> Result<Inspection, Box<dyn Error>> {
        let timeout = Duration::from_secs(self.timeout);
        match Input::open(path, self.offset, timeout)? {
            Input::File { file, offset } => {
                let size = file.size()?;
                let (mut origin, mut reader) = FileOrigin::open(file, offset);
                find_stream(&mut reader, 0)?;
                self.watched(reader, &mut origin, extract, Some(size))
            }
            Input::Pipe { channel, offset } => {
                let mut reader = StreamReader::new(channel, b"");
                find_stream(&mut reader, offset)?;
                self.watched(reader, &mut PipeOrigin, extract, None)
            }
        }
    }

    /// Reads a stream to its end, of `size` bytes if that is known, and shows on a terminal how far it is.
    fn watched(
        &self,
        reader: StreamReader,
        origin: &mut dyn Origin,
        extract: Option<&mut Extract>,
        size: Option<u64>,
    ) -> Result<Inspection, Box<dyn Error>> {
        let bar = match size {
            Some(size) => ProgressBar::new(size).with_style(ProgressStyle::with_template(
                "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}",
            )?),
            None => ProgressBar::new_spinner().with_style(ProgressStyle::with_template(
                "{spinner} {bytes}, {bytes_per_sec}",
            )?),
        };
        let max_device_state = usize::try_from(self.max_device_state).unwrap_or(usize::MAX);
        let found = scan(reader, origin, max_device_state, extract, &mut |offset| {
            bar.set_position(offset);
        });
        bar.finish_and_clear();
        Ok(found?)
    }
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
