//! The listening end against floods, turn by turn, with a clock that the test owns.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const TURN: Duration = Duration::from_millis(1);
const TIMEOUT: Duration = Duration::from_millis(150);

fn path(name: &str) -> PathBuf {
    let name = format!("colo-link-{}-{name}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    path
}

/// A listening link, and a clock.
struct Listening {
    link: Link,
    now: Instant,
    path: PathBuf,
}

/// What one turn of the heartbeat's thread did.
#[derive(Debug, Default, PartialEq)]
struct Turn {
    accepted: usize,
    beats: usize,
    connected: bool,
    closed: bool,
}

impl Listening {
    fn new(name: &str) -> Self {
        let (path, now) = (path(name), Instant::now());
        let endpoint = Endpoint::Listen(Address::Unix(path.clone()));
        let link = Link::open(endpoint, TIMEOUT, now).unwrap();
        Self { link, now, path }
    }

    /// As the thread does it: a beat is the peer's if it is all sevens.
    fn turn(&mut self) -> Turn {
        self.now += TURN;
        let mut turn = Turn::default();
        let mut beats = 0;
        let events = |turn: &mut Turn, event| match event {
            LinkEvent::Connected => turn.connected = true,
            LinkEvent::Closed => turn.closed = true,
        };
        self.link.read(
            self.now,
            |beat| {
                let is_peer = *beat == [7; BEAT_LEN];
                beats += usize::from(is_peer);
                is_peer
            },
            |event| events(&mut turn, event),
        );
        turn.beats = beats;
        self.link
            .attend(self.now, || {}, |event| events(&mut turn, event));
        let is_new = |c: &&Connection| c.since == self.now;
        turn.accepted = self.link.connections.iter().filter(is_new).count();
        assert!(turn.accepted <= ACCEPTS);
        assert!(self.candidates() <= CANDIDATES);
        turn
    }

    fn candidates(&self) -> usize {
        self.link.connections.iter().filter(|c| !c.proven).count()
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn peer(&self) -> UnixStream {
        let mut peer = self.connect();
        peer.write_all(&[7; BEAT_LEN]).unwrap();
        peer
    }
}

/// More than a listener's places, and fewer than a process has descriptors.
const FLOOD: usize = 4 * CANDIDATES;

#[test]
fn a_peer_behind_a_flood_is_heard_within_one_grace_for_each_half_of_the_places() {
    let mut at = Listening::new("behind");
    let _flood: Vec<_> = (0..FLOOD).map(|_| at.connect()).collect();
    let _peer = at.peer();
    let began = at.now;
    while at.turn().beats == 0 {
        let graces = u32::try_from(FLOOD / (CANDIDATES / 2)).unwrap();
        assert!(at.now - began < (CANDIDATE_GRACE + TURN * 50) * graces);
    }
    assert!(at.link.is_connected());
}

#[test]
fn a_candidate_that_came_before_a_flood_keeps_its_place() {
    let mut at = Listening::new("before");
    let mut peer = at.connect();
    at.turn();
    let _flood: Vec<_> = (0..FLOOD).map(|_| at.connect()).collect();
    let until = at.now + CANDIDATE_LIMIT / 2;
    while at.now < until {
        at.turn();
    }
    peer.write_all(&[7; BEAT_LEN]).unwrap();
    assert_eq!(at.turn().beats, 1);
    assert!(at.link.is_connected());
}

#[test]
fn a_candidate_in_the_middle_of_a_flood_has_its_grace() {
    let mut at = Listening::new("middle");
    let _before: Vec<_> = (0..CANDIDATES).map(|_| at.connect()).collect();
    let mut peer = at.connect();
    let _behind: Vec<_> = (0..FLOOD).map(|_| at.connect()).collect();
    // Until all places are taken, then until the peer has one.
    while at.candidates() < CANDIDATES {
        at.turn();
    }
    while at.turn().accepted == 0 {}
    let until = at.now + CANDIDATE_GRACE - TURN * 20;
    while at.now < until {
        at.turn();
    }
    peer.write_all(&[7; BEAT_LEN]).unwrap();
    assert_eq!(at.turn().beats, 1);
}

#[test]
fn a_flood_does_not_disturb_the_connection_of_the_peer_nor_a_turn_its_beats() {
    let mut at = Listening::new("proven");
    let mut peer = at.peer();
    while !at.link.is_connected() {
        at.turn();
    }
    let _flood: Vec<_> = (0..FLOOD).map(|_| at.connect()).collect();
    for _ in 0..500 {
        peer.write_all(&[7; BEAT_LEN]).unwrap();
        let turn = at.turn();
        assert_eq!((turn.beats, turn.closed), (1, false));
    }
    // Nor can a peer that beats without end keep the thread.
    peer.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while peer.write(&[7; BEAT_LEN]).is_ok_and(|n| n == BEAT_LEN) && sent < 3 * BEATS {
        sent += 1;
    }
    assert_eq!(at.turn().beats, BEATS);
}

#[test]
fn a_listener_without_an_end_of_time_does_not_panic() {
    let now = Instant::now();
    let nowhere = Endpoint::Connect(Address::Unix(path("nowhere")));
    let mut link = Link::open(nowhere, Duration::MAX, now).unwrap();
    let woken = std::sync::Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    while !woken.load(Ordering::Acquire) && began.elapsed() < Duration::from_secs(20) {
        let wake = std::sync::Arc::clone(&woken);
        link.attend(now, move || wake.store(true, Ordering::Release), |_| {});
        thread::yield_now();
    }
    link.excuse(Duration::MAX);
    link.attend(now, || {}, |_| {});
    assert!(link.retry > now);
}
