//! One of the two sides by its role, which their types tell apart.

use colo_core::Role;
use colo_core::raw::{Action, Event};

use super::World;
use super::side::Request;

impl World {
    /// Hands an event to a machine; what it refuses is the driver's mistake and fails the test.
    pub(super) fn hand(&mut self, role: Role, event: Event) -> Result<Option<Action>, String> {
        match role {
            Role::Primary => self.primary.machine.handle(event),
            Role::Secondary => self.secondary.machine.handle(event),
        }
        .map_err(|error| error.to_string())
    }

    pub(super) fn action_of(&self, role: Role) -> Action {
        match role {
            Role::Primary => self.primary.machine.action(),
            Role::Secondary => self.secondary.machine.action(),
        }
    }

    pub(super) fn is_finished(&self, role: Role) -> bool {
        matches!(self.action_of(role), Action::Finish(_))
    }

    pub(super) fn is_alive(&self, role: Role) -> bool {
        match role {
            Role::Primary => self.primary.alive,
            Role::Secondary => self.secondary.alive,
        }
    }

    pub(super) fn is_connected(&self, role: Role) -> bool {
        match role {
            Role::Primary => self.primary.connected,
            Role::Secondary => self.secondary.connected,
        }
    }

    pub(super) fn is_cut_off(&self, role: Role) -> bool {
        let peer_gone = match role {
            Role::Primary => !self.secondary.reachable(),
            Role::Secondary => !self.primary.reachable(),
        };
        !self.is_connected(role) || peer_gone || !self.link_up
    }

    pub(super) fn request_of(&self, role: Role) -> Request {
        match role {
            Role::Primary => self.primary.request,
            Role::Secondary => self.secondary.request,
        }
    }
}

pub(super) fn other(role: Role) -> Role {
    match role {
        Role::Primary => Role::Secondary,
        Role::Secondary => Role::Primary,
    }
}
