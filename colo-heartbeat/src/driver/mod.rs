//! The heartbeat over its connection, in a thread of its own, with another for the arbiter, which
//! may be slow.
//!
//! # In the life of a migration
//! [`Heartbeat`] is its owner's handle. The owner tells it what becomes of COLO, in this order:
//!
//! | when | primary | secondary |
//! |---|---|---|
//! | before the migration | [`Heartbeat::start`] | [`Heartbeat::start`] |
//! | in `DeviceState::save`, before the device state is returned | [`Heartbeat::hold`], then [`Heartbeat::colo_begins`] | |
//! | when the guest is settled, before `confirm` | | [`Heartbeat::colo_begins`] |
//! | the migration failed, and the peer provably cannot run | [`Heartbeat::release`] | |
//! | the migration failed, and the peer may have begun | [`Heartbeat::claim`] | |
//! | `run_primary` or `run_secondary` has returned | [`Heartbeat::colo_ended`] | [`Heartbeat::colo_ended`] |
//! | the survivor takes a new secondary | [`Heartbeat::new_pair`], then from `hold` on again | the same |
//! | the guest stands still for good | dropped | dropped |
//!
//! `hold` comes before `colo_begins`: without the lease, COLO must not begin. After a failure before
//! `colo_begins`, `release` gives back the lease that `hold` took.
//!
//! # Parts
//! The thread that beats is in `beating`, with what it is told in
//! `requests` and what it does in `orders`; `shared` is what both sides of the handle see.

mod beating;
mod guest;
mod orders;
mod requests;
mod shared;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

use migration_net::Address;
use migration_stream::io::{CancelToken, deadline_after};

use self::beating::Beating;
pub use self::guest::Guest;
pub use self::shared::HeartbeatReport;
use self::shared::{Shared, lock};
use crate::arbiter::{Arbiter, ArbiterError};
use crate::arbitration::{HoldError, News, Question, Reply, Request, TakeOverError, serve};
use crate::beat::Phase;
use crate::decision::{ANSWER_LIMIT, Decider};
use crate::failover::{ColoEnd, Failover};
use crate::link::{Endpoint, Link};
use crate::peer::{Peer, PeerState, Rhythm};
use crate::policy::OnHeartbeatLoss;

/// How often a wait for the arbiter looks whether it was cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(20);

/// A running heartbeat.
///
/// Dropping it ends it: the peer is told that this guest stands still, and the lease is given up. To be
/// dropped when the guest does.
pub struct Heartbeat {
    shared: Arc<Shared>,
    questions: Sender<Question>,
    news: Sender<News>,
    threads: Vec<JoinHandle<()>>,
}

impl Heartbeat {
    /// Begins to beat at `endpoint`. Decisions are carried out by `failover` and `guest`; with
    /// [`OnHeartbeatLoss::Ask`], `arbiter` makes them.
    ///
    /// # Errors
    /// The address cannot be listened on, or there are no threads to be had.
    pub fn start(
        rhythm: Rhythm,
        endpoint: Endpoint,
        failover: impl Failover + 'static,
        arbiter: Box<dyn Arbiter>,
        guest: Arc<dyn Guest>,
    ) -> io::Result<Self> {
        let now = Instant::now();
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
            endpoint: endpoint.clone(),
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
            link: Link::open(endpoint, rhythm.timeout(), now)?,
            shared: Arc::clone(&shared),
            failover: Box::new(failover),
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

    /// Takes the lease for a primary that is about to enter COLO, before [`Heartbeat::colo_begins`]. Waits
    /// for the arbiter for at most `limit`, and until `cancel` is cancelled. Where no arbiter is asked, nothing
    /// happens.
    ///
    /// # Errors
    /// The lease was not given: COLO must not begin. After [`HoldError::Cancelled`] it may be granted late:
    /// [`release`](Heartbeat::release) gives it up.
    pub fn hold(&self, limit: Duration, cancel: Option<&CancelToken>) -> Result<(), HoldError> {
        if self.report().rhythm.on_loss != OnHeartbeatLoss::Ask {
            return Ok(());
        }
        let (sender, receiver) = channel();
        let question = Question::Hold(deadline_after(limit), sender);
        self.questions
            .send(question)
            .map_err(|_| HoldError::Ended)?;
        loop {
            match receiver.recv_timeout(CANCEL_POLL) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => return Err(HoldError::Ended),
                Err(RecvTimeoutError::Timeout) => {
                    if cancel.is_some_and(CancelToken::is_cancelled) {
                        return Err(HoldError::Cancelled);
                    }
                }
            }
        }
    }

    /// Tells that the peer is about to receive the last thing that it needs to be in COLO. From now on this side is
    /// one of two, whatever its heartbeat says of the other.
    ///
    /// To be called before that is sent: by a primary in `DeviceState::save`, after
    /// [`Heartbeat::hold`]; by a secondary before it confirms.
    pub fn colo_begins(&self) {
        let (sender, receiver) = channel();
        self.tell(News::Begins(sender));
        // A heartbeat that has ended has ended with its guest.
        let _ = receiver.recv();
    }

    /// Gives the lease up: COLO has not begun after all, and the peer does not have what it needs to have
    /// begun. A survivor of another pair [claims](Heartbeat::claim) its guest instead.
    pub fn release(&self) {
        if self.shared.survivor.load(Ordering::Acquire) {
            self.claim();
            return;
        }
        let _ = self
            .questions
            .send(Question::Release(deadline_after(ANSWER_LIMIT)));
    }

    /// Claims the guest for good: COLO has not begun on this side, whose guest goes on, but the peer may
    /// have begun. The guest is stopped if the claim is refused.
    pub fn claim(&self) {
        self.tell(News::Claim);
    }

    /// Makes the survivor of a pair the primary of a new one, with a secondary whose heartbeat listens at
    /// `address`. The survivor owns its guest until [`Heartbeat::hold`].
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

    /// Makes this side go on alone, for an operator who believes that the other side is lost. With
    /// [`OnHeartbeatLoss::Ask`] this waits for the arbiter's grant. Otherwise it is [`Failover::request`].
    ///
    /// # Errors
    /// Nothing was done, and COLO goes on.
    pub fn take_over(&self) -> Result<(), TakeOverError> {
        self.request(Request::Ask)
    }

    /// Overrides the fence: makes this side go on alone whatever the arbiter says, for an operator who has made
    /// sure that the other side cannot run. If it can, two guests run. The arbiter is told as soon as it can be
    /// reached.
    ///
    /// # Errors
    /// This side's guest was stopped for good already, or is not in COLO.
    pub fn override_fence(&self) -> Result<(), TakeOverError> {
        self.request(Request::OverrideFence)
    }

    fn request(&self, request: impl FnOnce(Reply) -> Request) -> Result<(), TakeOverError> {
        let (reply, receiver) = channel();
        lock(&self.shared.requests).push(request(reply));
        self.shared.wake();
        // What asking the arbiter may take, and what may be before it in the arbiter's thread.
        let HeartbeatReport { rhythm, term, .. } = self.report();
        let limit = (rhythm.timeout())
            .saturating_add(term.unwrap_or_default().saturating_mul(4))
            .saturating_add(ANSWER_LIMIT);
        receiver.recv_timeout(limit).unwrap_or_else(|e| {
            Err(match e {
                RecvTimeoutError::Timeout => TakeOverError::Unreachable(ArbiterError::new(
                    "the arbiter has not answered, and may do so yet",
                )),
                RecvTimeoutError::Disconnected => TakeOverError::Ended,
            })
        })
    }

    /// Tells that COLO has ended on this side, and whether the guest runs here. Takes the outcome of
    /// `colo_core`'s drivers as it is.
    pub fn colo_ended(&self, end: impl Into<ColoEnd>) {
        *lock(&self.shared.ended) = Some(end.into());
        self.shared.wake();
    }

    /// Returns what is known now.
    #[must_use]
    pub fn report(&self) -> HeartbeatReport {
        let (mut report, at) = lock(&self.shared.report).clone();
        report.peer_age = report.peer_age.map(|age| age + at.elapsed());
        report
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

#[cfg(test)]
mod tests;
