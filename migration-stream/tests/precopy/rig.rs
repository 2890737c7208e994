//! A source and a target on the two ends of a socket.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use migration_stream::io::{ByteSource, FdChannel};
use migration_stream::precopy::{
    Limits, RamSetup, Received, ReturnPathReader, Source, SourceConfig, SourceError, SwitchedOver,
    Target, TargetConfig, TargetError,
};
use migration_stream::ram::{InStream, ZeroPageDetection};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, DecoderConfig, GuestRam, GuestRamMmap, InstanceId,
    Parsed, SectionHeader, StreamReader, StreamWriter,
};

use crate::common::guest::{Guest, Log, Pages, configuration, memory};
use crate::common::loads::{Loads, load};

/// How long either side waits for the other.
pub const LIMIT: Duration = Duration::from_millis(500);

/// Knows the one device of [`Guest`].
#[derive(Default)]
pub struct Devices {
    pub loaded: usize,
    pub refuse: bool,
}

impl Loads for Devices {
    fn load_device(
        &mut self,
        section: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<()>, BoxError> {
        assert_eq!(
            (section.idstr.as_str(), section.instance),
            ("thing", InstanceId(3))
        );
        if self.refuse {
            return Err("no such state".into());
        }
        if body.len() < 100 {
            return Ok(Parsed::NeedMore);
        }
        self.loaded += 1;
        Ok(Parsed::Section((), 100))
    }
}

pub fn channels() -> (FdChannel, FdChannel) {
    let (a, b) = UnixStream::pair().unwrap();
    (
        FdChannel::new(a, LIMIT).unwrap(),
        FdChannel::new(b, LIMIT).unwrap(),
    )
}

pub type Sent = Result<SwitchedOver<InStream, Log>, SourceError>;

pub fn send(guest: &mut Guest, channel: &FdChannel) -> Sent {
    let ram: Arc<dyn GuestRam> = Arc::clone(&guest.ram) as _;
    send_by(
        guest,
        channel,
        InStream::new(ram, ZeroPageDetection::Multifd),
    )
}

pub fn send_by(guest: &mut Guest, channel: &FdChannel, transport: InStream) -> Sent {
    begin(guest, channel, transport)?.run(guest).completed()
}

pub fn begin(
    guest: &mut Guest,
    channel: &FdChannel,
    transport: InStream,
) -> Result<Source<InStream, Log>, SourceError> {
    begin_with(source_config(guest), guest, channel, transport)
}

pub fn source_config(guest: &Guest) -> SourceConfig {
    SourceConfig::new(Configuration {
        uuid: guest.uuid,
        ..configuration("test")
    })
    .confirm_timeout(LIMIT)
}

pub fn begin_with(
    config: SourceConfig,
    guest: &mut Guest,
    channel: &FdChannel,
    transport: InStream,
) -> Result<Source<InStream, Log>, SourceError> {
    Source::start(
        config,
        Arc::new(Limits::new(0, guest.downtime)),
        StreamWriter::new(channel.share()),
        Some(ReturnPathReader::new(channel.share())),
        RamSetup {
            log: guest.log.clone(),
            transport,
        },
        guest,
    )
}

pub fn target(channel: &FdChannel, ram: &GuestRamMmap) -> Target {
    target_with(channel, ram, false)
}

pub fn target_with(channel: &FdChannel, ram: &GuestRamMmap, xbzrle: bool) -> Target {
    let rule = ConfigurationRule::Matching(configuration("test"));
    let config = TargetConfig::new(DecoderConfig::new(rule).xbzrle(xbzrle)).max_devices(1 << 20);
    let reader = StreamReader::new(channel.share(), b"");
    Target::new(config, reader, Some(Box::new(channel.share())), ram)
}

pub fn receive(
    channel: &FdChannel,
    ram: &GuestRamMmap,
    devices: &mut Devices,
) -> Result<Received, TargetError> {
    let settled = load(target(channel, ram), ram, devices)?;
    let received = settled.received();
    settled.confirm()?;
    Ok(received)
}

pub const BLOCKS: &[(&str, u64)] = &[("pc.ram", 700), ("rom", 3)];

pub fn source() -> (Arc<GuestRamMmap>, Guest) {
    let ram = memory(BLOCKS);
    for page in (0..700).step_by(2) {
        ram.write(0, page, page + 1);
    }
    ram.write(1, 2, 99);
    let guest = Guest::new(&ram, &Log::default());
    (ram, guest)
}

pub type Begun = Source<InStream, Log>;

/// Runs a migration between a source and a target that were made otherwise than by default.
pub fn between(
    guest: &mut Guest,
    source: impl FnOnce(Begun) -> Result<Begun, SourceError> + Send,
    target: impl FnOnce(Target) -> Target,
) -> (Sent, Result<Option<Configuration>, TargetError>) {
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let mut devices = Devices::default();
    let ram = Arc::clone(&guest.ram);
    let (sent, received) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let transport =
                InStream::new(Arc::clone(&guest.ram) as _, ZeroPageDetection::default());
            let sent = source(begin(guest, &a, transport)?)?.run(guest).completed();
            if sent.is_err() {
                a.shutdown();
            }
            sent
        });
        let target = target(self::target(&b, &landed));
        let received = load(target, &*landed, &mut devices).and_then(|settled| {
            let configuration = settled.configuration().cloned();
            settled.confirm().map(|_| configuration)
        });
        if received.is_err() {
            b.shutdown();
        }
        (sender.join().unwrap(), received)
    });
    if received.is_ok() {
        ram.assert_equals(&landed);
    }
    (sent, received)
}

/// Takes everything that comes, and answers nothing.
pub fn swallow(channel: &mut FdChannel) {
    let mut buf = [0; 4096];
    while channel.read(&mut buf).is_ok_and(|n| n > 0) {}
}
