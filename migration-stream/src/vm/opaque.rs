//! Device state that nobody here knows.

use std::convert::Infallible;

use super::{DeviceSections, DeviceState, Parsed};
use crate::BoxError;
use crate::{SectionHeader, Tail};

/// Sections as they came, saved again with their description. Of a checkpoint they are told apart by what
/// they were like before ([`Tail::followed_by`]); one by one they cannot be loaded.
impl DeviceState for Tail {
    type Section = Infallible;
    type Staged = Self;
    type Reset = Self;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        for section in self.sections() {
            let header = section.header;
            let (idstr, instance) = (header.idstr.as_str(), header.instance.0);
            out.push(idstr, instance, header.version, section.body)?;
        }
        if out.wants_description() {
            out.describe(self.description_text().to_owned());
        }
        Ok(())
    }

    fn parse(
        &mut self,
        _header: &SectionHeader,
        _body: &[u8],
    ) -> Result<Parsed<Infallible>, BoxError> {
        Err("the devices are not known here, and their sections have no length".into())
    }

    fn stage(&mut self, _sections: Vec<Infallible>) -> Result<Self, BoxError> {
        Err("the devices are not known here".into())
    }

    fn stage_checkpoint(&mut self, state: &[u8]) -> Result<Self, BoxError> {
        Ok(self.followed_by(state)?)
    }

    fn reset(&mut self, staged: Self) -> Result<Self, BoxError> {
        Ok(staged)
    }

    fn install(&mut self, reset: Self) -> Result<(), BoxError> {
        *self = reset;
        Ok(())
    }
}
