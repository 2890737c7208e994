//! What a transition does to the world: the actions of both sides, requests, and death.

use colo_core::raw::Action;
use colo_core::{Cause, ExitReason, Message, Role, Step, Wait};

use super::side::{Request, Side};
use super::transition::Way;
use super::{Content, Item, World, Written};

impl World {
    /// Carries an action out, as far as `way` says.
    pub(super) fn take_effect(
        &mut self,
        role: Role,
        action: Action,
        way: Way,
    ) -> Result<(), String> {
        let step = match action {
            Action::EmitExit(exit) => {
                // Only a commit that broke off outweighs a request.
                let broke = matches!(
                    exit.cause,
                    Cause::StepFailed(
                        Step::Reset
                            | Step::Flush
                            | Step::InstallDevices
                            | Step::CheckpointReplication
                            | Step::DiscardOutput
                    )
                ) && role == Role::Secondary;
                let told = self.request_of(role) == Request::Taken;
                if told && exit.reason() != ExitReason::Request && !broke {
                    return Err(format!("a request was made, but {exit}"));
                }
                match role {
                    Role::Primary => self.primary.exits += 1,
                    Role::Secondary => self.secondary.exits += 1,
                }
                return Ok(());
            }
            Action::Perform(step) => step,
            Action::Finish(_) => return Ok(()),
        };
        if way == Way::Not {
            return Ok(());
        }
        match role {
            Role::Primary => self.effect_on_primary(step, way),
            Role::Secondary => self.effect_on_secondary(step, way),
        }
    }

    fn effect_on_primary(&mut self, step: Step, way: Way) -> Result<(), String> {
        let whole = way == Way::Whole;
        match step {
            Step::Await(Wait::Message(_)) if whole => {
                self.to_primary.remove(0);
            }
            Step::PauseVm if whole => self.primary.vm_runs = false,
            Step::ResumeVm if whole => {
                self.primary.vm_runs = true;
                self.said = self.captured + 1;
                self.guest = [Written {
                    epoch: self.captured + 1,
                    again: 0,
                }; 2];
                self.dirty = [true; 2];
            }
            Step::CutOutput if self.primary.vm_runs => {
                return Err(format!("{step} with the vm running"));
            }
            Step::CutOutput if whole && self.marks => self.cut = self.said,
            Step::OpenOutput if whole => self.primary.output_open = true,
            Step::Disconnect => {
                self.primary.connected = false;
                self.to_primary.clear();
            }
            Step::ReportCheckpoint if whole => self.primary.completed = self.captured,
            Step::SaveDevices | Step::FreezeRam if self.primary.vm_runs => {
                return Err(format!("{step} with the vm running"));
            }
            Step::SendRam if self.primary.vm_runs && self.kept.is_none() => {
                return Err(format!("{step} of a running vm that was not kept"));
            }
            Step::FreezeRam if whole => self.kept = Some(self.take_dirty()),
            Step::SaveDevices if whole => {
                self.captured += 1;
                self.saved = self.captured;
                self.taken = self.guest;
            }
            Step::ReleaseOutput if self.marks => self.released = self.cut,
            Step::ReleaseOutput => self.released = self.said,
            Step::Send(message) => self.send(Role::Primary, &[Item::Message(message)]),
            Step::SendRam => {
                let dirty = self.kept.take().unwrap_or_else(|| self.take_dirty());
                let mut items: Vec<Item> = (0..)
                    .zip(dirty)
                    .filter_map(|(half, dirty)| Some(Item::HalfOfRam(half, dirty?)))
                    .collect();
                items.push(Item::EndOfRam);
                self.send(
                    Role::Primary,
                    &items[..if whole {
                        items.len()
                    } else {
                        items.len().min(2) - 1
                    }],
                );
            }
            Step::SendDevices => {
                let items = [
                    Item::Message(Message::VmstateSize),
                    Item::Devices(self.saved),
                ];
                self.send(Role::Primary, &items[..if whole { 2 } else { 1 }]);
            }
            _ => {}
        }
        Ok(())
    }

    /// The content of what is dirty, which is clean then.
    fn take_dirty(&mut self) -> [Option<Written>; 2] {
        let guest = self.guest;
        let dirty = std::mem::take(&mut self.dirty);
        [0, 1].map(|half| dirty[half].then_some(guest[half]))
    }

    fn effect_on_secondary(&mut self, step: Step, way: Way) -> Result<(), String> {
        let whole = way == Way::Whole;
        let replaces = matches!(step, Step::Reset | Step::Flush | Step::InstallDevices);
        if replaces && self.secondary.vm_runs {
            return Err(format!("{step} with the vm running"));
        }
        match step {
            Step::Await(Wait::Message(_)) if whole => {
                self.to_secondary.remove(0);
            }
            Step::ReceiveRam if whole => {
                self.to_secondary.remove(0);
            }
            Step::ReceiveDevices if whole => {
                if let Item::Devices(version) = self.to_secondary.remove(0) {
                    self.buffer = version;
                }
            }
            Step::PauseVm if whole => self.secondary.vm_runs = false,
            Step::ResumeVm if whole => {
                match (self.ram, self.devices) {
                    (Content::Checkpoint(ram), Content::Checkpoint(devices))
                    | (Content::Own(ram), Content::Own(devices))
                        if ram == devices =>
                    {
                        self.ram = Content::Own(ram);
                        self.devices = Content::Own(ram);
                    }
                    mixed => return Err(format!("the secondary runs {mixed:?}")),
                }
                self.secondary.vm_runs = true;
            }
            Step::OpenOutput if whole => self.secondary.output_open = true,
            Step::Disconnect => {
                self.secondary.connected = false;
                self.to_secondary.clear();
                self.beside = Default::default();
            }
            Step::ReportCheckpoint if whole => {
                if let Content::Own(version) = self.ram {
                    self.secondary.completed = version;
                }
            }
            Step::StageDevices if whole => self.staged = self.buffer,
            Step::Reset => self.devices = Content::Spoilt,
            Step::Flush => {
                self.ram = if whole && self.cache == self.taken {
                    Content::Checkpoint(self.staged)
                } else {
                    Content::Spoilt
                };
            }
            Step::InstallDevices => {
                self.devices = if whole && self.devices == Content::Spoilt {
                    Content::Checkpoint(self.staged)
                } else {
                    Content::Spoilt
                };
            }
            Step::Send(message) => self.send(Role::Secondary, &[Item::Message(message)]),
            _ => {}
        }
        Ok(())
    }

    fn send(&mut self, from: Role, items: &[Item]) {
        if !self.link_up || self.is_cut_off(from) {
            return;
        }
        match from {
            Role::Primary => self.to_secondary.extend_from_slice(items),
            Role::Secondary => self.to_primary.extend_from_slice(items),
        }
    }

    pub(super) fn take_request(&mut self, role: Role) {
        let taken = match self.action_of(role) {
            Action::EmitExit(_) => Request::Late,
            _ => Request::Taken,
        };
        match role {
            Role::Primary => self.primary.request = taken,
            Role::Secondary => self.secondary.request = taken,
        }
    }

    /// The request is stored, and its hook shuts the connections.
    pub(super) fn store_request(&mut self, role: Role) {
        match role {
            Role::Primary => {
                self.primary.request = Request::Stored;
                self.primary.connected = false;
            }
            Role::Secondary => {
                self.secondary.request = Request::Stored;
                self.secondary.connected = false;
            }
        }
    }

    /// The process is gone, and with it all that would only make equal worlds look different.
    pub(super) fn kill(&mut self, role: Role) {
        self.budget.checkpoints = 0;
        match role {
            Role::Primary => {
                self.primary = Side::dead();
                self.to_primary.clear();
                (self.said, self.cut) = (0, 0);
                (self.guest, self.dirty, self.kept) = Default::default();
                (self.budget.ahead, self.budget.writes) = (0, 0);
            }
            Role::Secondary => {
                self.secondary = Side::dead();
                self.to_secondary.clear();
                (self.ram, self.devices) = (Content::Spoilt, Content::Spoilt);
                (self.cache, self.buffer, self.staged) = Default::default();
                self.beside = Default::default();
                self.budget.ahead = 0;
            }
        }
    }
}
