//! One side: what it knows of its peer, what it has decided, and what it waits for.

use std::collections::VecDeque;
use std::time::Duration;

use colo_heartbeat::arbiter::Owner;
use colo_heartbeat::raw::{BEAT_LEN, Colo, Decider, Entry, Order, Peer, Seat, View, Want};
use colo_heartbeat::{OnHeartbeatLoss, Rhythm, Role};

use super::time::at;

const INTERVAL: Duration = Duration::from_millis(100);
const MISSED: u32 = 3;
const TERM: Duration = Duration::from_millis(400);

/// What a way does with what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    Open,
    /// What is sent is lost.
    Cut,
    /// Of beats: they arrive when it is open again. Of requests: no answer comes, and they may take
    /// effect when it is open again, or later.
    Stuck,
}

/// What a side's arbiter is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) want: Want,
    /// The order it answers; none for the first hold and a release.
    pub(super) order: Option<Order>,
    pub(super) deadline: u16,
    pub(super) step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Read {
        sent: u16,
    },
    Replace {
        version: u64,
        entry: Entry,
        sent: u16,
    },
    /// It was carried out, and the answer is lost.
    Deaf,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Side {
    pub(super) up: bool,
    pub(super) peer: Peer,
    pub(super) decider: Decider,
    pub(super) seat: Seat,
    pub(super) colo: Colo,
    /// It holds the lease, or COLO does without.
    pub(super) entitled: bool,
    pub(super) runs: bool,
    /// Its guest runs until then, at the most.
    pub(super) stops: Option<u16>,
    pub(super) queue: VecDeque<Request>,
    pub(super) way: Way,
    /// Beats to the other side.
    pub(super) sent: Vec<[u8; BEAT_LEN]>,
    pub(super) link: Way,
}

impl Side {
    pub(super) fn new(role: Role, process: u64, now: u16) -> Self {
        let mut rhythm = Rhythm::new(role, [1; 16], OnHeartbeatLoss::Ask)
            .expect("random numbers")
            .interval(INTERVAL)
            .missed(MISSED);
        rhythm.process = process;
        Self {
            up: true,
            peer: Peer::new(rhythm, at(now)),
            decider: Decider::new(role, OnHeartbeatLoss::Ask, Some(TERM)),
            seat: Seat::new(Owner::new(process), TERM),
            colo: Colo::Outside,
            entitled: false,
            runs: false,
            stops: None,
            queue: VecDeque::new(),
            way: Way::Open,
            sent: Vec::new(),
            link: Way::Open,
        }
    }

    pub(super) fn view(&self) -> View {
        View {
            colo: self.colo,
            peer: self.peer.state(),
            peer_phase: self.peer.phase(),
            liveness_until: self.peer.liveness_until(),
            peer_liveness_until: self.peer.peer_liveness_until(),
        }
    }

    /// Runs, or has not stood still yet.
    pub(super) fn is_running(&self, now: u16) -> bool {
        self.up && (self.runs || self.stops.is_some_and(|at| now < at))
    }

    pub(super) fn ask(&mut self, want: Want, order: Option<Order>, now: u16, deadline: u16) {
        self.queue.push_back(Request {
            want,
            order,
            deadline,
            step: Step::Read { sent: now },
        });
    }

    /// Sends a beat to the other side.
    pub(super) fn send(&mut self, beat: [u8; BEAT_LEN]) {
        if self.link != Way::Cut {
            self.sent.push(beat);
        }
    }
}
