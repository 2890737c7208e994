//! Device sections on their way out.

use crate::BoxError;
use crate::raw::device_blob::DeviceSection;
use crate::raw::section::Announcement;
use crate::{IdStr, InstanceId, SectionHeader, SectionId};

/// Where [`DeviceState`](super::DeviceState) saves the devices: numbers and frames their sections.
#[derive(Debug)]
pub struct DeviceSections<'a> {
    out: &'a mut Vec<u8>,
    begin: usize,
    next: SectionId,
    describes: bool,
    description: String,
}

impl<'a> DeviceSections<'a> {
    /// Sections are appended to `out`, numbered from `first` on. `describes`: a description is wanted.
    #[must_use]
    pub const fn new(out: &'a mut Vec<u8>, first: SectionId, describes: bool) -> Self {
        Self {
            begin: out.len(),
            out,
            next: first,
            describes,
            description: String::new(),
        }
    }

    /// Appends the section of one device: `idstr` and `instance` name it, `version` is that of `body`.
    ///
    /// # Errors
    /// `idstr` is not 1 to 255 bytes of text without NUL.
    pub fn push(
        &mut self,
        idstr: &str,
        instance: u32,
        version: u32,
        body: &[u8],
    ) -> Result<(), BoxError> {
        let header = SectionHeader {
            kind: Announcement::Full,
            id: self.next,
            idstr: IdStr::new(idstr)?,
            instance: InstanceId(instance),
            version,
        };
        DeviceSection { header, body }.encode(self.out);
        self.next = SectionId(self.next.0.saturating_add(1));
        Ok(())
    }

    /// Appends sections of one id that `encode` frames itself, as those of dirty bitmaps: it is given the
    /// id, and where they go.
    pub fn append(&mut self, encode: impl FnOnce(SectionId, &mut Vec<u8>)) {
        encode(self.next, self.out);
        self.next = SectionId(self.next.0.saturating_add(1));
    }

    /// Returns the bytes of all sections so far.
    #[must_use]
    pub fn written(&self) -> &[u8] {
        self.out.get(self.begin..).unwrap_or_default()
    }

    /// Returns whether a description is wanted. A checkpoint has none.
    #[must_use]
    pub const fn wants_description(&self) -> bool {
        self.describes
    }

    /// Sets the JSON text that describes the sections (QEMU's vmdesc). None need be set.
    pub fn describe(&mut self, json: String) {
        self.description = json;
    }

    /// Returns the id of the next section.
    pub(crate) const fn next(&self) -> SectionId {
        self.next
    }

    /// Returns the description; empty without one.
    pub(crate) fn into_description(self) -> String {
        self.description
    }
}
