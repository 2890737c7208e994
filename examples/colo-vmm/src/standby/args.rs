//! The command line of `colo-vmm standby`, and all its guests.

use std::error::Error;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use colo_core::{Deadlines, OnPeerLoss};
use migration_net::Address;
use migration_stream::Escaped;
use multifd::{ChannelCount, Compression, MultifdConfig, ZlibLevel, ZstdLevel};
use qmp_types::SessionConfig;
use stream_relay::Channels;
use stream_relay::endpoint::Endpoint;
use stream_relay::memory::memory_of_this_machine;
use uuid::Uuid;

use super::monitor::{COMMANDS, StandbyMonitor};
use super::{Destination, Ending, RestoreConfig, Standby, StandbyConfig};
use crate::cli::{PeerLossArg, max_device_state, mebibytes};
use crate::event_loop;
use crate::lossy_writer::say;
use crate::metrics;
use crate::monitor;
use crate::operator::Operator;
use crate::qmp::{self, QmpAddress, QmpServer};

/// How long QMP clients have to take their last replies.
const QMP_FAREWELL: Duration = Duration::from_secs(1);

/// Guests of QEMU that are held. The options are those of every guest, the addresses of one.
#[derive(Debug, Args)]
pub struct StandbyArgs {
    /// Where the primary, a QEMU with x-colo and return-path, migrates to: tcp:HOST:PORT or
    /// unix:PATH.
    #[arg(long, value_name = "ADDRESS", required_unless_present = "guest")]
    incoming: Option<Address>,
    /// Serve QMP for this guest here: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS", requires = "incoming")]
    qmp: Option<QmpAddress>,
    /// Serve figures of all guests for Prometheus here: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<QmpAddress>,
    /// Restore it into the QEMU that waits here with -incoming: tcp:HOST:PORT or unix:PATH. With
    /// file:PATH, into a file that one can load.
    #[arg(long, value_name = "ADDRESS", requires = "incoming")]
    restore_into: Option<Endpoint>,
    /// A guest as `name=NAME,incoming=ADDRESS[,qmp=ADDRESS][,restore-into=ADDRESS]`; may be given
    /// several times.
    #[arg(long, value_name = "KEY=VALUE,...")]
    guest: Vec<GuestSpec>,
    /// Restore guests without a restore-into by this command line, run by a shell: a QEMU that
    /// listens (-incoming) at the address that takes the place of `{}`. $COLO_GUEST is the guest's
    /// name.
    #[arg(long, value_name = "COMMAND")]
    restore_command: Option<String>,
    /// What to do when a primary is lost: wait for `x-colo-lost-heartbeat`, or restore its guest. The
    /// primary may be alive behind a broken connection: whoever says take-over has the restore
    /// command make sure that it is not.
    #[arg(long, value_name = "wait|take-over", default_value = "wait")]
    on_peer_loss: PeerLossArg,
    /// How long a primary may be silent when it owes an answer, ms [default: 5 s for a message, 30 s
    /// for a checkpoint].
    #[arg(long, value_name = "MS")]
    peer_timeout: Option<u64>,
    /// The primaries' x-checkpoint-delay, ms: three times as long, and at least as long as above,
    /// they may say nothing between two checkpoints.
    #[arg(long, value_name = "MS", default_value_t = 20_000)]
    checkpoint_delay: u64,
    /// The primaries have multifd with this many channels.
    #[arg(long, value_name = "N", value_parser = channel_count)]
    multifd: Option<ChannelCount>,
    /// The compression of their channels.
    #[arg(
        long,
        value_name = "METHOD",
        default_value = "none",
        requires = "multifd"
    )]
    multifd_compression: Method,
    /// The QEMU that a guest is restored into has multifd with this many channels.
    #[arg(long, value_name = "N", value_parser = channel_count)]
    restore_multifd: Option<ChannelCount>,
    /// The compression of those channels.
    #[arg(
        long,
        value_name = "METHOD",
        default_value = "none",
        requires = "restore_multifd"
    )]
    restore_compression: Method,
    /// How long the QEMU that a guest is restored into may take until it listens, ms.
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    restore_timeout: u64,
    /// How much memory each guest may have, MiB [default: what this machine has].
    #[arg(long, value_name = "MIB")]
    max_memory: Option<u64>,
    /// How much device state each guest may have, MiB: the graphics memory of a virtio-gpu is part of
    /// it.
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = max_device_state())]
    max_device_state: u64,
    /// How long a primary may say nothing between two parts of its stream before COLO begins, ms: an
    /// operator may let its guest stand still there (pause-before-switchover).
    #[arg(long, value_name = "MS", default_value_t = 600_000)]
    pause_timeout: u64,
    /// The guests' UUID, if they have one and their multifd channels say so.
    #[arg(long)]
    uuid: Option<Uuid>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
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

/// The value of `--guest`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct GuestSpec {
    name: String,
    incoming: Address,
    qmp: Option<QmpAddress>,
    restore_into: Option<Endpoint>,
}

impl FromStr for GuestSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut name, mut incoming, mut qmp, mut restore_into) = (None, None, None, None);
        for pair in s.split(',') {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| format!("'{}' is not KEY=VALUE", Escaped(pair)))?;
            let is_new = match key {
                "name" => name.replace(value.to_owned()).is_none(),
                "incoming" => incoming.replace(parse(value)?).is_none(),
                "qmp" => qmp.replace(parse(value)?).is_none(),
                "restore-into" => restore_into.replace(parse(value)?).is_none(),
                _ => return Err(format!("a guest has no '{}'", Escaped(key))),
            };
            if !is_new {
                return Err(format!("'{key}' is there twice"));
            }
        }
        Ok(Self {
            name: name.ok_or("a guest wants a name")?,
            incoming: incoming.ok_or("a guest wants an address: incoming=")?,
            qmp,
            restore_into,
        })
    }
}

fn parse<T: FromStr<Err: ToString>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|e: T::Err| e.to_string())
}

impl StandbyArgs {
    /// All guests, those of `--guest` first.
    fn specs(&self) -> Vec<GuestSpec> {
        let one = self.incoming.as_ref().map(|incoming| GuestSpec {
            name: "guest".to_owned(),
            incoming: incoming.clone(),
            qmp: self.qmp.clone(),
            restore_into: self.restore_into.clone(),
        });
        self.guest.iter().cloned().chain(one).collect()
    }

    fn config(&self, spec: &GuestSpec) -> Result<StandbyConfig, String> {
        let timeout = self.peer_timeout.map(Duration::from_millis);
        let delay = Duration::from_millis(self.checkpoint_delay);
        // The next request is waited for as long as any message, beyond the checkpoint delay.
        let deadlines = match timeout {
            None => Deadlines::default().idle(Duration::from_secs(5)),
            Some(timeout) => Deadlines::all(timeout),
        };
        let io_limit = timeout.unwrap_or(Duration::from_secs(30));
        let uuid = self.uuid.map_or([0; 16], Uuid::into_bytes);
        let into = match (&spec.restore_into, &self.restore_command) {
            (Some(endpoint), _) => Destination::Waiting(endpoint.clone()),
            (None, Some(line)) => Destination::Started(line.clone()),
            (None, None) => {
                return Err(format!(
                    "guest '{}' has neither restore-into nor a restore command",
                    spec.name
                ));
            }
        };
        Ok(StandbyConfig {
            name: spec.name.clone(),
            incoming: spec.incoming.clone(),
            multifd: self.multifd.map(|channels| {
                MultifdConfig::new(channels)
                    .compression(self.multifd_compression.into())
                    .uuid(uuid)
                    .stall_limit(io_limit)
            }),
            max_memory: self
                .max_memory
                .map_or_else(memory_of_this_machine, |mib| mib.saturating_mul(1 << 20)),
            max_device_state: mebibytes(self.max_device_state),
            deadlines: deadlines.for_checkpoint_delay(delay),
            io_limit,
            pause_limit: Duration::from_millis(self.pause_timeout).max(io_limit),
            on_loss: OnPeerLoss::from(self.on_peer_loss),
            restore: RestoreConfig {
                into,
                channels: self.restore_multifd.map(|count| Channels {
                    count,
                    compression: self.restore_compression.into(),
                }),
                uuid,
                start_timeout: Duration::from_millis(self.restore_timeout),
                timeout: io_limit,
            },
        })
    }
}

/// Holds all guests until nothing is left to do for any.
///
/// # Errors
/// An address cannot be had, or the host has no threads. No guest was taken then.
pub fn run(args: &StandbyArgs) -> Result<ExitCode, Box<dyn Error>> {
    // Before there are threads, which inherit the mask.
    let signals = event_loop::ending_signals()?;
    let mut guests = Vec::new();
    for spec in args.specs() {
        if guests
            .iter()
            .any(|(guest, _): &(Arc<Standby>, _)| guest.name() == spec.name)
        {
            return Err(format!("there are two guests '{}'", spec.name).into());
        }
        let failed = |error: &dyn Error| {
            let error = crate::error_chain::chain(error);
            format!("guest '{}': {error}", spec.name)
        };
        let standby = Standby::open(args.config(&spec)?).map_err(|e| failed(&e))?;
        let server = match &spec.qmp {
            None => None,
            Some(address) => Some(serve(&standby, address).map_err(|e| failed(&e))?),
        };
        guests.push((standby, server));
    }
    // Until the last guest has ended.
    let _metrics = match &args.metrics {
        None => None,
        Some(address) => {
            let all: Vec<_> = guests.iter().map(|(guest, _)| Arc::clone(guest)).collect();
            Some(metrics::serve(address, move || {
                all.iter().map(|guest| guest.observe()).collect()
            })?)
        }
    };
    let (ended, endings) = mpsc::channel();
    for (standby, _) in &guests {
        say(format!(
            "{}: listening on {}",
            Escaped(standby.name()),
            standby.address()
        ));
        let (standby, ended) = (Arc::clone(standby), ended.clone());
        thread::Builder::new()
            .name(format!("guest {}", standby.name()))
            .spawn(move || {
                let ending = standby.run();
                // Whoever does not listen any more ends the process.
                let _ = ended.send((standby.name().to_owned(), ending));
            })?;
    }
    drop(ended);
    let all: Vec<_> = guests
        .iter()
        .map(|(standby, _)| Arc::clone(standby))
        .collect();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || match signals.read() {
            Ok(signal) => {
                tracing::info!(signal, "ended by a signal");
                all.iter().for_each(|standby| standby.quit());
            }
            Err(error) => tracing::error!(%error, "signals cannot be waited for"),
        })?;
    let mut code = ExitCode::SUCCESS;
    // A thread that panicked sends nothing, and its guest is lost.
    let mut sound = 0;
    for (name, ending) in &endings {
        say(format!("{}: {ending}", Escaped(&name)));
        match ending {
            Ending::Restored | Ending::Quit => sound += 1,
            Ending::Lost => {}
        }
    }
    if sound < guests.len() {
        code = ExitCode::FAILURE;
    }
    for (_, server) in guests {
        if let Some(server) = server {
            server.shutdown(Instant::now() + QMP_FAREWELL);
        }
    }
    Ok(code)
}

fn serve(standby: &Arc<Standby>, address: &QmpAddress) -> std::io::Result<QmpServer> {
    let config = SessionConfig {
        version: monitor::version(),
        oob: true,
        commands: COMMANDS,
    };
    let operator: Arc<dyn Operator> = Arc::new(StandbyMonitor(Arc::clone(standby)));
    qmp::serve(address, config, operator, standby.events())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_its_keys_and_values() {
        let spec: GuestSpec = "name=web,incoming=tcp::4444,qmp=unix:/q,restore-into=unix:/r"
            .parse()
            .unwrap();
        assert_eq!(
            spec,
            GuestSpec {
                name: "web".to_owned(),
                incoming: "tcp::4444".parse().unwrap(),
                qmp: Some("unix:/q".parse().unwrap()),
                restore_into: Some("unix:/r".parse().unwrap()),
            }
        );
        for text in [
            "",
            "web",
            "name=web",
            "incoming=tcp::1",
            "name=web,incoming=exec:cat",
            "name=web,incoming=tcp::1,name=db",
            "name=web,incoming=tcp::1,colour=red",
        ] {
            assert!(text.parse::<GuestSpec>().is_err(), "{text}");
        }
    }
}
