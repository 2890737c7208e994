//! What is decided, done.

use std::time::Instant;

use migration_stream::io::deadline_after;

use super::beating::Beating;
use crate::arbitration::Question;
use crate::decision::{ANSWER_LIMIT, Colo, Order};
use crate::failover::Refusal;
use crate::peer::PeerState;

impl Beating {
    /// Does what is to be done; the result is that of an order to take over.
    pub(super) fn decide(&mut self, quit: bool) -> Option<Result<(), Refusal>> {
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
                    let deadline = self.decider.answer_deadline(order, &view, now);
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
                    if let Err(error) = &result {
                        tracing::info!(%error, "failover was asked for already");
                    }
                    taken_over = Some(result);
                }
                Order::Suspend => {
                    let silence = self.peer.silence(now);
                    tracing::error!(
                        peer_age_ms = silence.heard.map(|d| d.as_millis()),
                        "the lease has expired: the guest is suspended until the arbiter says who owns it"
                    );
                    self.guest.suspend();
                }
                Order::Resume => {
                    tracing::warn!("this side owns the guest, which goes on");
                    self.guest.resume();
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
                    // COLO, if there is any, ends by itself.
                    self.failover.stop_for_good();
                    let until = deadline_after(ANSWER_LIMIT);
                    let _ = self.questions.send(Question::Release(until));
                }
            }
        }
    }
}
