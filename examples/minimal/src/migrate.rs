//! Live migration: to another process, by channels or without, and to a file and back.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use migration_net::incoming::{self, Acceptor};
use migration_net::{Address, Listener, outgoing};
use migration_stream::precopy::{
    Arrived, Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceEvent, SourceObserver,
    SourceStatus, SwitchedOver, Target, TargetConfig,
};
use migration_stream::ram::{InStream, ZeroPageDetection};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, DecoderConfig, GuestRam, KvmDirtyLog, MachineName,
    PageStore, PageTransport, StreamReader, StreamWriter,
};
use multifd::{ChannelCount, IncomingPages, MultifdConfig, RecvSet, SendSet};
use vmstate::Staged;

use crate::machine::{Control, Machine};

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);

// ANCHOR: observer
impl SourceObserver for Control {
    /// The devices are sent next: from then on the secondary may be in COLO.
    fn event(&mut self, event: SourceEvent) {
        if let (SourceEvent::Status(SourceStatus::Device), Some(heartbeat)) =
            (event, &self.heartbeat)
        {
            heartbeat.colo_begins();
        }
    }
}
// ANCHOR_END: observer

fn configuration() -> Result<Configuration, BoxError> {
    Ok(Configuration::new(MachineName::new("minimal-1")?))
}

fn target_config() -> Result<TargetConfig, BoxError> {
    Ok(TargetConfig {
        decoder: DecoderConfig::new(ConfigurationRule::Matching(configuration()?)),
        max_devices: 1 << 20,
    })
}

fn channels(count: u8) -> Option<MultifdConfig> {
    let channels = ChannelCount::new(count)?;
    Some(MultifdConfig {
        channels,
        ..MultifdConfig::default()
    })
}

/// What is left of the source when the guest has gone.
pub type Gone = SwitchedOver<Box<dyn PageTransport>, KvmDirtyLog>;

// ANCHOR: send
fn send(
    machine: &mut Machine,
    log: KvmDirtyLog,
    out: StreamWriter,
    return_path: Option<ReturnPathReader>,
    transport: Box<dyn PageTransport>,
) -> Result<Gone, BoxError> {
    let config = SourceConfig {
        configuration: Some(configuration()?),
        switchover_start: true,
        confirm_timeout: PATIENCE,
    };
    let (limits, setup) = (Arc::new(Limits::default()), RamSetup { log, transport });
    let source = Source::start(config, limits, out, return_path, setup, &mut machine.vm)?;
    Ok(source.run(&mut machine.vm).completed()?)
}
// ANCHOR_END: send

// ANCHOR: away
/// Sends the running guest to `address`, by `count` channels. If this fails the guest runs on.
pub fn away(
    machine: &mut Machine,
    log: KvmDirtyLog,
    address: &Address,
    count: u8,
) -> Result<Gone, BoxError> {
    let channels = channels(count);
    let connected = outgoing::connect(address, channels.as_ref(), PATIENCE, PATIENCE, None)?;
    let ram: Arc<dyn GuestRam> = Arc::clone(&machine.ram) as _;
    let transport: Box<dyn PageTransport> = match &channels {
        None => Box::new(InStream::new(ram, ZeroPageDetection::default())),
        Some(config) => {
            let channels = connected.channels.into_iter().map(Into::into).collect();
            Box::new(SendSet::start(ram, channels, config)?)
        }
    };
    let out = StreamWriter::new(connected.main.share());
    let return_path = ReturnPathReader::new(connected.main);
    send(machine, log, out, Some(return_path), transport)
}
// ANCHOR_END: away

/// A guest that has arrived, and where its pages are.
pub type Here<S> = Arrived<IncomingPages<S>, Staged>;

// ANCHOR: here
/// Waits at `address` for a guest that comes by `count` channels, and receives it into `store`.
pub fn here<S: PageStore + 'static>(
    machine: &mut Machine,
    store: S,
    address: &Address,
    count: u8,
) -> Result<Here<S>, BoxError> {
    let channels = channels(count);
    let listener = Listener::bind(address)?;
    let limits = incoming::Limits::default();
    let incoming = Acceptor::new(listener, channels.as_ref(), limits)?.accept(None)?;
    let main = incoming.main;
    let pages = match &channels {
        None => IncomingPages::plain(store),
        Some(config) => {
            let channels = incoming.channels.into_iter().map(Into::into).collect();
            let waker = main.share();
            let set = RecvSet::start(store, channels, config, move |_| waker.shutdown())?;
            IncomingPages::multifd(set)
        }
    };
    let reader = StreamReader::new(main.share(), &incoming.prefix);
    let answers = Some(Box::new(main) as _);
    let target = Target::new(target_config()?, reader, answers, pages.store());
    Ok(target
        .confirming_before_it_runs()
        .load(pages, &mut machine.vm)?)
}
// ANCHOR_END: here

// ANCHOR: save
/// Writes the guest into a file, as a stream.
pub fn save(machine: &mut Machine, log: KvmDirtyLog, path: &str) -> Result<(), BoxError> {
    let file = Arc::new(File::create(path)?);
    let ram: Arc<dyn GuestRam> = Arc::clone(&machine.ram) as _;
    let transport = Box::new(InStream::new(ram, ZeroPageDetection::default()));
    let out = StreamWriter::to_file(Arc::clone(&file) as _, 0);
    send(machine, log, out, None, transport)?;
    Ok(file.sync_all()?)
}
// ANCHOR_END: save

// ANCHOR: restore
/// Reads a guest out of a file.
pub fn restore(machine: &mut Machine, path: &str) -> Result<(), BoxError> {
    let reader = StreamReader::from_file(Arc::new(File::open(path)?), 0);
    let pages = IncomingPages::plain(Arc::clone(&machine.ram));
    let target = Target::new(target_config()?, reader, None, pages.store());
    let arrived = target.load(pages, &mut machine.vm)?;
    arrived.settle(&mut machine.vm)?.confirm()?;
    Ok(())
}
// ANCHOR_END: restore
