//! The limit on bandwidth, as whoever takes the bytes sees it: a destination by each transport, and a file.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::NonZeroU8;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use migration_stream::GuestRam;
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use multifd::{ChannelCount, Compression};
use stream_relay::guest::Guest;
use stream_relay::incoming::Incoming;
use stream_relay::memory::Memory;
use stream_relay::outgoing::{self, OutgoingConfig};
use stream_relay::progress::Progress;
use stream_relay::{Access, Channels};

use crate::guest::{PAGE, guest};
use crate::rig::{incoming, outgoing_to, relay, stream_of};

const LIMIT: u64 = 16 << 20;
/// What may come at once: a packet, what a socket holds, and what comes between two looks at a file.
const BURST: u64 = 2 << 20;
/// Twenty-four MiB take a second and a half.
const PAGES: usize = 24 << 8;

/// When how many bytes came.
type Arrivals = Mutex<Vec<(Instant, u64)>>;

fn note(arrivals: &Arrivals, bytes: u64) {
    if bytes > 0 {
        arrivals.lock().unwrap().push((Instant::now(), bytes));
    }
}

/// A guest without a zero page.
fn full_guest() -> Guest {
    let block = RamBlock::new("pc.ram", (PAGES * PAGE) as u64).unwrap();
    let blocks = RamBlockTable::new(vec![block]).unwrap();
    let memory = Memory::new(blocks, u64::MAX, Arc::default()).unwrap();
    for page in 0..PAGES {
        let at = (page * PAGE) as u64;
        let bytes = memory.slice(BlockId::new(0), at, PAGE).unwrap();
        bytes.copy_from(&[page.to_le_bytes()[0] | 1; PAGE]);
    }
    Guest {
        memory: Arc::new(memory),
        ..guest("pc-q35-11.1")
    }
}

/// The limit holds over any second, and is used.
fn check(arrivals: &Arrivals) {
    let mut arrivals = std::mem::take(&mut *arrivals.lock().unwrap());
    arrivals.sort();
    let total: u64 = arrivals.iter().map(|a| a.1).sum();
    assert!(total >= (PAGES * PAGE) as u64, "{total} bytes");
    let (mut end, mut sum) = (0, 0);
    for &(from, bytes) in &arrivals {
        let until = from + Duration::from_secs(1);
        while let Some(next) = arrivals.get(end).filter(|a| a.0 < until) {
            sum += next.1;
            end += 1;
        }
        assert!(sum <= LIMIT + LIMIT / 10 + BURST, "{sum} in a second");
        sum -= bytes;
    }
    let took = arrivals.last().unwrap().0 - arrivals[0].0;
    let ideal = Duration::from_millis(total * 1000 / LIMIT);
    // Loaded machines are slow; half the limit is no limit that nobody reaches.
    assert!(took < 2 * ideal, "{took:?} instead of {ideal:?}");
}

/// Passes `count` connections to `from` on to `to`, in both directions, and notes what goes forth.
fn tap(from: &Path, to: &Path, count: usize, arrivals: &Arc<Arrivals>) {
    let (listener, to) = (UnixListener::bind(from).unwrap(), to.to_owned());
    let arrivals = Arc::clone(arrivals);
    thread::spawn(move || {
        for _ in 0..count {
            let (mut source, _) = listener.accept().unwrap();
            let mut target = UnixStream::connect(&to).unwrap();
            let (mut back, mut answers) =
                (target.try_clone().unwrap(), source.try_clone().unwrap());
            thread::spawn(move || {
                // Either may be shut already.
                let _ = io::copy(&mut back, &mut answers);
                let _ = answers.shutdown(Shutdown::Write);
            });
            let arrivals = Arc::clone(&arrivals);
            thread::spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(n @ 1..) = source.read(&mut buffer) {
                    note(&arrivals, n as u64);
                    if target.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
                let _ = target.shutdown(Shutdown::Write);
            });
        }
    });
}

fn limited(to: &str, channels: Option<Channels>) -> OutgoingConfig {
    OutgoingConfig {
        max_bandwidth: LIMIT,
        ..outgoing_to(to, channels)
    }
}

fn unix(dir: &Path, name: &str) -> String {
    format!("unix:{}", dir.join(name).display())
}

fn over_sockets(channels: Option<Channels>) {
    let dir = tempfile::tempdir().unwrap();
    let arrivals = Arc::default();
    let destination = Incoming::open(incoming(&unix(dir.path(), "destination"), channels));
    let connections = 1 + channels.map_or(0, |c| usize::from(c.count.get()));
    let to = dir.path().join("destination");
    tap(&dir.path().join("tap"), &to, connections, &arrivals);
    let guest = full_guest();
    let config = limited(&unix(dir.path(), "tap"), channels);
    thread::scope(|scope| {
        let sending = scope.spawn(|| outgoing::send(&guest, &config, &Progress::default()));
        let received = destination.unwrap().receive(&Arc::default()).unwrap();
        received.confirm().unwrap();
        sending.join().unwrap().unwrap();
    });
    check(&arrivals);
}

#[test]
fn the_limit_holds_on_the_main_stream() {
    over_sockets(None);
}

#[test]
fn the_limit_holds_with_channels() {
    over_sockets(Some(Channels {
        count: ChannelCount::new(3).unwrap(),
        compression: Compression::None,
    }));
}

#[test]
fn the_limit_holds_for_a_guest_that_is_passed_on_as_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let arrivals = Arc::default();
    fs::write(dir.path().join("stream"), stream_of(&full_guest())).unwrap();
    let destination = Incoming::open(incoming(&unix(dir.path(), "destination"), None));
    let to = dir.path().join("destination");
    tap(&dir.path().join("tap"), &to, 1, &arrivals);
    let from = format!("file:{}", dir.path().join("stream").display());
    let from = Incoming::open(incoming(&from, None)).unwrap();
    let relay = relay(from, None, Some(limited(&unix(dir.path(), "tap"), None)));
    thread::scope(|scope| {
        let relaying = scope.spawn(|| relay.run(&Arc::default()));
        let received = destination.unwrap().receive(&Arc::default()).unwrap();
        received.confirm().unwrap();
        relaying.join().unwrap().unwrap();
    });
    check(&arrivals);
}

/// Bytes that the files in `dir` take up.
fn taken_up(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().flatten();
    let blocks = entries.filter_map(|entry| entry.metadata().ok().map(|m| m.blocks()));
    blocks.sum::<u64>() * 512
}

fn into_a_file(mapped_ram: Option<Access>) {
    let dir = tempfile::tempdir().unwrap();
    let arrivals = Arrivals::default();
    let config = OutgoingConfig {
        mapped_ram,
        ..limited(&format!("file:{}", dir.path().join("file").display()), None)
    };
    let guest = full_guest();
    let is_written = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut before = 0;
            // Once more behind the end.
            let mut ends = false;
            while !ends {
                ends = is_written.load(Ordering::Acquire);
                let now = taken_up(dir.path()).max(before);
                note(&arrivals, now - before);
                before = now;
                thread::sleep(Duration::from_millis(5));
            }
        });
        let sent = outgoing::send(&guest, &config, &Progress::default());
        is_written.store(true, Ordering::Release);
        sent.unwrap();
    });
    check(&arrivals);
}

#[test]
fn the_limit_holds_for_a_file() {
    into_a_file(None);
}

#[test]
fn the_limit_holds_for_pages_in_their_places_by_several_threads() {
    into_a_file(Some(Access {
        threads: NonZeroU8::new(3).unwrap(),
        direct: false,
    }));
}
