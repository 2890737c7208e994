//! Beats on their way from one side to the other.

use colo_heartbeat::Role;
use colo_heartbeat::raw::Colo;

use super::side::Way;
use super::time::at;
use super::{World, other};

impl World {
    pub(super) fn beat(&mut self, role: Role) {
        let now = at(self.now);
        let side = self.side_mut(role);
        if !side.up {
            return;
        }
        let phase = side.decider.phase();
        if let Some(beat) = side.peer.beat(phase, now) {
            side.send(beat);
        }
    }

    pub(super) fn hear(&mut self, role: Role) {
        let now = at(self.now);
        self.side_mut(role).peer.look(now);
        let from = self.side_mut(other(role));
        if from.link == Way::Stuck {
            return;
        }
        let beats = std::mem::take(&mut from.sent);
        let side = self.side_mut(role);
        for beat in &beats {
            if side.up && side.peer.receive(beat, now).is_ok() && side.colo != Colo::Outside {
                side.peer.pin();
            }
        }
    }
}
