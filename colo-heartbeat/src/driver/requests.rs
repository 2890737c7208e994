//! What the beating thread is told: by operators, by the arbiter, by its owner.

use std::io;
use std::time::Instant;

use migration_net::Address;

use super::beating::Beating;
use super::shared::lock;
use crate::arbiter::Answer;
use crate::arbitration::{News, Request, TakeOverError};
use crate::decision::{Colo, Decider, Order, Requested};
use crate::failover::Refusal;
use crate::link::{Endpoint, Link};

impl Beating {
    /// Looks at what operators want.
    pub(super) fn take_requests(&mut self, now: Instant) {
        let requests = std::mem::take(&mut *lock(&self.shared.requests));
        for request in requests {
            let view = self.view();
            let (requested, reply) = match request {
                Request::Ask(reply) => (self.decider.request(&view, now), reply),
                // What is not to be done is not to be decided either.
                Request::OverrideFence(reply) if view.colo == Colo::Outside => {
                    let _ = reply.send(Err(TakeOverError::Outside));
                    continue;
                }
                Request::OverrideFence(reply) => (self.decider.override_fence(), reply),
            };
            // Who asked may have given up waiting.
            let _ = match requested {
                Requested::Granted => {
                    reply.send(self.failover.request().map_err(TakeOverError::Refused))
                }
                Requested::Stopped(reason) => reply.send(Err(TakeOverError::Stopped(reason))),
                Requested::PeerAlive => reply.send(Err(TakeOverError::PeerAlive)),
                Requested::Asked => {
                    self.replies.push(reply);
                    Ok(())
                }
            };
        }
    }

    /// Tells those who wait for the answer to a claim what has come of it.
    pub(super) fn answer_requests(
        &mut self,
        claimed: Option<Result<(), TakeOverError>>,
        taken_over: Option<Result<(), Refusal>>,
    ) {
        let result = match (claimed, taken_over, self.decider.stop_reason()) {
            (Some(Ok(())), Some(result), _) => result.map_err(TakeOverError::Refused),
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
    pub(super) fn news(&mut self, now: Instant) -> Option<Result<(), TakeOverError>> {
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
                News::Released => self.decider.released(),
                News::Begins(reply) => {
                    self.peer.pin();
                    self.decider.colo_begins();
                    let _ = reply.send(());
                }
                News::Claim => self.decider.claim_guest(),
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
}
