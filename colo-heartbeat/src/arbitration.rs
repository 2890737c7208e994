//! The thread that asks the arbiter, which may be slow, and its answers to other threads.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use migration_stream::io::deadline_after;

use migration_net::Address;

use super::decision::{Order, StopReason};
use crate::arbiter::{Answer, Arbiter, ArbiterError, Owner};

/// Why a lease was not given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// Another side owns the guest.
    #[error("another side owns this guest ({0})")]
    Lost(Owner),
    /// The arbiter did not answer.
    #[error("the arbiter does not grant this guest")]
    Unreachable(#[source] ArbiterError),
    /// The heartbeat has ended.
    #[error("the heartbeat has ended")]
    Ended,
    /// The wait was cancelled.
    #[error("waiting for the lease was cancelled")]
    Cancelled,
}

/// Why a side does not go on alone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakeOverError {
    /// Another side owns the guest, and uses it.
    #[error("another side owns this guest ({0})")]
    Lost(Owner),
    /// The arbiter did not answer in time. It may do so later.
    #[error("the arbiter does not grant this guest")]
    Unreachable(#[source] ArbiterError),
    /// The primary is alive, and owns the guest.
    #[error("the other side owns this guest, and is alive")]
    PeerAlive,
    /// This side's guest may not run any more.
    #[error("this side's guest was stopped for good: {0}")]
    Stopped(StopReason),
    /// This side is not in COLO.
    #[error("VM is not in COLO mode")]
    Outside,
    /// COLO did not take the request.
    #[error(transparent)]
    Refused(Arc<dyn std::error::Error + Send + Sync>),
    /// The heartbeat has ended.
    #[error("the heartbeat has ended")]
    Ended,
}

impl TakeOverError {
    /// Returns a copy for another caller.
    pub(super) fn again(&self) -> Self {
        match self {
            Self::Lost(owner) => Self::Lost(*owner),
            // An error has one owner: the others get its text.
            Self::Unreachable(error) => Self::Unreachable(ArbiterError::new(error.chain())),
            Self::Stopped(reason) => Self::Stopped(*reason),
            Self::Refused(error) => Self::Refused(Arc::clone(error)),
            Self::Outside => Self::Outside,
            Self::PeerAlive => Self::PeerAlive,
            Self::Ended => Self::Ended,
        }
    }
}

/// Where the caller of a take-over waits for its result.
pub(super) type Reply = Sender<Result<(), TakeOverError>>;

/// A request to go on alone.
pub(super) enum Request {
    /// By the arbiter's word.
    Ask(Reply),
    /// By his own.
    OverrideFence(Reply),
}

pub(super) enum Question {
    Order(Order, Instant),
    Hold(Instant, Sender<Result<(), HoldError>>),
    Release(Instant),
    Quit,
}

pub(super) enum News {
    Answer(Order, Answer),
    Held(Option<Instant>, Instant),
    Released,
    Begins(Sender<()>),
    Claim,
    NewPair(Address, Sender<io::Result<()>>),
}

/// The arbiter's thread. `note` is told of every answer, `wake` is called when there is news.
pub(super) fn serve(
    mut arbiter: Box<dyn Arbiter>,
    questions: &Receiver<Question>,
    answers: &Sender<News>,
    note: impl Fn(&Answer),
    wake: impl Fn(),
) {
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
                wake();
                continue;
            }
            Question::Release(deadline) => {
                arbiter.release(deadline);
                News::Released
            }
            Question::Quit => {
                arbiter.release(deadline_after(Duration::from_secs(1)));
                return;
            }
        };
        let _ = answers.send(news);
        wake();
    }
}
