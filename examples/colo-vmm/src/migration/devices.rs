//! The devices of the VM's machine.
//!
//! A machine has two trees: its devices, and what both sides have to have in common. The latter travels
//! before RAM, is compared there, and is never installed.

use migration_stream::{BoxError, DeviceSections, DeviceState, PAGE_SIZE, Parsed, SectionHeader};
use vmstate::{ResetDone, Staged, StagedSection, VmState};

use crate::devices::CpuModelState;
use crate::vm::Vm;

/// The device state of a VM.
pub(super) struct Devices<'a>(pub(super) &'a Vm);

/// A section that has come.
pub(super) enum Section {
    /// What both sides have in common, and it is the same.
    Compared,
    /// A device's.
    Device(StagedSection),
}

impl DeviceState for Devices<'_> {
    type Section = Section;
    type Staged = Staged;
    type Reset = ResetDone;

    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        self.0
            .with_machine(|machine| DeviceState::save_early(machine.common(), out))
    }

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        self.0.with_machine(|machine| {
            if !out.wants_description() {
                return machine.devices()?.save(out);
            }
            let (_, early) = machine.common().save_early_described()?;
            let (sections, description) = machine.devices()?.save_all_described()?;
            for s in sections {
                out.push(&s.idstr, s.instance_id, s.version, &s.body)?;
            }
            out.describe(description.after(early).to_json(PAGE_SIZE));
            Ok(())
        })
    }

    fn parse(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Parsed<Section>, BoxError> {
        self.0.with_machine(|machine| {
            let is_common = header.idstr.as_str() == CpuModelState::NAME;
            let tree = if is_common {
                machine.common()
            } else {
                machine.devices()?
            };
            Ok(match tree.parse(header, body)? {
                Parsed::NeedMore => Parsed::NeedMore,
                Parsed::Section(section, len) if is_common => {
                    DeviceState::stage(tree, vec![section])?;
                    Parsed::Section(Section::Compared, len)
                }
                Parsed::Section(section, len) => Parsed::Section(Section::Device(section), len),
            })
        })
    }

    fn stage(&mut self, sections: Vec<Section>) -> Result<Staged, BoxError> {
        let devices = sections.into_iter().filter_map(|section| match section {
            Section::Compared => None,
            Section::Device(section) => Some(section),
        });
        let devices = devices.collect();
        self.0
            .with_machine(|machine| DeviceState::stage(machine.devices()?, devices))
    }

    fn reset(&mut self, staged: Staged) -> Result<ResetDone, BoxError> {
        self.0
            .with_machine(|machine| DeviceState::reset(machine.devices()?, staged))
    }

    fn install(&mut self, reset: ResetDone) -> Result<(), BoxError> {
        self.0
            .with_machine(|machine| DeviceState::install(machine.devices()?, reset))
    }
}
