//! The devices of `vmstate`.

use vmstate::{DeviceTree, ResetDone, SavedSection, Staged, StagedSection};

use super::{DeviceSections, DeviceState, Parsed};
use crate::BoxError;
use crate::{PAGE_SIZE, SectionHeader};

fn push(sections: &[SavedSection], out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
    sections
        .iter()
        .try_for_each(|s| out.push(&s.idstr, s.instance_id, s.version, &s.body))
}

/// Devices registered early are saved before RAM. Descriptions are QEMU's vmdesc.
impl DeviceState for DeviceTree {
    type Section = StagedSection;
    type Staged = Staged;
    type Reset = ResetDone;

    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        push(&Self::save_early(self)?, out)
    }

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        if !out.wants_description() {
            return push(&self.save_all()?, out);
        }
        let (_, early) = self.save_early_described()?;
        let (sections, description) = self.save_all_described()?;
        push(&sections, out)?;
        out.describe(description.after(early).to_json(PAGE_SIZE));
        Ok(())
    }

    fn parse(
        &mut self,
        header: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<StagedSection>, BoxError> {
        let (idstr, instance) = (header.idstr.as_str(), header.instance.0);
        match self.parse_section(idstr, instance, header.version, body, false) {
            Ok(parsed) => Ok(Parsed::Section(parsed.section, parsed.consumed)),
            Err(error) if error.is_truncated() => Ok(Parsed::NeedMore),
            Err(error) => Err(error.into()),
        }
    }

    fn stage(&mut self, sections: Vec<StagedSection>) -> Result<Staged, BoxError> {
        Ok(Self::stage(self, sections)?)
    }

    fn reset(&mut self, staged: Staged) -> Result<ResetDone, BoxError> {
        Ok(Self::reset(self, staged)?)
    }

    fn install(&mut self, reset: ResetDone) -> Result<(), BoxError> {
        Ok(Self::install(self, reset)?)
    }
}
