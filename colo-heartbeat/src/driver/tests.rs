//! The threads, between an arbiter that says what the test says, and a guest that notes what is done
//! to it. What is decided is tested with [`Decider`].

use std::error::Error;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use migration_net::Address;

use super::*;
use crate::arbiter::{Answer, Grant, Manual, Owner};
use crate::beat::BEAT_LEN;
use crate::decision::{Order, StopReason};
use crate::failover::{ColoState, Refusal, Role};

/// Far beyond what a busy machine needs.
const LONG: Duration = Duration::from_secs(60);
const TERM: Duration = Duration::from_millis(400);

/// An arbiter that takes each answer out of a channel, and says there before what it was asked.
struct Scripted {
    asked: Sender<Order>,
    answers: Receiver<Answer>,
}

impl Scripted {
    fn answer(&mut self, to: Order) -> Answer {
        let _ = self.asked.send(to);
        let ended = |_| Answer::Unreachable(ArbiterError::new("the test is over"));
        self.answers.recv().unwrap_or_else(ended)
    }
}

impl Arbiter for Scripted {
    fn kind(&self) -> &'static str {
        "script"
    }

    fn term(&self) -> Option<Duration> {
        Some(TERM)
    }

    fn hold(&mut self, _deadline: Instant) -> Answer {
        self.answer(Order::Renew)
    }

    fn claim(&mut self, _deadline: Instant) -> Answer {
        self.answer(Order::Claim)
    }

    fn release(&mut self, _deadline: Instant) {}
}

/// Why the guest was stopped for good, and what else was done to it.
#[derive(Default)]
struct Stopped(Mutex<Option<StopReason>>, Mutex<Vec<&'static str>>);

impl Guest for Stopped {
    fn stop_for_good(&self, reason: StopReason) {
        assert_eq!(lock(&self.0).replace(reason), None);
    }

    fn suspend(&self) {
        lock(&self.1).push("suspend");
    }

    fn resume(&self) {
        lock(&self.1).push("go on");
    }
}

/// COLO's failover on this side: what it is told, and what it was asked.
#[derive(Clone, Default)]
struct Noted(Arc<Mutex<Failing>>);

#[derive(Default)]
struct Failing {
    within: bool,
    /// How often failover was requested since COLO began.
    requests: usize,
    stopped: bool,
}

impl Noted {
    fn set_within(&self, within: bool) {
        let mut failing = lock(&self.0);
        failing.within = within;
        failing.requests = 0;
    }

    fn requests(&self) -> usize {
        lock(&self.0).requests
    }

    fn is_stopped(&self) -> bool {
        lock(&self.0).stopped
    }
}

impl Failover for Noted {
    fn state(&self) -> ColoState {
        if lock(&self.0).within {
            ColoState::Within
        } else {
            ColoState::Outside
        }
    }

    fn request(&self) -> Result<(), Refusal> {
        let mut failing = lock(&self.0);
        let refusal = |text: &str| Err(Refusal::from(Box::<dyn Error + Send + Sync>::from(text)));
        match (failing.within, failing.requests) {
            (false, _) => refusal("VM is not in COLO mode"),
            (true, 0) => {
                failing.requests = 1;
                Ok(())
            }
            (true, _) => refusal("COLO failover is already activated"),
        }
    }

    fn stop_for_good(&self) {
        lock(&self.0).stopped = true;
    }
}

/// A side of a pair in COLO, with the ends of its arbiter's channels.
struct Side {
    /// Dropped first: an arbiter that waits for an answer ends with it.
    answers: Sender<Answer>,
    asked: Receiver<Order>,
    heartbeat: Heartbeat,
    failover: Noted,
    guest: Arc<Stopped>,
}

fn address(name: &str) -> Address {
    let name = format!("colo-beat-{}-{name}", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    Address::Unix(path)
}

fn side(role: Role, on_loss: OnHeartbeatLoss, endpoint: Endpoint, arbitrated: bool) -> Side {
    let (asked_of, asked) = channel();
    let (answers, answered) = channel();
    let scripted = Scripted {
        asked: asked_of,
        answers: answered,
    };
    let arbiter: Box<dyn Arbiter> = if arbitrated {
        Box::new(scripted)
    } else {
        Box::new(Manual)
    };
    // A busy machine keeps up with this.
    let mut rhythm = Rhythm::new(role, [1; 16], on_loss)
        .unwrap()
        .interval(Duration::from_millis(200))
        .missed(10);
    rhythm.process = if role == Role::Primary { 10 } else { 20 };
    let failover = Noted::default();
    let guest = Arc::new(Stopped::default());
    let for_guest = Arc::clone(&guest) as Arc<dyn Guest>;
    Side {
        heartbeat: Heartbeat::start(rhythm, endpoint, failover.clone(), arbiter, for_guest)
            .unwrap(),
        failover,
        guest,
        asked,
        answers,
    }
}

impl Side {
    fn enter(&self) {
        self.failover.set_within(true);
    }

    /// What the arbiter is asked next.
    fn asked(&self) -> Order {
        self.asked.recv_timeout(LONG).expect("a question")
    }

    fn until(&self, what: &str, holds: impl Fn(&HeartbeatReport) -> bool) {
        let deadline = Instant::now() + LONG;
        while !holds(&self.heartbeat.report()) {
            let report = self.heartbeat.report();
            assert!(Instant::now() < deadline, "not {what}: {report:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A secondary in COLO whose primary was never heard.
fn secondary(name: &str, on_loss: OnHeartbeatLoss, arbitrated: bool) -> Side {
    let endpoint = Endpoint::Listen(address(name));
    let side = side(Role::Secondary, on_loss, endpoint, arbitrated);
    side.enter();
    side
}

fn won(until: Option<Instant>) -> Answer {
    Answer::Won(Grant {
        generation: 1,
        until,
    })
}

fn unreachable() -> Answer {
    Answer::Unreachable(ArbiterError::because(
        "asking",
        io::Error::from(io::ErrorKind::TimedOut),
    ))
}

#[test]
fn what_an_operator_wants_is_done_when_the_arbiter_has_granted_the_guest_and_not_before() {
    let side = secondary("granted", OnHeartbeatLoss::Ask, true);
    thread::scope(|scope| {
        let request = scope.spawn(|| side.heartbeat.take_over());
        assert_eq!(side.asked(), Order::Claim);
        assert_eq!(side.failover.requests(), 0);
        side.until("asking", |report| report.phase == Phase::Asking);
        side.answers.send(won(None)).unwrap();
        request.join().unwrap().unwrap();
    });
    assert_eq!(side.failover.requests(), 1);
    side.until("alone", |report| {
        report.phase == Phase::Alone && report.answer.as_deref() == Some("won")
    });
    let again = side.heartbeat.take_over().unwrap_err();
    assert_eq!(again.to_string(), "COLO failover is already activated");
}

#[test]
fn what_the_arbiter_refuses_or_does_not_answer_is_not_done() {
    let side = secondary("refused", OnHeartbeatLoss::Ask, true);
    for (answer, text) in [
        (
            Answer::Lost(Owner::new(7)),
            "another side owns this guest (0000000000000007)",
        ),
        (unreachable(), "the arbiter does not grant this guest"),
    ] {
        let error = thread::scope(|scope| {
            let request = scope.spawn(|| side.heartbeat.take_over());
            assert_eq!(side.asked(), Order::Claim);
            side.answers.send(answer).unwrap();
            request.join().unwrap().unwrap_err()
        });
        assert_eq!(error.to_string(), text);
        side.until("paired", |report| report.phase == Phase::Paired);
        assert_eq!(side.failover.requests(), 0);
    }
    assert_eq!(*lock(&side.guest.0), None);
}

#[test]
fn an_operator_who_overrides_the_fence_is_obeyed_at_once_and_the_arbiter_is_told() {
    let side = secondary("overridden", OnHeartbeatLoss::Ask, true);
    side.heartbeat.override_fence().unwrap();
    assert_eq!(side.failover.requests(), 1);
    side.failover.set_within(false);
    side.heartbeat.colo_ended(ColoEnd::TookOver);
    side.until("alone", |report| report.phase == Phase::Alone);
    for _ in 0..2 {
        assert_eq!(side.asked(), Order::Claim);
        side.answers.send(unreachable()).unwrap();
    }
    assert_eq!(side.asked(), Order::Claim);
    side.answers.send(Answer::Lost(Owner::new(7))).unwrap();
    side.until("told", |report| {
        report.answer.as_deref() == Some("lost to 0000000000000007")
    });
    assert_eq!(side.heartbeat.report().phase, Phase::Alone);
    assert_eq!(*lock(&side.guest.0), None);
}

#[test]
fn without_an_arbiter_an_operator_is_obeyed_at_once_and_outside_colo_refused() {
    for (name, on_loss) in [
        ("manual", OnHeartbeatLoss::Ask),
        ("stop", OnHeartbeatLoss::Stop),
    ] {
        let side = side(
            Role::Secondary,
            on_loss,
            Endpoint::Listen(address(name)),
            on_loss == OnHeartbeatLoss::Stop,
        );
        let outside = side.heartbeat.take_over().unwrap_err();
        assert_eq!(outside.to_string(), "VM is not in COLO mode");
        side.enter();
        side.heartbeat.take_over().unwrap();
        assert_eq!(side.failover.requests(), 1);
    }
}

#[test]
fn a_lease_is_held_before_colo_renewed_in_it_and_its_loss_stops_the_guest() {
    let endpoint = Endpoint::Connect(address("held"));
    let side = side(Role::Primary, OnHeartbeatLoss::Ask, endpoint, true);
    let lost = Answer::Lost(Owner::new(7));
    for (answer, text) in [
        (lost, "another side owns this guest (0000000000000007)"),
        (unreachable(), "the arbiter does not grant this guest"),
    ] {
        side.answers.send(answer).unwrap();
        let refused = side.heartbeat.hold(LONG, None).unwrap_err();
        assert_eq!(side.asked(), Order::Renew);
        assert_eq!(refused.to_string(), text);
    }
    // Each lasts for longer than this machine may be busy.
    let lease = || won(Some(Instant::now() + LONG));
    side.answers.send(lease()).unwrap();
    side.heartbeat.hold(LONG, None).unwrap();
    assert_eq!(side.asked(), Order::Renew);
    side.enter();
    for _ in 0..3 {
        assert_eq!(side.asked(), Order::Renew);
        side.answers.send(lease()).unwrap();
    }
    assert_eq!(side.asked(), Order::Renew);
    side.answers.send(Answer::Lost(Owner::new(7))).unwrap();
    side.until("stopped", |report| report.phase == Phase::Stopped);
    assert_eq!(*lock(&side.guest.0), Some(StopReason::Refused));
    assert!(side.failover.is_stopped());
    for refused in [side.heartbeat.take_over(), side.heartbeat.override_fence()] {
        assert_eq!(
            refused.unwrap_err().to_string(),
            "this side's guest was stopped for good: another side owns the guest"
        );
    }
}

#[test]
fn waiting_for_a_silent_arbiter_is_cancelled_and_the_next_wait_is_not() {
    let endpoint = Endpoint::Connect(address("cancelled"));
    let side = side(Role::Primary, OnHeartbeatLoss::Ask, endpoint, true);
    let token = CancelToken::new().unwrap();
    let refused = thread::scope(|scope| {
        let waits = scope.spawn(|| side.heartbeat.hold(LONG, Some(&token)));
        assert_eq!(side.asked.recv_timeout(LONG).unwrap(), Order::Renew);
        token.cancel();
        waits.join().unwrap().unwrap_err()
    });
    assert!(matches!(refused, HoldError::Cancelled), "{refused}");
    // The answer comes late, and is nobody's.
    side.answers.send(Answer::Lost(Owner::new(7))).unwrap();
    side.heartbeat.release();
    side.answers.send(won(None)).unwrap();
    side.heartbeat.hold(LONG, None).unwrap();
}

/// A primary whose lease has expired, as nobody answers.
fn suspended(name: &str) -> Side {
    let endpoint = Endpoint::Connect(address(name));
    let side = side(Role::Primary, OnHeartbeatLoss::Ask, endpoint, true);
    let until = Instant::now() + TERM;
    side.answers.send(won(Some(until))).unwrap();
    side.heartbeat.hold(LONG, None).unwrap();
    assert_eq!(side.asked(), Order::Renew);
    side.enter();
    // The arbiter is asked, and says nothing.
    side.until("suspended", |report| {
        (report.phase, report.stop) == (Phase::Suspended, Some(StopReason::LeaseExpired))
    });
    assert!(Instant::now() >= until);
    assert_eq!(side.asked(), Order::Renew);
    side.answers.send(unreachable()).unwrap();
    side
}

#[test]
fn a_guest_whose_lease_has_expired_goes_on_when_the_arbiter_says_that_it_may() {
    let side = suspended("given-back");
    for _ in 0..2 {
        assert_eq!(side.asked(), Order::Claim);
        side.answers.send(unreachable()).unwrap();
    }
    assert_eq!(*lock(&side.guest.1), ["suspend"]);
    assert_eq!(side.failover.requests(), 0);
    assert_eq!(side.asked(), Order::Claim);
    side.answers.send(won(None)).unwrap();
    side.until("alone", |report| {
        (report.phase, report.stop) == (Phase::Alone, None)
    });
    // It is let run before COLO is told to end with it.
    assert_eq!(*lock(&side.guest.1), ["suspend", "go on"]);
    assert_eq!(side.failover.requests(), 1);
    assert_eq!(*lock(&side.guest.0), None);
}

#[test]
fn a_guest_whose_lease_has_expired_stops_for_good_when_another_side_owns_it() {
    let side = suspended("taken");
    assert_eq!(side.asked(), Order::Claim);
    side.answers.send(Answer::Lost(Owner::new(7))).unwrap();
    side.until("stopped", |report| report.phase == Phase::Stopped);
    assert_eq!(*lock(&side.guest.0), Some(StopReason::Refused));
    assert_eq!(*lock(&side.guest.1), ["suspend"]);
}

/// Lets this process have as many descriptors as it may: both ends of a flood are its own.
fn allow_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let current = Some(limit.maximum.unwrap_or(u64::MAX).min(8192));
    let limit = rustix::process::Rlimit { current, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

#[test]
fn a_thousand_connections_end_no_pair_that_beats() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    allow_descriptors();
    let at = address("flood");
    let Address::Unix(path) = at.clone() else {
        panic!("{at}");
    };
    let stop = OnHeartbeatLoss::Stop;
    let listens = side(Role::Secondary, stop, Endpoint::Listen(at.clone()), false);
    let connects = side(Role::Primary, stop, Endpoint::Connect(at), false);
    let rhythm = listens.heartbeat.report().rhythm;
    let pair = [&listens, &connects];
    for side in pair {
        side.until("alive", |report| report.peer == PeerState::Alive);
    }
    listens.enter();
    connects.enter();
    // A thousand that say nothing, half of a beat, or something else. They stay open, and come while
    // the pair beats.
    let began = Instant::now();
    let half = [&b""[..], b"CLHB", &[0x55; BEAT_LEN]];
    let flood: Vec<_> = (0..1000)
        .map(|i: usize| {
            let mut stream = UnixStream::connect(&path).unwrap();
            // Garbage is refused, maybe before all of it was written.
            let _ = stream.write_all(half[i % half.len()]);
            stream
        })
        .collect();
    // For at least two timeouts nobody is lost.
    while began.elapsed() < rhythm.timeout() * 2 {
        for report in pair.map(|side| side.heartbeat.report()) {
            assert_eq!(report.peer, PeerState::Alive, "{report:?}");
            assert!(report.connected);
        }
        thread::sleep(Duration::from_millis(20));
    }
    for side in pair {
        assert_eq!(*lock(&side.guest.0), None);
    }
    drop(flood);
}

#[test]
fn an_arbiter_that_is_silent_holds_no_beat_up_and_a_side_that_ends_says_so() {
    let at = address("pair");
    let listens = side(
        Role::Secondary,
        OnHeartbeatLoss::Ask,
        Endpoint::Listen(at.clone()),
        true,
    );
    let connects = side(
        Role::Primary,
        OnHeartbeatLoss::Ask,
        Endpoint::Connect(at),
        true,
    );
    let alive = |report: &HeartbeatReport| report.peer == PeerState::Alive;
    connects.until("alive", alive);
    listens.until("alive", alive);
    connects
        .answers
        .send(won(Some(Instant::now() + TERM)))
        .unwrap();
    connects.heartbeat.hold(LONG, None).unwrap();
    connects.enter();
    listens.enter();
    // The hold and the renewal that nobody answers.
    for _ in 0..2 {
        assert_eq!(connects.asked(), Order::Renew);
    }
    thread::sleep(TERM * 2);
    // It runs by its peer's liveness.
    assert_eq!(connects.heartbeat.report().phase, Phase::Paired);
    connects.until("alive", alive);
    listens.until("alive", alive);
    drop(connects.answers);
    drop(connects.heartbeat);
    listens.until("told", |report| report.peer_phase == Some(Phase::Stopped));
    // Its guest stands still: the guest is claimed at once.
    assert_eq!(listens.asked(), Order::Claim);
    listens.answers.send(won(None)).unwrap();
    listens.until("alone", |report| report.phase == Phase::Alone);
    assert_eq!(listens.failover.requests(), 1);
}
