//! The heartbeat over its connection, in a thread of its own, with another for the arbiter, which
//! may be slow.

use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use multifd::Address;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::decision::{Colo, Decider, Order, StopReason, View};
use super::link::{Endpoint, Link, LinkEvent};
use super::peer::{Peer, PeerState, Rhythm};
use super::{OnHeartbeatLoss, Phase};
use crate::arbiter::{Answer, Arbiter};
use crate::{ColoMode, FailoverHandle, Outcome, StatusReason};

/// What a heartbeat is told once.
#[derive(Clone, Debug)]
pub struct HeartbeatConfig {
    /// Who beats, and how.
    pub rhythm: Rhythm,
    /// Where.
    pub endpoint: Endpoint,
}

/// The guest, in the heartbeat's hands.
pub trait Guest: Send + Sync {
    /// Stops the guest for good: neither COLO nor an operator may let it run again. Returns when it
    /// stands still. Called at most once, in the heartbeat's thread.
    fn stop_for_good(&self, reason: StopReason);
}

/// Why a right was not given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// It is another's.
    #[error("the right to run this guest is another's ({0})")]
    Lost(crate::arbiter::Owner),
    /// The arbiter did not answer.
    #[error("the arbiter gives no right to run this guest")]
    Unreachable(#[source] crate::arbiter::ArbiterError),
    /// The heartbeat has ended.
    #[error("the heartbeat has ended")]
    Ended,
}

/// What is known of the heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeartbeatReport {
    /// The peer.
    pub peer: PeerState,
    /// How long ago it was heard.
    pub peer_age: Option<Duration>,
    /// What it has said of itself.
    pub peer_phase: Option<Phase>,
    /// Is there a connection on which it was heard?
    pub connected: bool,
    /// This side.
    pub phase: Phase,
    /// Why it has stopped.
    pub stop: Option<StopReason>,
    /// How it beats.
    pub rhythm: Rhythm,
    /// Where.
    pub endpoint: Endpoint,
    /// The arbiter's kind.
    pub arbiter: &'static str,
    /// What it has last said, `None` before it was asked.
    pub answer: Option<String>,
    /// The generation of the right that it has last given.
    pub generation: Option<u64>,
    /// Why beats were last refused.
    pub refused: Option<String>,
}

/// A running heartbeat. Dropping it ends it.
pub struct Heartbeat {
    shared: Arc<Shared>,
    questions: Sender<Question>,
    news: Sender<News>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    report: Mutex<(HeartbeatReport, Instant)>,
    /// It has survived another pair: its right is never given up as long as its guest runs.
    survivor: AtomicBool,
    /// What has become of COLO: see [`Heartbeat::colo_ended`].
    ended: Mutex<Option<Colo>>,
    quit: AtomicBool,
    wake: Mutex<PipeWriter>,
}

impl Shared {
    fn wake(&self) {
        // The pipe is read as soon as it has something: one that is full is about to be.
        let _ = lock(&self.wake).write(&[1]);
    }
}

enum Question {
    Order(Order, Instant),
    Hold(Instant, Sender<Result<(), HoldError>>),
    Release(Instant),
    Quit,
}

enum News {
    Answer(Order, Answer),
    Held(Option<Instant>, Instant),
    Released,
    Begins(Sender<()>),
    Keep,
    NewPair(Address, Sender<io::Result<()>>),
}

/// The longest that an arbiter without a term is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

impl Heartbeat {
    /// Begins to beat. What is decided goes to `failover` and `guest`.
    ///
    /// # Errors
    /// The address cannot be listened on, or there are no threads to be had.
    pub fn start(
        config: HeartbeatConfig,
        failover: FailoverHandle,
        arbiter: Box<dyn Arbiter>,
        guest: Arc<dyn Guest>,
    ) -> io::Result<Self> {
        let now = Instant::now();
        let rhythm = config.rhythm;
        let (woken, wake) = io::pipe()?;
        rustix::io::ioctl_fionbio(&woken, true)?;
        rustix::io::ioctl_fionbio(&wake, true)?;
        let report = HeartbeatReport {
            peer: PeerState::Unheard,
            peer_age: None,
            peer_phase: None,
            connected: false,
            phase: Phase::Paired,
            stop: None,
            rhythm,
            endpoint: config.endpoint.clone(),
            arbiter: arbiter.kind(),
            answer: None,
            generation: None,
            refused: None,
        };
        let shared = Arc::new(Shared {
            report: Mutex::new((report, now)),
            survivor: AtomicBool::new(false),
            ended: Mutex::new(None),
            quit: AtomicBool::new(false),
            wake: Mutex::new(wake),
        });
        let (questions, asked) = channel();
        let (answers, news) = channel();
        let beating = Beating {
            peer: Peer::new(rhythm, now),
            decider: Decider::new(rhythm.role, rhythm.on_loss, arbiter.term()),
            term: arbiter.term(),
            link: Link::open(config.endpoint, rhythm.timeout(), now)?,
            shared: Arc::clone(&shared),
            failover,
            guest,
            questions: questions.clone(),
            news,
            woken,
            entered: false,
        };
        let to_beats = answers.clone();
        let for_arbiter = Arc::clone(&shared);
        let arbiter = thread::Builder::new()
            .name("arbiter".into())
            .spawn(move || serve(arbiter, &asked, &answers, &for_arbiter))?;
        let mut this = Self {
            shared,
            questions,
            news: to_beats,
            threads: vec![arbiter],
        };
        let beats = thread::Builder::new().name("heartbeat".into());
        this.threads.push(beats.spawn(move || beating.run())?);
        Ok(this)
    }

    /// Takes the right to run for a primary that is about to enter COLO. Where no arbiter is asked,
    /// nothing happens.
    ///
    /// # Errors
    /// It was not given: COLO must not begin.
    pub fn hold(&self, limit: Duration) -> Result<(), HoldError> {
        if self.report().rhythm.on_loss != OnHeartbeatLoss::Ask {
            return Ok(());
        }
        let (sender, receiver) = channel();
        let question = Question::Hold(Instant::now() + limit, sender);
        self.questions
            .send(question)
            .map_err(|_| HoldError::Ended)?;
        receiver.recv().map_err(|_| HoldError::Ended)?
    }

    /// The peer is about to get the last of what it needs to be in COLO: from now on this side is one of
    /// two, whatever it hears of the other. To be called before that is sent.
    pub fn begins(&self) {
        let (sender, receiver) = channel();
        self.tell(News::Begins(sender));
        // A heartbeat that has ended has ended with its guest.
        let _ = receiver.recv();
    }

    /// COLO has not begun after all, and the peer does not have what it needs to have begun: the right
    /// is given up. A survivor of another pair [keeps](Heartbeat::keep) it.
    pub fn give_up(&self) {
        if self.shared.survivor.load(Ordering::Acquire) {
            self.keep();
            return;
        }
        let _ = self
            .questions
            .send(Question::Release(Instant::now() + PATIENCE));
    }

    /// COLO has not begun on this side, whose guest goes on, but the peer may have begun: the right is
    /// claimed for good. The guest is stopped if it is refused.
    pub fn keep(&self) {
        self.tell(News::Keep);
    }

    /// The survivor of a pair is to be the primary of a new one, with a secondary whose heartbeat listens
    /// at `address`. Its right stays what it is, until [`Heartbeat::hold`].
    ///
    /// # Errors
    /// The heartbeat has ended.
    pub fn new_pair(&self, address: Address) -> io::Result<()> {
        self.shared.survivor.store(true, Ordering::Release);
        let (sender, receiver) = channel();
        self.tell(News::NewPair(address, sender));
        receiver
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the heartbeat has ended")))
    }

    fn tell(&self, news: News) {
        let _ = self.news.send(news);
        self.shared.wake();
    }

    /// COLO has ended on this side, and this has become of the VM.
    pub fn colo_ended(&self, outcome: Outcome) {
        *lock(&self.shared.ended) = Some(match outcome {
            Outcome::TookOver => Colo::TookOver,
            Outcome::Quit | Outcome::Broken(_) => Colo::Ended,
        });
        self.shared.wake();
    }

    /// What is known now.
    #[must_use]
    pub fn report(&self) -> HeartbeatReport {
        let (mut report, at) = lock(&self.shared.report).clone();
        report.peer_age = report.peer_age.map(|age| age + at.elapsed());
        report
    }

    /// Ends it: the peer is told that this guest stands still, and the right is given up. To be
    /// called when the guest does.
    pub fn end(mut self) {
        self.quit();
    }

    fn quit(&mut self) {
        self.shared.quit.store(true, Ordering::Release);
        self.shared.wake();
        // The beats first: they tell the peer, and ask nothing any more.
        for thread in self.threads.drain(..).rev() {
            if thread.thread().name() == Some("arbiter") {
                let _ = self.questions.send(Question::Quit);
            }
            if thread.join().is_err() {
                tracing::error!("a thread of the heartbeat panicked");
            }
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.quit();
    }
}

impl fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heartbeat")
            .field("report", &self.report())
            .finish_non_exhaustive()
    }
}

/// What the heartbeat's thread has.
struct Beating {
    peer: Peer,
    decider: Decider,
    term: Option<Duration>,
    link: Link,
    shared: Arc<Shared>,
    failover: FailoverHandle,
    guest: Arc<dyn Guest>,
    questions: Sender<Question>,
    news: Receiver<News>,
    woken: PipeReader,
    /// COLO has been seen.
    entered: bool,
}

impl Beating {
    fn run(mut self) {
        let mut connected = false;
        loop {
            let now = Instant::now();
            let wake = Arc::clone(&self.shared);
            self.link.attend(
                now,
                move || wake.wake(),
                |event| connected |= matches!(event, LinkEvent::Connected),
            );
            self.read(now, &mut connected);
            self.news(now);
            let quit = self.shared.quit.load(Ordering::Acquire);
            let before = self.decider.phase();
            self.decide(quit);
            let now = Instant::now();
            let phase = if quit {
                Phase::Stopped
            } else {
                self.decider.phase()
            };
            if quit || phase != before || std::mem::take(&mut connected) {
                let beat = self.peer.beat_now(phase, now);
                self.link.send(&beat);
            } else if let Some(beat) = self.peer.beat(phase, now) {
                self.link.send(&beat);
            }
            self.publish(now);
            if quit {
                return;
            }
            self.wait();
        }
    }

    fn read(&mut self, now: Instant, connected: &mut bool) {
        let Self {
            link, peer, shared, ..
        } = self;
        let mut closed = false;
        link.read(
            now,
            |beat| match peer.receive(beat, now) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%error, "heartbeat refused");
                    lock(&shared.report).0.refused = Some(error.to_string());
                    false
                }
            },
            |event| match event {
                LinkEvent::Connected => *connected = true,
                LinkEvent::Closed => closed = true,
            },
        );
        if closed {
            self.peer.disconnected();
        }
    }

    fn news(&mut self, now: Instant) {
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Answer(order, answer) => {
                    if matches!(answer, Answer::Unreachable(_)) {
                        tracing::warn!(%answer, ?order, "arbiter");
                    } else if order == Order::Claim {
                        tracing::info!(%answer, "arbiter");
                    }
                    self.decider.answer(order, &answer, now);
                }
                News::Held(until, asked) => self.decider.held(until, asked),
                News::Released => self.decider.given_up(),
                News::Begins(reply) => {
                    self.peer.pin();
                    self.decider.begins();
                    let _ = reply.send(());
                }
                News::Keep => self.decider.keep(),
                News::NewPair(address, reply) => {
                    let made = self.new_pair(address, now);
                    self.publish(now);
                    let _ = reply.send(made);
                }
            }
        }
    }

    fn new_pair(&mut self, address: Address, now: Instant) -> io::Result<()> {
        let peer = self.peer.renewed(now);
        let rhythm = *peer.rhythm();
        let endpoint = Endpoint::Connect(address);
        self.link = Link::open(endpoint.clone(), rhythm.timeout(), now)?;
        self.decider = Decider::new(rhythm.role, rhythm.on_loss, self.term);
        self.peer = peer;
        self.entered = false;
        *lock(&self.shared.ended) = None;
        let mut shared = lock(&self.shared.report);
        shared.0.rhythm = rhythm;
        shared.0.endpoint = endpoint;
        shared.0.refused = None;
        Ok(())
    }

    fn view(&mut self, now: Instant) -> View {
        let status = self.failover.status();
        let within = status.mode != ColoMode::None;
        let ended = *lock(&self.shared.ended);
        self.entered |= within;
        View {
            colo: match ended {
                Some(ended) => ended,
                None if within && status.reason == StatusReason::Error => Colo::Broken,
                None if within => Colo::Within,
                // Between the end and the word of what it was.
                None if self.entered => Colo::Within,
                None => Colo::Outside,
            },
            peer: self.peer.state(now),
            peer_phase: self.peer.phase(),
            hears_until: self.peer.hears_until(),
        }
    }

    fn decide(&mut self, quit: bool) {
        loop {
            let now = Instant::now();
            let view = self.view(now);
            if quit {
                return;
            }
            if view.colo != Colo::Outside && view.peer != PeerState::Unheard {
                self.peer.pin();
            }
            let Some(order) = self.decider.next(&view, now) else {
                return;
            };
            match order {
                Order::Renew | Order::Claim => {
                    let deadline = self.deadline(order, &view, now);
                    let _ = self.questions.send(Question::Order(order, deadline));
                }
                Order::TakeOver => {
                    tracing::warn!("the peer is lost: this side goes on alone");
                    if let Err(error) = self.failover.request() {
                        tracing::info!(%error, "failover was asked for already");
                    }
                }
                Order::Stop(reason) => {
                    tracing::error!(%reason, "this side's guest is stopped for good");
                    self.guest.stop_for_good(reason);
                    let until = Instant::now() + PATIENCE;
                    let _ = self.questions.send(Question::Release(until));
                }
            }
        }
    }

    /// Until when the arbiter's answer is of use.
    fn deadline(&self, order: Order, view: &View, now: Instant) -> Instant {
        let limit = match (self.term, order) {
            (None, _) => PATIENCE,
            (Some(term), Order::Claim) => term * 3,
            (Some(term), _) => term / 2,
        };
        let limit = now + limit;
        // A right that comes when the guest has been stopped helps nobody.
        match self.decider.deadline(view) {
            Some(guard) if self.decider.holds() && guard > now => limit.min(guard),
            _ => limit,
        }
    }

    fn publish(&self, now: Instant) {
        let mut shared = lock(&self.shared.report);
        let report = &mut shared.0;
        report.peer = self.peer.state(now);
        report.peer_age = self.peer.age(now);
        report.peer_phase = self.peer.phase();
        report.connected = self.link.is_connected();
        report.phase = self.decider.phase();
        report.stop = self.decider.stop_reason();
        shared.1 = now;
    }

    /// Until there is something to read, or to do.
    fn wait(&mut self) {
        let now = Instant::now();
        let view = self.view(now);
        let soon = [
            Some(self.peer.due()),
            self.peer.lost_at().filter(|at| *at > now),
            self.decider.deadline(&view),
        ];
        let until = soon.into_iter().flatten().min().unwrap_or(now);
        let left = until.saturating_duration_since(now);
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let wake = std::iter::once(self.woken.as_fd());
        let mut fds: Vec<_> = wake
            .chain(self.link.fds())
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // Interrupted or failed: the caller looks at everything anyway, a beat later at the latest.
        if poll(&mut fds, Some(&timeout)).is_err() {
            thread::sleep(left.min(Duration::from_millis(1)));
        }
        drop(fds);
        let mut bytes = [0; 64];
        while matches!(self.woken.read(&mut bytes), Ok(64)) {}
    }
}

/// The arbiter's thread.
fn serve(
    mut arbiter: Box<dyn Arbiter>,
    questions: &Receiver<Question>,
    answers: &Sender<News>,
    shared: &Shared,
) {
    let note = |answer: &Answer| {
        let mut report = lock(&shared.report);
        report.0.answer = Some(match answer {
            Answer::Won(_) => "won".to_owned(),
            Answer::Lost(owner) => format!("lost to {owner}"),
            Answer::Unreachable(error) => chain(error),
        });
        if let Answer::Won(grant) = answer {
            report.0.generation = Some(grant.generation);
        }
    };
    while let Ok(question) = questions.recv() {
        let news = match question {
            Question::Order(order, deadline) => {
                let answer = match order {
                    Order::Claim => arbiter.claim(deadline),
                    _ => arbiter.hold(deadline),
                };
                note(&answer);
                News::Answer(order, answer)
            }
            Question::Hold(deadline, reply) => {
                let asked = Instant::now();
                let answer = arbiter.hold(deadline);
                note(&answer);
                let (news, result) = match answer {
                    Answer::Won(grant) => (Some(News::Held(grant.until, asked)), Ok(())),
                    Answer::Lost(owner) => (None, Err(HoldError::Lost(owner))),
                    Answer::Unreachable(error) => (None, Err(HoldError::Unreachable(error))),
                };
                // Known before whoever asked goes on.
                if let Some(news) = news {
                    let _ = answers.send(news);
                }
                let _ = reply.send(result);
                shared.wake();
                continue;
            }
            Question::Release(deadline) => {
                arbiter.release(deadline);
                News::Released
            }
            Question::Quit => {
                arbiter.release(Instant::now() + Duration::from_secs(1));
                return;
            }
        };
        let _ = answers.send(news);
        shared.wake();
    }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
