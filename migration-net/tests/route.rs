//! One value, and one function of an embedder for each side, whichever way the guest goes.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

#[path = "../../migration-stream/tests/common/guest.rs"]
#[allow(dead_code)] // it serves other tests too
mod guest;

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest::{Log, Pages, memory};
use migration_net::incoming::Refusal;
use migration_net::{Address, Destination, Listener, Origin, Route};
use migration_stream::io::CancelToken;
use migration_stream::precopy::{SourceError, SourceObserver, TargetError};
use migration_stream::{
    BoxError, DeviceSections, DeviceState, GuestRam, GuestRamMmap, MachineName, Parsed,
    SectionHeader, VmControl,
};

/// Far longer than anything here takes, and short enough for a test to fail.
const LIMIT: Duration = Duration::from_secs(20);
const BLOCKS: [(&str, u64); 2] = [("ram", 700), ("rom", 3)];

/// A VM with one device.
#[derive(Debug, Default)]
struct Machine {
    runs: bool,
    device: Vec<u8>,
}

impl VmControl for Machine {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.runs = false;
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, BoxError> {
        self.runs = true;
        Ok(Instant::now())
    }
}

impl SourceObserver for Machine {}

impl DeviceState for Machine {
    type Section = Vec<u8>;
    type Staged = Vec<u8>;
    type Reset = Vec<u8>;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        out.push("device", 0, 1, &self.device)
    }
    fn parse(&mut self, _: &SectionHeader, body: &[u8]) -> Result<Parsed<Vec<u8>>, BoxError> {
        Ok(match body.get(..4) {
            Some(state) => Parsed::Section(state.to_vec(), 4),
            None => Parsed::NeedMore,
        })
    }
    fn stage(&mut self, sections: Vec<Vec<u8>>) -> Result<Vec<u8>, BoxError> {
        Ok(sections.into_iter().next().ok_or("no device")?)
    }
    fn reset(&mut self, staged: Vec<u8>) -> Result<Vec<u8>, BoxError> {
        Ok(staged)
    }
    fn install(&mut self, state: Vec<u8>) -> Result<(), BoxError> {
        self.device = state;
        Ok(())
    }
}

fn route(machine: &str) -> Route {
    Route::new(MachineName::new(machine).unwrap()).patience(LIMIT)
}

fn source_ram() -> Arc<GuestRamMmap> {
    let ram = memory(&BLOCKS);
    for page in (0..700).filter(|page| page % 3 != 0) {
        ram.write(0, page, 0xabcd + page);
    }
    ram.write(1, 2, 7);
    ram
}

fn send(
    route: &Route,
    to: impl Into<Destination>,
    ram: Arc<dyn GuestRam>,
) -> Result<(), SourceError> {
    let mut machine = Machine {
        runs: true,
        device: vec![1, 2, 3, 4],
    };
    let sent = route
        .source(to, ram, Log::default(), &mut machine)
        .and_then(|source| source.run(&mut machine).completed());
    assert_eq!(machine.runs, sent.is_err(), "it runs on one side");
    sent.map(|_| ())
}

fn receive(
    route: &Route,
    from: impl Into<Origin>,
    ram: &Arc<GuestRamMmap>,
) -> Result<(), TargetError> {
    let mut machine = Machine::default();
    let arrived = route.receive(from, Arc::clone(ram), &mut machine)?;
    assert!(machine.device.is_empty(), "no device has changed");
    arrived.settle(&mut machine)?.confirm()?;
    assert_eq!(machine.device, [1, 2, 3, 4]);
    Ok(())
}

/// What both sides of a migration over connections say.
fn over_connections(
    source: &Route,
    target: &Route,
    at: &Address,
    ram: &Arc<GuestRamMmap>,
) -> (Result<(), SourceError>, Result<(), TargetError>) {
    let listener = Listener::bind(at).unwrap();
    let to = listener.address().clone();
    let from = source_ram();
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(source, source.connect(&to).unwrap(), from.clone()));
        let received = receive(target, target.accept(listener).unwrap(), ram);
        (sending.join().unwrap(), received)
    })
}

fn arrives_everywhere(route: &Route, directory: &Path) {
    let tcp = "tcp:127.0.0.1:0".parse().unwrap();
    for at in [tcp, Address::Unix(directory.join("socket"))] {
        let ram = memory(&BLOCKS);
        let (sent, received) = over_connections(route, route, &at, &ram);
        sent.unwrap();
        received.unwrap();
        ram.assert_equals(&source_ram());
    }
    let path = directory.join("file");
    let file = Arc::new(File::create(&path).unwrap());
    send(route, file, source_ram()).unwrap();
    let ram = memory(&BLOCKS);
    // What is zero in the file must not stay as it is here.
    ram.write(0, 0, 1);
    receive(route, Arc::new(File::open(&path).unwrap()), &ram).unwrap();
    ram.assert_equals(&source_ram());
}

#[test]
fn a_guest_arrives_over_a_connection_and_through_a_file() {
    let directory = tempfile::tempdir().unwrap();
    arrives_everywhere(&route("machine"), directory.path());
    let differences = route("machine").xbzrle(1 << 20);
    let at = Address::Unix(directory.path().join("differences"));
    let ram = memory(&BLOCKS);
    let (sent, received) = over_connections(&differences, &differences, &at, &ram);
    sent.unwrap();
    received.unwrap();
    ram.assert_equals(&source_ram());
}

#[cfg(feature = "multifd")]
#[test]
fn a_guest_arrives_by_channels_in_the_same_way() {
    use multifd::{ChannelCount, Flush, MultifdConfig};

    let directory = tempfile::tempdir().unwrap();
    for flush in [Flush::EachRound, Flush::EachSection] {
        let multifd = ChannelCount::new(3)
            .map(|channels| MultifdConfig::new(channels).flush(flush).uuid([7; 16]));
        arrives_everywhere(&route("machine").multifd(multifd), directory.path());
    }
}

#[cfg(feature = "multifd")]
#[test]
fn a_channel_that_breaks_is_the_cause_that_the_target_tells() {
    use std::io::Read;

    use multifd::packet::Hello;
    use multifd::{ChannelCount, ChannelId, MultifdConfig};

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let route = route("machine").multifd(ChannelCount::new(1).map(MultifdConfig::new));
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let mut main = UnixStream::connect(&path).unwrap();
    let mut channel = UnixStream::connect(&path).unwrap();
    let hello = Hello {
        uuid: [0; 16],
        channel: ChannelId::new(0),
    };
    channel.write_all(&hello.encode()).unwrap();
    main.write_all(b"QEVM\0\0\0\x03").unwrap();
    let incoming = route.accept(listener).unwrap();
    // Half of a header.
    channel.write_all(&[0x11, 0x22]).unwrap();
    drop(channel);
    let error = receive(&route, incoming, &memory(&BLOCKS)).unwrap_err();
    assert!(matches!(error, TargetError::Transport(_)), "{error:?}");
    // The main channel is still good for an answer, or at least for its end.
    main.shutdown(std::net::Shutdown::Write).unwrap();
    main.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_machine_of_another_type_is_refused_and_the_guest_runs_on() {
    let directory = tempfile::tempdir().unwrap();
    let at = Address::Unix(directory.path().join("socket"));
    let ram = memory(&BLOCKS);
    let (sent, received) = over_connections(&route("one"), &route("other"), &at, &ram);
    assert!(sent.is_err());
    assert!(received.unwrap_err().to_string().contains("stream"));
    ram.assert_equals(&memory(&BLOCKS));
}

#[test]
fn a_target_is_cancelled_by_the_token_of_its_route() {
    let token = CancelToken::new().unwrap();
    let route = route("machine").cancel(&token);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let mut silent = UnixStream::connect(&path).unwrap();
    silent.write_all(b"QEVM").unwrap();
    let incoming = route.accept(listener).unwrap();
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            token.cancel();
        });
        let error = receive(&route, incoming, &memory(&BLOCKS)).unwrap_err();
        assert!(matches!(error, TargetError::Cancelled), "{error:?}");
    });
    assert!(begun.elapsed() < LIMIT / 2);
    let error = route.connect(&Address::Unix(path)).unwrap_err();
    assert!(error.to_string().contains("was cancelled"), "{error}");
}

#[test]
fn a_channel_is_refused_where_none_are_expected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let mut acceptor = route("machine")
        .acceptor(listener)
        .unwrap()
        .on_refused(move |refusal| tell.send(refusal.clone()).unwrap());
    let mut channel = UnixStream::connect(&path).unwrap();
    channel.write_all(&[0x11, 0x22, 0x33, 0x44]).unwrap();
    let mut main = UnixStream::connect(&path).unwrap();
    main.write_all(b"QEVM").unwrap();
    let incoming = acceptor.accept(None).unwrap();
    assert_eq!(&incoming.prefix, b"QEVM");
    assert!(matches!(told.try_recv(), Ok(Refusal::MultifdOff)));
}
