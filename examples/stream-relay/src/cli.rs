//! The command line.

use std::error::Error;
use std::num::NonZeroU8;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use indicatif::{HumanBytes, ProgressBar};
use migration_stream::ram::ZeroPageDetection;
use multifd::{ChannelCount, Compression, ZlibLevel, ZstdLevel, ZstdRange};

use crate::endpoint::Endpoint;
use crate::incoming::{Incoming, IncomingConfig};
use crate::memory::memory_of_this_machine;
use crate::outgoing::OutgoingConfig;
use crate::progress::{Progress, Stage};
use crate::relay::{Origin, Relay, Report};
use crate::{Access, Channels};
use migration_stream::MachineVersion;
pub use tool_support::errors::chain;
use tool_support::number;
use tool_support::output::say;

/// How often what is shown is brought up to date.
const TICK: Duration = Duration::from_millis(100);

/// Takes a guest from one QEMU, keeps it, and gives it to another by another transport.
///
/// Addresses are tcp:HOST:PORT, unix:PATH or file:PATH, as QEMU's `migrate` has them. The source's
/// guest is let go of when it is in its store, or without one when the destination has it.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// Listen here for a source, or read this file (plain or with mapped-ram; `,offset=N` says where
    /// in it the stream begins).
    #[arg(long, value_name = "ADDRESS")]
    incoming: Option<Endpoint>,
    /// Give the guest to the destination that listens here, or write it to this file.
    #[arg(long, value_name = "ADDRESS", required_unless_present = "store")]
    outgoing: Option<Endpoint>,
    /// Keep the guest in this directory; without --incoming, take it from there.
    #[arg(long, value_name = "DIR", required_unless_present = "incoming")]
    store: Option<PathBuf>,
    /// Remove the store once the destination has the guest.
    #[arg(long, requires = "store", requires = "outgoing")]
    remove_store: bool,
    /// The source has multifd with this many channels.
    #[arg(long, value_name = "N", value_parser = channel_count)]
    in_multifd: Option<ChannelCount>,
    /// The compression of the source's channels.
    #[arg(
        long,
        value_name = "METHOD",
        default_value = "none",
        requires = "in_multifd"
    )]
    in_compression: Method,
    /// The source has xbzrle.
    #[arg(long)]
    in_xbzrle: bool,
    /// Read the pages of a file with mapped-ram by this many threads.
    #[arg(long, value_name = "N", default_value = "1", value_parser = threads)]
    in_threads: NonZeroU8,
    /// Read them past the page cache.
    #[arg(long)]
    in_direct_io: bool,
    /// The destination has multifd with this many channels.
    #[arg(long, value_name = "N", value_parser = channel_count)]
    out_multifd: Option<ChannelCount>,
    /// The compression of the destination's channels.
    #[arg(
        long,
        value_name = "METHOD",
        default_value = "none",
        requires = "out_multifd"
    )]
    out_compression: Method,
    /// Give every page its place in the file (mapped-ram).
    #[arg(long, conflicts_with = "out_multifd")]
    out_mapped_ram: bool,
    /// Write the pages of that file by this many threads.
    #[arg(long, value_name = "N", default_value = "1", value_parser = threads, requires = "out_mapped_ram")]
    out_threads: NonZeroU8,
    /// Write them past the page cache.
    #[arg(long, requires = "out_mapped_ram")]
    out_direct_io: bool,
    /// How hard to compress: zlib 0 to 9, zstd 0 to 20, or auto for a level of zstd that goes up where
    /// the network is the bottleneck and down where the processors are, within -7 to 12
    /// (auto:MIN:MAX: within others, -100 to 20).
    #[arg(long, value_name = "LEVEL", default_value = "1")]
    out_level: Level,
    /// Who looks for zero pages; destinations before QEMU 9.0 want legacy.
    #[arg(long, value_name = "WHO", default_value = "legacy")]
    out_zero_pages: ZeroPages,
    /// Send no more than this a second, in MiB or with a unit (500M, 2G); 0: as much as there can be.
    #[arg(long, value_name = "MIB", default_value = "0", value_parser = number::mebibytes)]
    max_bandwidth: u64,
    /// The version of a machine type whose name has none (microvm), such as 7.2.
    #[arg(long, value_name = "X.Y")]
    machine_version: Option<MachineVersion>,
    /// The guest's UUID, if it has one and its channels say so.
    #[arg(long, value_name = "UUID")]
    uuid: Option<Uuid>,
    /// How much memory the guest may have, in MiB or with a unit (64G) [default: what this machine has].
    #[arg(long, value_name = "MIB", value_parser = number::mebibytes)]
    max_memory: Option<u64>,
    /// How much device state the guest may have, in MiB or with a unit: the graphics memory of a
    /// virtio-gpu is part of it.
    #[arg(long, value_name = "MIB", default_value = "512", value_parser = number::mebibytes)]
    max_device_state: u64,
    /// Take a guest from a source without return path, which does not wait to hear that the guest
    /// is safe: if anything fails afterwards, the guest is lost.
    #[arg(long)]
    without_return_path: bool,
    /// How long the other side may be silent, seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = number::number)]
    timeout: u64,
    /// How long the source may say nothing between two parts of its stream, seconds: an operator may
    /// let its guest stand still there (pause-before-switchover).
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = number::number)]
    pause_timeout: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Method {
    None,
    Zlib,
    Zstd,
}

/// The value of `--out-level`.
#[derive(Clone, Copy, Debug)]
enum Level {
    Fixed(u8),
    Adaptive(ZstdRange),
}

impl FromStr for Level {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.parse() {
            Ok(level) => Ok(Self::Fixed(level)),
            Err(_) => s
                .parse()
                .map(Self::Adaptive)
                .map_err(|e: multifd::ZstdRangeError| e.to_string()),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ZeroPages {
    /// The channels' threads.
    Multifd,
    /// The main thread.
    Legacy,
    /// Nobody.
    None,
}

impl From<ZeroPages> for ZeroPageDetection {
    fn from(who: ZeroPages) -> Self {
        match who {
            ZeroPages::Multifd => Self::Multifd,
            ZeroPages::Legacy => Self::Legacy,
            ZeroPages::None => Self::None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Uuid([u8; 16]);

impl FromStr for Uuid {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let digits: String = s.split('-').collect();
        u128::from_str_radix(&digits, 16)
            .ok()
            .filter(|_| digits.len() == 32)
            .map(|n| Self(n.to_be_bytes()))
            .ok_or_else(|| format!("'{s}' is no UUID"))
    }
}

fn channel_count(s: &str) -> Result<ChannelCount, String> {
    number::number(s)
        .ok()
        .and_then(|n| u8::try_from(n).ok())
        .and_then(ChannelCount::new)
        .ok_or_else(|| "expected 1 to 255 channels".into())
}

fn threads(s: &str) -> Result<NonZeroU8, String> {
    number::number(s)
        .ok()
        .and_then(|n| NonZeroU8::new(u8::try_from(n).ok()?))
        .ok_or_else(|| "expected 1 to 255 threads".into())
}

impl Method {
    fn at(self, level: Level) -> Result<Compression, String> {
        match (self, level) {
            (Self::None, Level::Fixed(_)) => Some(Compression::None),
            (Self::Zlib, Level::Fixed(level)) => ZlibLevel::new(level).map(Compression::Zlib),
            (Self::Zstd, Level::Fixed(level)) => ZstdLevel::new(level).map(Compression::Zstd),
            (Self::Zstd, Level::Adaptive(range)) => Some(Compression::ZstdAdaptive(range)),
            (Self::None | Self::Zlib, Level::Adaptive(_)) => None,
        }
        .ok_or_else(|| match level {
            Level::Fixed(level) => format!("there is no level {level} of this compression"),
            Level::Adaptive(_) => "only the level of zstd adapts".to_owned(),
        })
    }
}

impl Cli {
    /// Does what it says.
    ///
    /// # Errors
    /// Whatever went wrong, for people.
    pub fn run(self) -> Result<(), Box<dyn Error>> {
        let progress = Arc::<Progress>::default();
        let relay = self.relay()?;
        if let Origin::Source(incoming) = &relay.from
            && let Some(address) = incoming.address()
        {
            say(format_args!("listening on {address}"));
        }
        let is_over = AtomicBool::new(false);
        let report = thread::scope(|scope| {
            let line = scope.spawn(|| show(&progress, &is_over));
            let report = relay.run(&progress);
            is_over.store(true, Ordering::Release);
            line.thread().unpark();
            report
        })?;
        print(&report);
        Ok(())
    }

    fn relay(self) -> Result<Relay, Box<dyn Error>> {
        let timeout = Duration::from_secs(self.timeout);
        let uuid = self.uuid.map_or([0; 16], |uuid| uuid.0);
        let max_memory = self.max_memory.unwrap_or_else(memory_of_this_machine);
        let max_device_state = usize::try_from(self.max_device_state).unwrap_or(usize::MAX);
        let channels = |count: Option<ChannelCount>, compression| {
            count.map(|count| Channels { count, compression })
        };
        let out_compression = self.out_compression.at(self.out_level)?;
        let from = match self.incoming {
            None => Origin::Store {
                max_memory,
                max_device_state,
            },
            Some(from) => Origin::Source(Box::new(Incoming::open(IncomingConfig {
                from,
                channels: channels(self.in_multifd, self.in_compression.at(Level::Fixed(1))?),
                access: Access {
                    threads: self.in_threads,
                    direct: self.in_direct_io,
                },
                xbzrle: self.in_xbzrle,
                machine_version: self.machine_version,
                uuid,
                max_memory,
                max_device_state,
                without_return_path: self.without_return_path,
                timeout,
                pause_timeout: Duration::from_secs(self.pause_timeout).max(timeout),
            })?)),
        };
        let to = self.outgoing.map(|to| OutgoingConfig {
            to,
            channels: channels(self.out_multifd, out_compression),
            mapped_ram: self.out_mapped_ram.then_some(Access {
                threads: self.out_threads,
                direct: self.out_direct_io,
            }),
            zero_pages: self.out_zero_pages.into(),
            max_bandwidth: self.max_bandwidth,
            machine_version: self.machine_version,
            uuid,
            timeout,
        });
        Ok(Relay {
            from,
            store: self.store,
            to,
            remove_store: self.remove_store,
        })
    }
}

/// Shows on stderr what is going on, if that is a terminal.
fn show(progress: &Progress, is_over: &AtomicBool) {
    let bar = ProgressBar::new_spinner();
    while !is_over.load(Ordering::Acquire) {
        let moved = |what: &str, flow: &crate::progress::Flow| {
            let memory = (flow.pages() + flow.zero_pages()) * migration_stream::PAGE_SIZE;
            format!(
                "{what}: {} of pages in {}, the guest has {}",
                HumanBytes(memory),
                HumanBytes(flow.bytes()),
                HumanBytes(progress.memory())
            )
        };
        bar.set_message(match progress.stage() {
            Stage::Waiting => "waiting for the source".to_owned(),
            Stage::Receiving => moved("receiving", &progress.incoming),
            Stage::Storing => "writing the store".to_owned(),
            Stage::Loading => "reading the store".to_owned(),
            Stage::Sending => moved("sending", &progress.outgoing),
            Stage::Forwarding => {
                let received = moved("receiving", &progress.incoming);
                format!("{received}; {}", moved("sending", &progress.outgoing))
            }
        });
        bar.tick();
        thread::park_timeout(TICK);
    }
    bar.finish_and_clear();
}

fn print(report: &Report) {
    if let Some(received) = &report.received {
        say(format_args!("received: {received}"));
    }
    if let Some(sent) = &report.sent {
        say(format_args!("sent: {sent}"));
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_fit_each_other() {
        Cli::command().debug_assert();
        let accepts = |args: &str| Cli::try_parse_from(args.split(' ')).is_ok();
        assert!(accepts("relay --incoming tcp::1 --outgoing unix:x"));
        assert!(accepts("relay --incoming file:x --store d"));
        assert!(accepts("relay --store d --outgoing file:x"));
        assert!(!accepts("relay --incoming tcp::1"));
        assert!(!accepts("relay --outgoing tcp::1"));
        assert!(!accepts("relay --store d --remove-store"));
        assert!(!accepts("relay --incoming exec:x --store d"));
        assert!(!accepts(
            "relay --incoming tcp::1 --store d --in-compression zstd"
        ));
        assert!(!accepts("relay --incoming tcp::1 --store d --in-multifd 0"));
        assert!(accepts(
            "relay --store d --outgoing file:x --out-mapped-ram --out-threads 4 --out-direct-io"
        ));
        assert!(!accepts(
            "relay --store d --outgoing file:x --out-threads 4"
        ));
        assert!(!accepts(
            "relay --store d --outgoing file:x --out-mapped-ram --out-multifd 4"
        ));
        assert!(!accepts(
            "relay --store d --outgoing file:x --out-mapped-ram --out-threads 0"
        ));
    }

    #[test]
    fn a_level_is_one_of_its_compression() {
        let at = |method: Method, level: &str| method.at(level.parse().unwrap());
        assert!(at(Method::Zlib, "9").is_ok());
        assert!(at(Method::Zlib, "10").is_err());
        assert!(at(Method::Zstd, "20").is_ok());
        assert!(at(Method::Zstd, "21").is_err());
        let range = ZstdRange::new(-3, 5).unwrap();
        let adaptive = Ok(Compression::ZstdAdaptive(range));
        assert_eq!(at(Method::Zstd, "auto:-3:5"), adaptive);
        assert!(at(Method::Zlib, "auto").is_err());
        assert!(at(Method::None, "auto").is_err());
        assert!("auto:5:3".parse::<Level>().is_err());
    }

    #[test]
    fn a_uuid_is_read_as_qemu_writes_it() {
        let uuid: Uuid = "00112233-4455-6677-8899-aabbccddeeff".parse().unwrap();
        assert_eq!(uuid.0[..4], [0, 0x11, 0x22, 0x33]);
        assert!("0011".parse::<Uuid>().is_err());
        assert!(
            "+0112233-4455-6677-8899-aabbccddeef"
                .parse::<Uuid>()
                .is_err()
        );
    }
}
