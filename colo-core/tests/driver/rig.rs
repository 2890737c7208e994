//! Two sides with a real migration behind them, each to be run by its driver or by hand.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{io, thread};

use colo_core::driver::{
    ColoControl, DriverConfig, Hooks, LinkError, PrimaryLink, SecondaryLink, run_primary,
    run_secondary,
};
use colo_core::raw::{
    DEFAULT_MIN_GAP, MESSAGE_LEN, decode_message, encode_message, encode_vmstate_size,
};
use colo_core::{
    Cause, CheckpointReport, ColoExit, ColoStore, Deadlines, ExitReason, FailoverHandle, Message,
    Outcome, Resume, Role,
};
use migration_stream::io::{ByteSink, ByteSource, Chunk, FdChannel};
use migration_stream::precopy::{
    Limits, PageIntake, RamSetup, ReturnPathReader, Source, SourceConfig, SourceError,
    SwitchedOver, Target, TargetConfig, TargetError,
};
use migration_stream::ram::{InStream, ZeroPageDetection};
use migration_stream::raw::checkpoint::{CheckpointReceiver, FIRST_DEVICE_SECTION};
use migration_stream::{
    ConfigurationRule, DecoderConfig, DeviceSections, DeviceState, GuestRam, PageTransport,
    StagedRam, StreamReader, StreamWriter,
};
use multifd::{ChannelCount, IncomingPages, MultifdConfig, RecvSet, SendSet};
use ram_cache::{CacheKind, DiscardControl, FlushPool};

use crate::guest::{Faults, Guest, Log, Outside, State, Told};

/// Far longer than anything here takes, and short enough for a test to fail.
pub const LIMIT: Duration = Duration::from_secs(20);
/// A deadline that is meant to pass.
pub const SHORT: Duration = Duration::from_millis(40);
/// A checkpoint delay that never ends.
pub const NEVER: Duration = Duration::from_secs(3600);

/// A driver that waits long for everything.
pub fn patient() -> DriverConfig {
    DriverConfig::default()
        .deadlines(Deadlines::all(LIMIT))
        .max_device_state(1000)
}

/// A driver that waits long for nothing.
pub fn impatient() -> DriverConfig {
    patient().deadlines(Deadlines::all(SHORT))
}

type Switched = SwitchedOver<Box<dyn PageTransport>, Log>;

/// The primary after the migration.
pub struct PrimaryEnd {
    pub guest: Guest,
    pub faults: Faults,
    switched: Switched,
    staged: Arc<StagedRam>,
    resume: Resume,
    /// Its first is the main channel.
    connections: Vec<FdChannel>,
    told: Receiver<Told>,
}

/// The secondary after the migration.
pub struct SecondaryEnd {
    pub faults: Faults,
    pub discard: DiscardControl,
    guest: Guest,
    receiver: CheckpointReceiver,
    pages: IncomingPages<ColoStore>,
    connections: Vec<FdChannel>,
    told: Receiver<Told>,
}

fn pair() -> (FdChannel, FdChannel) {
    let (a, b) = UnixStream::pair().unwrap();
    (
        FdChannel::new(a, LIMIT).unwrap(),
        FdChannel::new(b, LIMIT).unwrap(),
    )
}

/// How a guest is migrated.
#[derive(Clone, Copy)]
pub struct How {
    /// Multifd channels.
    pub channels: u8,
    /// What the secondary keeps checkpoints in.
    pub cache: CacheKind,
    pub xbzrle: bool,
    pub return_path: bool,
    /// The transport sends copies where there are any, and not the guest's memory itself.
    pub staged: bool,
    /// What the guest writes.
    pub seed: u64,
}

/// How a pair in COLO is made: plain or with multifd, with each cache. A number of channels alone is with
/// the cache that shares pages with the guest.
pub const WAYS: [How; 4] = [
    How::colo(0, CacheKind::Mirror),
    How::colo(2, CacheKind::Mirror),
    How::colo(0, CacheKind::Cow),
    How::colo(2, CacheKind::Cow),
];

impl How {
    const fn colo(channels: u8, cache: CacheKind) -> Self {
        Self {
            channels,
            cache,
            xbzrle: false,
            return_path: true,
            staged: true,
            seed: 0x5eed,
        }
    }
}

impl From<u8> for How {
    fn from(channels: u8) -> Self {
        Self::colo(channels, CacheKind::Cow)
    }
}

/// Migrates a guest up to where both sides enter COLO.
pub fn migrated(how: impl Into<How>) -> (PrimaryEnd, SecondaryEnd) {
    let (primary, secondary) = migrated_by(how.into());
    let (mut primary, mut secondary) = (primary.unwrap(), secondary.unwrap());
    assert_eq!(primary.guest.state(), secondary.guest.state());
    for guest in [&mut primary.guest, &mut secondary.guest] {
        guest.settle();
        guest.migrates = false;
    }
    (primary, secondary)
}

/// Migrates a guest; COLO may not be able to go on from there.
pub fn migrated_by(
    how: How,
) -> (
    Result<PrimaryEnd, SourceError>,
    Result<SecondaryEnd, TargetError>,
) {
    let (main, peer) = pair();
    let (mut ours, mut theirs) = (vec![main], vec![peer]);
    for _ in 0..how.channels {
        let (a, b) = pair();
        ours.push(a);
        theirs.push(b);
    }
    let sender = thread::spawn(move || migrate_away(ours, how));
    let secondary = take_in(theirs, how);
    (sender.join().unwrap(), secondary)
}

fn multifd(channels: &[FdChannel]) -> Option<MultifdConfig> {
    let channels = ChannelCount::new(u8::try_from(channels.len()).unwrap())?;
    Some(MultifdConfig::new(channels).stall_limit(LIMIT))
}

fn migrate_away(connections: Vec<FdChannel>, how: How) -> Result<PrimaryEnd, SourceError> {
    let (tell, told) = mpsc::channel();
    let faults = Faults::default();
    let mut guest = Guest::new(how.seed << 2 | 1, &faults, tell);
    guest.run();
    let staged = Arc::new(StagedRam::new(Arc::clone(&guest.ram) as _).unwrap());
    let ram: Arc<dyn GuestRam> = if how.staged {
        Arc::clone(&staged) as _
    } else {
        Arc::clone(&guest.ram) as _
    };
    let (main, channels) = connections.split_first().unwrap();
    let transport: Box<dyn PageTransport> = match multifd(channels) {
        None => {
            let pages = InStream::new(Arc::clone(&ram), ZeroPageDetection::Multifd);
            if how.xbzrle {
                Box::new(pages.with_xbzrle(InStream::DEFAULT_CACHE).unwrap())
            } else {
                Box::new(pages)
            }
        }
        Some(config) => {
            let channels = channels.iter().map(|c| c.share().into()).collect();
            Box::new(SendSet::start(Arc::clone(&ram), channels, &config).unwrap())
        }
    };
    let switched = Source::start(
        SourceConfig::new(None).confirm_timeout(LIMIT),
        Arc::new(Limits::new(0, Duration::from_millis(300))),
        StreamWriter::new(main.share()),
        how.return_path.then(|| ReturnPathReader::new(main.share())),
        RamSetup {
            log: guest.log.clone(),
            transport,
        },
        &mut guest,
    )
    .unwrap()
    .run(&mut guest)
    .completed()?;
    Ok(PrimaryEnd {
        guest,
        faults,
        switched,
        staged,
        resume: Resume::OnLoaded,
        connections,
        told,
    })
}

fn take_in(connections: Vec<FdChannel>, how: How) -> Result<SecondaryEnd, TargetError> {
    let (tell, told) = mpsc::channel();
    let faults = Faults::default();
    let mut guest = Guest::new(how.seed << 2 | 2, &faults, tell);
    let discard = DiscardControl::new();
    let store = ColoStore::over(how.cache, &guest.ram, discard.disable().unwrap()).unwrap();
    let (main, channels) = connections.split_first().unwrap();
    let pages = match multifd(channels) {
        None => IncomingPages::plain(store),
        Some(config) => {
            let channels = channels.iter().map(|c| c.share().into()).collect();
            let wake = main.share();
            let set = RecvSet::start(store, channels, &config, move |_| wake.shutdown());
            IncomingPages::multifd(set.unwrap())
        }
    };
    let config =
        TargetConfig::new(DecoderConfig::new(ConfigurationRule::Absent).xbzrle(how.xbzrle))
            .max_devices(1 << 16);
    let reader = StreamReader::new(main.share(), b"");
    let target = Target::new(config, reader, Some(Box::new(main.share())), pages.store());
    let arrived = target.load(pages, &mut guest).unwrap();
    let settled = arrived.settle_for_checkpoints(&mut guest)?;
    let (receiver, pages) = settled.confirm()?;
    Ok(SecondaryEnd {
        guest,
        faults,
        discard,
        receiver,
        pages,
        connections,
        told,
    })
}

/// A side that its driver runs in a thread.
pub struct Side {
    pub control: ColoControl,
    told: Receiver<Told>,
    ended: Receiver<(Outcome, Guest)>,
}

/// A side whose driver has ended.
pub struct Ended {
    pub outcome: Outcome,
    pub guest: Guest,
}

fn control(role: Role, delay: Duration, connections: Vec<FdChannel>) -> ColoControl {
    ColoControl::new(role, FailoverHandle::new(), delay, move || {
        connections.iter().for_each(FdChannel::shutdown);
    })
    .unwrap()
}

fn parts(guest: Guest, faults: &Faults) -> Hooks<Guest, Outside, Outside> {
    Hooks {
        vm: guest,
        replication: Outside(faults.clone()),
        gate: Outside(faults.clone()),
    }
}

impl PrimaryEnd {
    /// The VM is to resume in a checkpoint when it was copied.
    pub fn resume_on_local_copy(self) -> Self {
        Self {
            resume: Resume::OnLocalCopy,
            ..self
        }
    }

    /// The VM is to resume in a checkpoint when the secondary has received it.
    pub fn resume_on_received(self) -> Self {
        Self {
            resume: Resume::OnReceived,
            ..self
        }
    }

    /// Why another memory is no place for copies.
    pub fn refused_staging(self) -> LinkError {
        let other = StagedRam::new(Arc::clone(&self.guest.ram) as _).unwrap();
        let link = PrimaryLink::new(self.switched).unwrap();
        link.resume_on_local_copy(Arc::new(other))
            .expect_err("no link")
    }

    /// Why copies that the transport does not send are no good.
    pub fn refused_transport(self) -> LinkError {
        let link = PrimaryLink::new(self.switched).unwrap();
        link.resume_on_local_copy(self.staged).expect_err("no link")
    }

    /// Runs the driver, with a checkpoint after each `delay`.
    pub fn start(self, config: DriverConfig, delay: Duration) -> Side {
        self.start_after(config, delay, || {})
    }

    fn start_after(self, config: DriverConfig, delay: Duration, wait: fn()) -> Side {
        let control = control(Role::Primary, delay, self.connections);
        wait();
        let mut link = PrimaryLink::new(self.switched).unwrap();
        match self.resume {
            Resume::OnLoaded => {}
            Resume::OnReceived => link = link.resume_on_received(),
            Resume::OnLocalCopy => link = link.resume_on_local_copy(self.staged).unwrap(),
        }
        let (done, ended) = mpsc::channel();
        let (in_driver, mut parts) = (control.clone(), parts(self.guest, &self.faults));
        thread::spawn(move || {
            let outcome = run_primary(link, &mut parts, &in_driver, config).unwrap();
            // A test that has ended does not ask.
            let _ = done.send((outcome, parts.vm));
        });
        Side {
            control,
            told: self.told,
            ended,
        }
    }

    /// As [`Self::start`], with the first checkpoint due before the driver starts: what the
    /// secondary has said beforehand is then never out of turn.
    pub fn start_due(self, config: DriverConfig) -> Side {
        self.start_after(config, Duration::ZERO, || {
            thread::sleep(2 * DEFAULT_MIN_GAP)
        })
    }

    /// Why no checkpoint can follow.
    pub fn refused(self) -> LinkError {
        PrimaryLink::new(self.switched).expect_err("no link")
    }

    /// Leaves everything to the test.
    pub fn by_hand(self) -> HandPrimary {
        HandPrimary {
            main: self.connections[0].share(),
            end: self,
        }
    }
}

impl SecondaryEnd {
    /// Runs the driver.
    pub fn start(self, config: DriverConfig) -> Side {
        let control = control(Role::Secondary, NEVER, self.connections);
        let confirmed = (self.receiver, self.pages);
        let pool = FlushPool::new(2).unwrap();
        let link = SecondaryLink::new(confirmed, self.guest.log.clone(), pool);
        let (done, ended) = mpsc::channel();
        let (in_driver, mut parts) = (control.clone(), parts(self.guest, &self.faults));
        thread::spawn(move || {
            let outcome = run_secondary(link, &mut parts, &in_driver, config).unwrap();
            // A test that has ended does not ask.
            let _ = done.send((outcome, parts.vm));
        });
        Side {
            control,
            told: self.told,
            ended,
        }
    }

    /// Waits until a channel is inside a packet: the store cannot be changed.
    pub fn until_a_packet_is_under_way(&mut self) {
        let began = Instant::now();
        let (_, barrier) = self.pages.parts();
        barrier.set_deadline(Some(began));
        while barrier.hold().is_ok() {
            assert!(began.elapsed() < LIMIT, "no packet");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Says `messages`, and nothing more as long as it is not started.
    pub fn saying(self, messages: &[Message]) -> Self {
        let bytes: Vec<u8> = messages.iter().flat_map(|m| encode_message(*m)).collect();
        let mut main = self.connections[0].share();
        main.write_all(&[Chunk::Bytes(&bytes)]).unwrap();
        self
    }
}

impl Side {
    /// Waits until `wanted` makes something of what is told.
    pub fn until<T>(&self, mut wanted: impl FnMut(Told) -> Option<T>) -> T {
        loop {
            let told = self.told.recv_timeout(LIMIT).expect("the driver goes on");
            if let Some(found) = wanted(told) {
                return found;
            }
        }
    }

    /// The state the VM is next stopped in.
    pub fn stopped(&self) -> State {
        self.until(|told| match told {
            Told::Stopped(state) => Some(state),
            _ => None,
        })
    }

    /// Waits until the VM is let run.
    pub fn resumed(&self) -> State {
        self.until(|told| match told {
            Told::Resumed(state) => Some(state),
            _ => None,
        })
    }

    /// The state the next checkpoint took, or left.
    pub fn checkpoint_state(&self) -> State {
        self.until(|told| match told {
            Told::Captured(state) | Told::Installed(state) => Some(state),
            _ => None,
        })
    }

    /// The next complete checkpoint.
    pub fn checkpoint(&self) -> CheckpointReport {
        self.until(|told| match told {
            Told::Checkpoint(report) => Some(report),
            Told::Exit(exit) => panic!("{exit}"),
            _ => None,
        })
    }

    /// How COLO ends.
    pub fn exit(&self) -> ColoExit {
        self.until(|told| match told {
            Told::Exit(exit) => Some(exit),
            _ => None,
        })
    }

    /// Waits for the driver's end. There was no second exit.
    pub fn join(self) -> Ended {
        let (outcome, guest) = self.ended.recv_timeout(LIMIT).expect("the driver ends");
        let exits = self.told.try_iter();
        let exits = exits.filter(|told| matches!(told, Told::Exit(_)));
        assert_eq!(exits.count(), 0, "one exit, which the test has taken");
        Ended { outcome, guest }
    }

    /// The peer is given up, and this side goes on alone.
    pub fn take_over(self) -> Ended {
        self.control.failover().request().unwrap();
        self.alone()
    }

    /// The same for a side that knows already.
    pub fn alone(self) -> Ended {
        let ended = self.join();
        assert_eq!(ended.outcome, Outcome::TookOver);
        assert!(ended.guest.running);
        ended
    }

    /// The VM ends while COLO goes on.
    pub fn quit(self) {
        self.control.quit();
        assert_eq!(self.exit().cause, Cause::Quit);
        self.off();
    }

    /// The VM ends after COLO has.
    pub fn give_up(self) {
        self.control.quit();
        self.off();
    }

    fn off(self) {
        let ended = self.join();
        assert_eq!(ended.outcome, Outcome::Quit);
        assert!(!ended.guest.running);
    }
}

/// Both VMs end.
pub fn end(primary: Side, secondary: Side) {
    primary.quit();
    assert_eq!(secondary.exit().reason(), ExitReason::Error);
    secondary.give_up();
}

/// A primary that does what a test says.
pub struct HandPrimary {
    end: PrimaryEnd,
    main: FdChannel,
}

/// A checkpoint as it travels on the main channel.
pub struct Wire {
    /// The RAM sections and EOF.
    pub ram: Vec<u8>,
    /// The device state.
    pub devices: Vec<u8>,
}

impl Wire {
    /// Everything behind the request.
    pub fn bytes(&self) -> Vec<u8> {
        let size = encode_vmstate_size(self.devices.len() as u64);
        let send = encode_message(Message::VmstateSend);
        [&send[..], &self.ram, &size, &self.devices].concat()
    }
}

impl HandPrimary {
    pub fn expect(&mut self, expected: Message) {
        let bytes = self.receive::<MESSAGE_LEN>();
        assert_eq!(decode_message(bytes), Ok(expected));
    }

    /// What the secondary says next.
    pub fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let mut have = 0;
        while have < bytes.len() {
            let n = self.main.read(&mut bytes[have..]).unwrap();
            assert_ne!(n, 0, "the end of the stream after {:?}", &bytes[..have]);
            have += n;
        }
        bytes
    }

    /// Nothing comes any more.
    pub fn expect_end(&mut self) {
        assert_eq!(self.main.read(&mut [0]).unwrap(), 0);
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.main.write_all(&[Chunk::Bytes(bytes)]).unwrap();
    }

    /// Requests a checkpoint, and sends `bytes` with it.
    pub fn request_and_send(&mut self, bytes: &[u8]) {
        self.send(&[&encode_message(Message::CheckpointRequest)[..], bytes].concat());
    }

    /// Lets the guest run, and makes a checkpoint of it. Multifd's pages are sent.
    pub fn capture(&mut self) -> Wire {
        let PrimaryEnd {
            guest, switched, ..
        } = &mut self.end;
        guest.run();
        guest.running = false;
        let mut devices = Vec::new();
        let mut sections = DeviceSections::new(&mut devices, FIRST_DEVICE_SECTION, false);
        guest.save(&mut sections).unwrap();
        devices.push(0);
        let kept = Kept::default();
        let mut out = StreamWriter::new(kept.clone());
        switched.ram.end(&mut out).unwrap();
        out.write_bytes(&[0]).unwrap();
        let ram = std::mem::take(&mut *kept.0.lock().unwrap());
        Wire { ram, devices }
    }

    /// Writes `bytes` on the last of multifd's channels.
    pub fn spoil_a_channel(&self, bytes: &[u8]) {
        let mut channel = self.end.connections.last().unwrap().share();
        channel.write_all(&[Chunk::Bytes(bytes)]).unwrap();
    }

    /// What the last checkpoint holds.
    pub fn state(&self) -> State {
        self.end.guest.state()
    }

    /// The process is gone.
    pub fn die(self) {
        self.end.connections.iter().for_each(FdChannel::shutdown);
    }
}

/// A sink that keeps what is written.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl ByteSink for Kept {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        let mut kept = self.0.lock().unwrap();
        for chunk in chunks {
            match chunk {
                Chunk::Bytes(bytes) => kept.extend_from_slice(bytes),
                Chunk::Guest(guest) => {
                    let mut bytes = vec![0; guest.len()];
                    guest.copy_to(&mut bytes[..]);
                    kept.append(&mut bytes);
                }
            }
        }
        Ok(())
    }
    fn set_write_deadline(&mut self, _: Option<Instant>) {}
}
