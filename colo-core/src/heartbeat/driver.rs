//! The heartbeat over its connection, in a thread of its own, with another for the arbiter, which
//! may be slow.

use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use multifd::Address;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::setpriority_process;

use super::arbitration::{HoldError, News, Question, Reply, Request, TakeOverError, serve};
use super::decision::{Colo, Decider, Order, PATIENCE, Requested, StopReason, View};
use super::link::{Endpoint, Link, LinkEvent};
use super::peer::{Peer, PeerState, Rhythm};
use super::{OnHeartbeatLoss, Phase};
use crate::arbiter::{Answer, Arbiter, ArbiterError};
use crate::{ColoMode, FailoverHandle, Outcome, RequestError, StatusReason};

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

    /// Stops the guest until [`Guest::go_on`] or [`Guest::stop_for_good`]: neither COLO nor an
    /// operator may let it run meanwhile, and neither is told that it does not. Returns when it stands
    /// still.
    fn suspend(&self);

    /// Ends [`Guest::suspend`]: the guest runs if it would have without.
    fn go_on(&self);
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
    /// Why it has stopped, or stands still until the arbiter is heard.
    pub stop: Option<StopReason>,
    /// How it beats.
    pub rhythm: Rhythm,
    /// Where.
    pub endpoint: Endpoint,
    /// The arbiter's kind.
    pub arbiter: &'static str,
    /// How long a right of its lasts.
    pub term: Option<Duration>,
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
    /// Wishes that were not looked at yet: see [`Heartbeat::take_over`].
    requests: Mutex<Vec<Request>>,
    quit: AtomicBool,
    wake: Mutex<PipeWriter>,
}

impl Shared {
    /// What the arbiter has said last.
    fn note(&self, answer: &Answer) {
        let mut report = lock(&self.report);
        report.0.answer = Some(match answer {
            Answer::Won(_) => "won".to_owned(),
            Answer::Lost(owner) => format!("lost to {owner}"),
            Answer::Unreachable(error) => error.chain(),
        });
        if let Answer::Won(grant) = answer {
            report.0.generation = Some(grant.generation);
        }
    }

    fn wake(&self) {
        // The pipe is read as soon as it has something: one that is full is about to be.
        let _ = lock(&self.wake).write(&[1]);
    }
}

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
            term: arbiter.term(),
            answer: None,
            generation: None,
            refused: None,
        };
        let shared = Arc::new(Shared {
            report: Mutex::new((report, now)),
            survivor: AtomicBool::new(false),
            ended: Mutex::new(None),
            requests: Mutex::default(),
            quit: AtomicBool::new(false),
            wake: Mutex::new(wake),
        });
        let (questions, asked) = channel();
        let (answers, news) = channel();
        let beating = Beating {
            peer: Peer::new(rhythm, now),
            decider: Decider::new(rhythm.role, rhythm.on_loss, arbiter.term()),
            link: Link::open(config.endpoint, rhythm.timeout(), now)?,
            shared: Arc::clone(&shared),
            failover,
            guest,
            questions: questions.clone(),
            news,
            woken,
            entered: false,
            replies: Vec::new(),
        };
        let to_beats = answers.clone();
        let for_arbiter = Arc::clone(&shared);
        let arbiter = thread::Builder::new()
            .name("arbiter".into())
            .spawn(move || {
                serve(
                    arbiter,
                    &asked,
                    &answers,
                    |answer| for_arbiter.note(answer),
                    || for_arbiter.wake(),
                );
            })?;
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

    /// An operator believes that the other side is lost, and wants this one to go on alone. Where an
    /// arbiter is asked, it has to give the right first, for which it is waited; otherwise this is
    /// [`FailoverHandle::request`].
    ///
    /// # Errors
    /// Nothing was done. Where the arbiter has refused or could not be asked, COLO goes on.
    pub fn take_over(&self) -> Result<(), TakeOverError> {
        self.request(Request::Ask)
    }

    /// An operator takes it upon himself that the other side does not run, and has this one go on
    /// alone whatever the arbiter says. The arbiter is told when it can be reached.
    ///
    /// # Errors
    /// This side's guest was stopped for good already, or is not in COLO.
    pub fn overrule(&self) -> Result<(), TakeOverError> {
        self.request(Request::Overrule)
    }

    fn request(&self, request: impl FnOnce(Reply) -> Request) -> Result<(), TakeOverError> {
        let (reply, receiver) = channel();
        lock(&self.shared.requests).push(request(reply));
        self.shared.wake();
        // What asking the arbiter may take, and what may be before it in the arbiter's thread.
        let HeartbeatReport { rhythm, term, .. } = self.report();
        let limit = rhythm.timeout() + term.unwrap_or_default() * 4 + PATIENCE;
        receiver.recv_timeout(limit).unwrap_or_else(|e| {
            Err(match e {
                RecvTimeoutError::Timeout => TakeOverError::Unreachable(ArbiterError::new(
                    "the arbiter has not answered, and may do so yet",
                )),
                RecvTimeoutError::Disconnected => TakeOverError::Ended,
            })
        })
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
    link: Link,
    shared: Arc<Shared>,
    failover: FailoverHandle,
    guest: Arc<dyn Guest>,
    questions: Sender<Question>,
    news: Receiver<News>,
    woken: PipeReader,
    /// COLO has been seen.
    entered: bool,
    /// Who waits for the answer to a claim.
    replies: Vec<Reply>,
}

impl Beating {
    fn run(mut self) {
        come_first();
        let mut connected = false;
        loop {
            let now = Instant::now();
            // Whatever has kept this thread from looking: what has come meanwhile is taken first.
            let late = self.peer.look(now);
            self.link.excuse(late);
            self.read(now, &mut connected);
            let wake = Arc::clone(&self.shared);
            self.link.attend(
                now,
                move || wake.wake(),
                |event| connected |= matches!(event, LinkEvent::Connected),
            );
            let before = self.decider.phase();
            self.take_requests(now);
            let claimed = self.news(now);
            let quit = self.shared.quit.load(Ordering::Acquire);
            let taken_over = self.decide(quit);
            self.answer_requests(claimed, taken_over);
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

    /// Looks at what operators want.
    fn take_requests(&mut self, now: Instant) {
        let requests = std::mem::take(&mut *lock(&self.shared.requests));
        for request in requests {
            let view = self.view();
            let (requested, reply) = match request {
                Request::Ask(reply) => (self.decider.request(&view, now), reply),
                // What is not to be done is not to be decided either.
                Request::Overrule(reply) if view.colo == Colo::Outside => {
                    let _ = reply.send(Err(RequestError::NotInColo.into()));
                    continue;
                }
                Request::Overrule(reply) => (self.decider.overrule(), reply),
            };
            // Who asked may have given up waiting.
            let _ = match requested {
                Requested::Granted => reply.send(self.failover.request().map_err(Into::into)),
                Requested::Stopped(reason) => reply.send(Err(TakeOverError::Stopped(reason))),
                Requested::Heard => reply.send(Err(TakeOverError::Heard)),
                Requested::Asked => {
                    self.replies.push(reply);
                    Ok(())
                }
            };
        }
    }

    /// Tells those who wait for the answer to a claim what has come of it.
    fn answer_requests(
        &mut self,
        claimed: Option<Result<(), TakeOverError>>,
        taken_over: Option<Result<(), RequestError>>,
    ) {
        let result = match (claimed, taken_over, self.decider.stop_reason()) {
            (Some(Ok(())), Some(result), _) => result.map_err(TakeOverError::from),
            (Some(result), _, _) => result,
            (None, _, Some(reason)) => Err(TakeOverError::Stopped(reason)),
            (None, _, None) => return,
        };
        for reply in self.replies.drain(..) {
            let _ = reply.send(match &result {
                Ok(()) => Ok(()),
                Err(error) => Err(error.again()),
            });
        }
    }

    /// Hands on what the arbiter says; what it has said to a claim is the result.
    fn news(&mut self, now: Instant) -> Option<Result<(), TakeOverError>> {
        let mut claimed = None;
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Answer(order, answer) => {
                    if matches!(answer, Answer::Unreachable(_)) {
                        tracing::warn!(%answer, ?order, "arbiter");
                    } else if order == Order::Claim {
                        tracing::info!(%answer, "arbiter");
                    }
                    self.decider.answer(order, &answer, now);
                    if order == Order::Claim {
                        claimed = Some(match answer {
                            Answer::Won(_) => Ok(()),
                            Answer::Lost(owner) => Err(TakeOverError::Lost(owner)),
                            Answer::Unreachable(e) => Err(TakeOverError::Unreachable(e)),
                        });
                    }
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
        claimed
    }

    fn new_pair(&mut self, address: Address, now: Instant) -> io::Result<()> {
        let peer = self.peer.renewed(now);
        let rhythm = *peer.rhythm();
        let endpoint = Endpoint::Connect(address);
        let term = lock(&self.shared.report).0.term;
        self.link = Link::open(endpoint.clone(), rhythm.timeout(), now)?;
        self.decider = Decider::new(rhythm.role, rhythm.on_loss, term);
        self.peer = peer;
        self.entered = false;
        *lock(&self.shared.ended) = None;
        let mut shared = lock(&self.shared.report);
        shared.0.rhythm = rhythm;
        shared.0.endpoint = endpoint;
        shared.0.refused = None;
        Ok(())
    }

    fn view(&mut self) -> View {
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
            peer: self.peer.state(),
            peer_phase: self.peer.phase(),
            hears_until: self.peer.hears_until(),
            relies_until: self.peer.relies_until(),
        }
    }

    /// Does what is to be done; the result is that of an order to take over.
    fn decide(&mut self, quit: bool) -> Option<Result<(), RequestError>> {
        let mut taken_over = None;
        loop {
            let now = Instant::now();
            let view = self.view();
            if quit {
                return taken_over;
            }
            if view.colo != Colo::Outside && view.peer != PeerState::Unheard {
                self.peer.pin();
            }
            let Some(order) = self.decider.next(&view, now) else {
                return taken_over;
            };
            match order {
                Order::Renew | Order::Claim => {
                    let deadline = self.decider.patience(order, &view, now);
                    let _ = self.questions.send(Question::Order(order, deadline));
                }
                Order::TakeOver => {
                    let silence = self.peer.silence(now);
                    tracing::warn!(
                        peer_age_ms = silence.heard.map(|d| d.as_millis()),
                        unanswered_ms = silence.unanswered.map(|d| d.as_millis()),
                        overslept_ms = silence.overslept.as_millis(),
                        limit_ms = self.peer.rhythm().timeout().as_millis(),
                        policy = %self.peer.rhythm().on_loss,
                        "the peer is lost: this side goes on alone"
                    );
                    let result = self.failover.request();
                    if let Err(error) = result {
                        tracing::info!(%error, "failover was asked for already");
                    }
                    taken_over = Some(result);
                }
                Order::Suspend => {
                    let silence = self.peer.silence(now);
                    tracing::error!(
                        peer_age_ms = silence.heard.map(|d| d.as_millis()),
                        "the right to run has run out: the guest stands still until the arbiter has \
                         said whose it is"
                    );
                    self.guest.suspend();
                }
                Order::GoOn => {
                    tracing::warn!("the right to run is this side's: the guest goes on");
                    self.guest.go_on();
                }
                Order::Stop(reason) => {
                    let silence = self.peer.silence(now);
                    tracing::error!(
                        %reason,
                        peer_age_ms = silence.heard.map(|d| d.as_millis()),
                        unanswered_ms = silence.unanswered.map(|d| d.as_millis()),
                        overslept_ms = silence.overslept.as_millis(),
                        limit_ms = self.peer.rhythm().timeout().as_millis(),
                        policy = %self.peer.rhythm().on_loss,
                        "this side's guest is stopped for good"
                    );
                    self.guest.stop_for_good(reason);
                    let until = Instant::now() + PATIENCE;
                    let _ = self.questions.send(Question::Release(until));
                }
            }
        }
    }

    fn publish(&self, now: Instant) {
        let mut shared = lock(&self.shared.report);
        let report = &mut shared.0;
        report.peer = self.peer.state();
        report.peer_age = self.peer.age(now);
        report.peer_phase = self.peer.phase();
        report.connected = self.link.is_connected();
        report.phase = self.decider.phase();
        let suspended = self.decider.is_suspended();
        report.stop = (self.decider.stop_reason()).or(suspended.then_some(StopReason::RanOut));
        shared.1 = now;
    }

    /// Until there is something to read, or to do.
    fn wait(&mut self) {
        let now = Instant::now();
        let view = self.view();
        let looked = self.peer.looked();
        let soon = [
            Some(self.peer.due()),
            // Not before another look.
            self.peer.lost_at().filter(|at| *at > looked),
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

/// Has this thread scheduled before the host's other work, if its user may ask for that. It runs for
/// some microseconds a beat, and a beat that is late on a busy host is taken for that host's death.
fn come_first() {
    // On Linux this is the calling thread's alone.
    if let Err(error) = setpriority_process(None, -20) {
        tracing::debug!(%error, "the heartbeat has the priority of everything else");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
