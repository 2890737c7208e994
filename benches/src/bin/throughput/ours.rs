//! Our two ends, by the libraries' own drivers.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ::tests::{PATIENCE, Result};
use migration_net::incoming::{self, Acceptor};
use migration_net::{Listener, outgoing};
use migration_stream::precopy::{
    Limits, Loaded, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target,
    TargetConfig, TargetError,
};
use migration_stream::ram::{BlockId, InStream, NoMultifd, ZeroPageDetection};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, DecoderConfig, DirtyLog, GuestRam, MachineName,
    MemoryError, PageTransport, StreamReader, StreamWriter, Tail, TailLimits, Vm, VmControl,
};
use multifd::{MultifdConfig, RecvSet, SendSet};

use crate::ram::Ram;

/// Sends the memory of a stopped guest with these devices; how long it took.
pub fn send(
    uri: &str,
    machine: &str,
    ram: Ram,
    tail: &Tail,
    config: Option<MultifdConfig>,
) -> Result<Duration> {
    let address = uri.parse()?;
    let ram: Arc<dyn GuestRam> = Arc::new(ram);
    // A VMM gives its guest's memory back when the guest has gone, which is not part of moving it.
    let kept = Arc::clone(&ram);
    let begun = Instant::now();
    let connected = outgoing::connect(&address, config.as_ref(), PATIENCE, PATIENCE, None)?;
    let transport: Box<dyn PageTransport> = match &config {
        None => Box::new(InStream::new(
            Arc::clone(&ram),
            ZeroPageDetection::default(),
        )),
        Some(config) => {
            let channels = connected.channels.into_iter().map(Into::into).collect();
            Box::new(SendSet::start(Arc::clone(&ram), channels, config)?)
        }
    };
    let mut vm = Vm {
        control: Still,
        devices: tail.clone(),
    };
    let source = Source::start(
        SourceConfig::new(Configuration::new(MachineName::new(machine)?)).confirm_timeout(PATIENCE),
        Arc::new(Limits::new(0, Duration::from_millis(300))),
        StreamWriter::new(connected.main.share()),
        Some(ReturnPathReader::new(connected.main.share())),
        RamSetup {
            log: Clean,
            transport,
        },
        &mut vm,
    )?;
    source.run(&mut vm).completed()?;
    let time = begun.elapsed();
    drop(kept);
    Ok(time)
}

/// The log of a guest that stands still.
struct Clean;

impl DirtyLog for Clean {
    fn start(&mut self) -> std::result::Result<(), MemoryError> {
        Ok(())
    }

    fn sync(
        &mut self,
        _: &mut dyn FnMut(BlockId, u64, u64),
    ) -> std::result::Result<(), MemoryError> {
        Ok(())
    }

    fn stop(&mut self) -> std::result::Result<(), MemoryError> {
        Ok(())
    }
}

/// A guest that stands still.
struct Still;

impl VmControl for Still {
    fn pause(&mut self) -> std::result::Result<(), BoxError> {
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

impl SourceObserver for Still {}

/// A destination of ours that waits for its source.
#[derive(Debug)]
pub struct Receiver {
    uri: String,
    thread: JoinHandle<Result<(Tail, Ram)>>,
}

impl Receiver {
    /// Listens.
    pub fn listen(uri: &str, ram: Ram, config: Option<MultifdConfig>) -> Result<Self> {
        let listener = Listener::bind(&uri.parse()?)?;
        let uri = listener.address().to_string();
        let acceptor = Acceptor::new(listener, config.as_ref(), incoming::Limits::default())?;
        let thread = thread::spawn(move || receive(acceptor, ram, config.as_ref()));
        Ok(Self { uri, thread })
    }

    /// Where it listens.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Waits for the end, and returns the devices and the memory.
    pub fn join(self) -> Result<(Tail, Ram)> {
        self.thread.join().map_err(|_| "our destination panicked")?
    }
}

fn receive(
    mut acceptor: Acceptor,
    ram: Ram,
    config: Option<&MultifdConfig>,
) -> Result<(Tail, Ram)> {
    let incoming = acceptor.accept(None)?;
    let reader = StreamReader::new(incoming.main.share(), &incoming.prefix);
    let out = Box::new(incoming.main.share());
    let decoder = DecoderConfig::new(ConfigurationRule::Any);
    let target_config = TargetConfig::new(decoder).max_devices(1 << 20);
    let limits = TailLimits::default();
    let confirm = |(mut loaded, tail): (Loaded, Tail)| -> std::result::Result<Tail, TargetError> {
        loaded.confirm()?;
        Ok(tail)
    };
    let Some(config) = config else {
        let target = Target::new(target_config, reader, Some(out), &ram);
        let tail = confirm(target.load_opaque(&ram, &mut NoMultifd, limits)?)?;
        return Ok((tail, ram));
    };
    let waker = incoming.main.share();
    let channels = incoming.channels.into_iter().map(Into::into).collect();
    let set = RecvSet::start(ram, channels, config, move |_| waker.shutdown())?;
    let target = Target::new(target_config, reader, Some(out), set.store());
    let tail = confirm(target.load_opaque(set.store(), &mut set.barrier(), limits)?)?;
    let joined = set.join()?;
    joined.outcome?;
    Ok((tail, joined.store))
}
