//! What a side decides, and does.

use colo_heartbeat::raw::{Colo, Order, Want};
use colo_heartbeat::{Phase, Role};

use super::World;
use super::register::PATIENT;
use super::time::{at, tick_of};

impl World {
    pub(super) fn decide(&mut self, role: Role) -> Result<(), String> {
        let (tick, now, dawdling) = (self.now, at(self.now), self.dawdling);
        let side = self.side_mut(role);
        if !side.up {
            return Ok(());
        }
        if side.stops.is_some_and(|at| tick >= at) {
            side.stops = None;
            if side.decider.phase() == Phase::Stopped {
                side.ask(Want::Release, None, tick, tick + PATIENT);
            }
        }
        let before = side.decider.phase();
        for _ in 0..10 {
            let view = side.view();
            let Some(order) = side.decider.next(&view, now) else {
                if side.decider.phase() != before {
                    let beat = side.peer.beat_now(side.decider.phase(), now);
                    side.send(beat);
                }
                return Ok(());
            };
            match order {
                Order::Renew | Order::Claim => {
                    let deadline = tick_of(side.decider.answer_deadline(order, &view, now));
                    let want = if order == Order::Claim {
                        Want::Claim
                    } else {
                        Want::Hold
                    };
                    if side.queue.is_empty() {
                        side.seat.begin();
                    }
                    side.ask(want, Some(order), tick, deadline);
                }
                Order::TakeOver => {
                    side.colo = Colo::TookOver;
                    side.runs = true;
                }
                Order::Resume => {
                    side.runs = true;
                    side.stops = None;
                }
                Order::Suspend | Order::Stop(_) => {
                    if side.runs {
                        // A quarter of the term is two ticks. One of the timeout is one and a half, and this
                        // decision half a tick late.
                        let heard = view.liveness_until.map_or(0, tick_of);
                        let stopping = if heard + 1 >= tick { 1 } else { 2 };
                        side.stops = Some(tick + stopping + dawdling);
                    }
                    side.runs = false;
                    // Given up is what nobody runs by any more.
                    if side.stops.is_none() && order != Order::Suspend {
                        side.ask(Want::Release, None, tick, tick + PATIENT);
                    }
                }
            }
        }
        Err(format!("{role} has orders without end"))
    }
}
