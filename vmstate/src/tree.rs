//! The devices of a VM: saved in section order, and loaded all or none.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::vmdesc::DeviceDescription;
use crate::{
    Description, Device, DeviceError, LoadError, Reader, SaveError, VmState, Vmdesc, Writer,
};

/// The order of sections: higher priorities first, equal ones in the order of registration. Names and order are those
/// of QEMU 11.1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Priority {
    /// After all others.
    Low,
    /// Most devices.
    #[default]
    Default,
    /// IOMMUs, before the devices behind them.
    Iommu,
    /// PCI buses and bridges.
    PciBus,
    /// virtio-mem.
    VirtioMem,
    /// The local APICs of x86.
    Apic,
    /// Arm's interrupt translation service.
    GicV3Its,
    /// Arm's interrupt controller.
    GicV3,
}

/// A section that was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedSection {
    /// The section's name.
    pub idstr: String,
    /// Which of the sections of this name.
    pub instance_id: u32,
    /// The version of the body.
    pub version: u32,
    /// The bytes between the section's header and its footer.
    pub body: Vec<u8>,
}

/// A section that was parsed from the front of some bytes.
#[derive(Debug)]
pub struct Parsed {
    /// The parsed section, for [`DeviceTree::stage`].
    pub section: StagedSection,
    /// Length of the body; what follows it is the section's footer.
    pub consumed: usize,
}

/// The new state of one device, parsed and valid in itself, but not yet installed.
pub struct StagedSection {
    tree: TreeId,
    index: usize,
    state: AnyState,
}

/// The new state of every device of a tree, checked by each of them and ready to be installed.
pub struct Staged {
    tree: TreeId,
    /// In the order in which the devices were registered; `None` for those that need none.
    states: Vec<Option<AnyState>>,
}

/// The new state of every device of a tree, all of which have been reset for it.
#[derive(Debug)]
#[must_use = "the devices have been reset and wait for their state"]
pub struct ResetDone(Staged);

/// The devices of a VM.
///
/// State is loaded in one way only. Bytes are [parsed](Self::parse_section) into values, the values of all devices are
/// [checked together](Self::stage), and then all devices are [reset](Self::reset) and [given their new
/// state](Self::install). No device changes before the reset, so a truncated or wrong stream leaves a VM that can run.
/// No device can be given state without a reset.
pub struct DeviceTree {
    id: TreeId,
    /// In the order in which they were registered.
    entries: Vec<Entry>,
    /// Indices of `entries` in section order.
    order: Vec<usize>,
}

type AnyState = Box<dyn Any + Send>;

struct Entry {
    idstr: String,
    instance_id: u32,
    priority: Priority,
    phase: Phase,
    device: Box<dyn AnyDevice>,
}

/// When a section is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// When the migration is set up, before RAM.
    Setup,
    /// When the VM has stopped.
    Stopped,
}

/// Identifies a tree and the devices registered in it: it changes with each one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TreeId(u64);

impl TreeId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Only uniqueness matters.
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl DeviceTree {
    /// A tree without devices.
    #[must_use]
    pub fn new() -> Self {
        Self {
            id: TreeId::next(),
            entries: Vec::new(),
            order: Vec::new(),
        }
    }

    /// Adds a device. `idstr` is the section's name: by QEMU's custom the path of the device, a
    /// slash and [`VmState::NAME`], or for a device without a path the name alone.
    ///
    /// # Errors
    /// `idstr` is empty, longer than 255 bytes or has a NUL in it, or the pair of `idstr` and
    /// `instance_id` is taken.
    pub fn register(
        &mut self,
        idstr: impl Into<String>,
        instance_id: u32,
        priority: Priority,
        device: impl Device + 'static,
    ) -> Result<(), TreeError> {
        self.add(idstr.into(), instance_id, priority, Phase::Stopped, device)
    }

    /// Adds a device that [`save_early`](Self::save_early) saves when the migration is set up
    /// (QEMU's `early_setup`), and not the others when the VM has stopped.
    ///
    /// # Errors
    /// As for [`register`](Self::register).
    pub fn register_early(
        &mut self,
        idstr: impl Into<String>,
        instance_id: u32,
        priority: Priority,
        device: impl Device + 'static,
    ) -> Result<(), TreeError> {
        self.add(idstr.into(), instance_id, priority, Phase::Setup, device)
    }

    fn add(
        &mut self,
        idstr: String,
        instance_id: u32,
        priority: Priority,
        phase: Phase,
        device: impl Device + 'static,
    ) -> Result<(), TreeError> {
        if idstr.is_empty() || idstr.len() > 255 || idstr.contains('\0') {
            return Err(TreeError::Name { idstr });
        }
        if self.find(&idstr, instance_id).is_some() {
            return Err(TreeError::Duplicate { idstr, instance_id });
        }
        let index = self.entries.len();
        let at = self
            .order
            .partition_point(|&i| self.entries[i].priority >= priority);
        self.order.insert(at, index);
        self.entries.push(Entry {
            idstr,
            instance_id,
            priority,
            phase,
            device: Box::new(Erased(device)),
        });
        // States staged before know nothing of this device.
        self.id = TreeId::next();
        Ok(())
    }

    /// Number of devices.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no device.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Saves the devices that are to be sent when the migration is set up, in section order.
    ///
    /// # Errors
    /// The first device that could not be saved.
    pub fn save_early(&mut self) -> Result<Vec<SavedSection>, TreeError> {
        let saved = self.save_with(Phase::Setup, Writer::new)?;
        Ok(saved.into_iter().map(|(section, _)| section).collect())
    }

    /// As [`save_early`](Self::save_early), and notes what the sections consist of: give it to
    /// [`Vmdesc::after`] of the later ones.
    ///
    /// # Errors
    /// As there.
    pub fn save_early_described(&mut self) -> Result<(Vec<SavedSection>, Vmdesc), TreeError> {
        self.save_described(Phase::Setup)
    }

    /// Saves every device that is needed and was not registered for the set-up, in section order.
    ///
    /// # Errors
    /// The first device that could not be saved.
    pub fn save_all(&mut self) -> Result<Vec<SavedSection>, TreeError> {
        let saved = self.save_with(Phase::Stopped, Writer::new)?;
        Ok(saved.into_iter().map(|(section, _)| section).collect())
    }

    /// As [`save_all`](Self::save_all), and notes what the sections consist of.
    ///
    /// # Errors
    /// As there.
    pub fn save_all_described(&mut self) -> Result<(Vec<SavedSection>, Vmdesc), TreeError> {
        self.save_described(Phase::Stopped)
    }

    fn save_described(&mut self, phase: Phase) -> Result<(Vec<SavedSection>, Vmdesc), TreeError> {
        let mut devices = Vec::new();
        let mut sections = Vec::new();
        for (section, description) in self.save_with(phase, Writer::describing)? {
            devices.extend(description.map(|description| DeviceDescription {
                idstr: section.idstr.clone(),
                instance_id: section.instance_id,
                description,
            }));
            sections.push(section);
        }
        Ok((sections, Vmdesc::new(devices)))
    }

    fn save_with(
        &mut self,
        phase: Phase,
        writer: fn() -> Writer,
    ) -> Result<Vec<(SavedSection, Option<Description>)>, TreeError> {
        let mut saved = Vec::with_capacity(self.order.len());
        for &i in &self.order {
            let entry = &mut self.entries[i];
            if entry.phase != phase || !entry.device.is_needed() {
                continue;
            }
            let mut out = writer();
            let description = entry
                .device
                .save(&mut out)
                .map_err(|source| entry.failed(DeviceStep::Save, source))?;
            let body = out.finish().map_err(|source| TreeError::Save {
                idstr: entry.idstr.clone(),
                instance_id: entry.instance_id,
                source,
            })?;
            let section = SavedSection {
                idstr: entry.idstr.clone(),
                instance_id: entry.instance_id,
                version: entry.device.version(),
                body,
            };
            saved.push((section, description));
        }
        Ok(saved)
    }

    /// Parses the body of a section from the front of `bytes`. With `complete`, `bytes` end the stream. Without, more
    /// bytes may follow, and [`LoadError::is_truncated`] tells that the body does not end within `bytes`.
    ///
    /// # Errors
    /// There is no such device, its version is not one that can be loaded, or the body is not its
    /// state.
    pub fn parse_section(
        &self,
        idstr: &str,
        instance_id: u32,
        version: u32,
        bytes: &[u8],
        complete: bool,
    ) -> Result<Parsed, LoadError> {
        let (index, entry) =
            self.find(idstr, instance_id)
                .ok_or_else(|| LoadError::UnknownSection {
                    idstr: idstr.to_owned(),
                    instance_id,
                })?;
        let input = if complete {
            Reader::complete(bytes)
        } else {
            Reader::partial(bytes)
        };
        let mut input = input.in_section(idstr, instance_id);
        let state = entry.device.parse(&mut input, version)?;
        Ok(Parsed {
            section: StagedSection {
                tree: self.id,
                index,
                state,
            },
            consumed: input.offset(),
        })
    }

    /// Checks that the parsed sections are complete, and lets every device check its own.
    ///
    /// # Errors
    /// A device that is needed has no section, one has two or refuses its state, or a section was parsed by another tree
    /// (or by this one when it had fewer devices). Nothing has been changed then.
    pub fn stage(&self, sections: Vec<StagedSection>) -> Result<Staged, TreeError> {
        let mut slots: Vec<Option<AnyState>> = Vec::new();
        slots.resize_with(self.entries.len(), || None);
        for section in sections {
            let (Some(slot), Some(entry)) = (
                slots.get_mut(section.index),
                self.entries.get(section.index),
            ) else {
                return Err(TreeError::Foreign);
            };
            if section.tree != self.id {
                return Err(TreeError::Foreign);
            }
            if slot.replace(section.state).is_some() {
                return Err(TreeError::Repeated {
                    idstr: entry.idstr.clone(),
                    instance_id: entry.instance_id,
                });
            }
        }
        let mut states = Vec::with_capacity(slots.len());
        for (entry, slot) in self.entries.iter().zip(slots) {
            match &slot {
                Some(state) => entry
                    .device
                    .check(&**state)
                    .map_err(|source| entry.failed(DeviceStep::Check, source))?,
                None if entry.device.is_needed() => {
                    return Err(TreeError::Missing {
                        idstr: entry.idstr.clone(),
                        instance_id: entry.instance_id,
                    });
                }
                None => {}
            }
            states.push(slot);
        }
        Ok(Staged {
            tree: self.id,
            states,
        })
    }

    /// Resets all devices, in section order, for `staged` to be installed. COLO flushes guest memory
    /// between the two, because a reset may write it.
    ///
    /// # Errors
    /// `staged` is not of this tree: nothing has been changed. Or a device failed: the state of
    /// the VM is neither the old nor the new one, and it must not run.
    pub fn reset(&mut self, staged: Staged) -> Result<ResetDone, TreeError> {
        if staged.tree != self.id {
            return Err(TreeError::Foreign);
        }
        self.reset_all()?;
        Ok(ResetDone(staged))
    }

    /// Resets all devices, in section order, and leaves them so: a system reset.
    ///
    /// # Errors
    /// A device failed: the VM is in no defined state, and must not run.
    pub fn reset_all(&mut self) -> Result<(), TreeError> {
        for &i in &self.order {
            let entry = &mut self.entries[i];
            entry
                .device
                .reset()
                .map_err(|source| entry.failed(DeviceStep::Reset, source))?;
        }
        Ok(())
    }

    /// Gives every device its new state, in section order.
    ///
    /// # Errors
    /// As for [`DeviceTree::reset`].
    pub fn install(&mut self, reset: ResetDone) -> Result<(), TreeError> {
        let ResetDone(staged) = reset;
        if staged.tree != self.id {
            return Err(TreeError::Foreign);
        }
        let mut states = staged.states;
        for &i in &self.order {
            let entry = &mut self.entries[i];
            let slot = states.get_mut(i).ok_or(TreeError::Foreign)?;
            if let Some(state) = slot.take() {
                entry
                    .device
                    .install(state)
                    .map_err(|source| entry.failed(DeviceStep::Install, source))?;
            }
        }
        Ok(())
    }

    /// Resets all devices, and gives them their new state.
    ///
    /// # Errors
    /// As for [`DeviceTree::reset`].
    pub fn reset_then_install(&mut self, staged: Staged) -> Result<(), TreeError> {
        let reset = self.reset(staged)?;
        self.install(reset)
    }

    fn find(&self, idstr: &str, instance_id: u32) -> Option<(usize, &Entry)> {
        self.entries
            .iter()
            .enumerate()
            .find(|(_, entry)| entry.instance_id == instance_id && entry.idstr == idstr)
    }
}

impl Default for DeviceTree {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for DeviceTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_order = self.order.iter().map(|&i| &self.entries[i]);
        f.debug_list()
            .entries(in_order.map(|entry| (&entry.idstr, entry.instance_id, entry.priority)))
            .finish()
    }
}

impl fmt::Debug for StagedSection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagedSection")
            .field("tree", &self.tree)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Staged")
            .field("tree", &self.tree)
            .field("devices", &self.states.len())
            .finish_non_exhaustive()
    }
}

impl Entry {
    fn failed(&self, step: DeviceStep, source: DeviceError) -> TreeError {
        TreeError::Device {
            idstr: self.idstr.clone(),
            instance_id: self.instance_id,
            step,
            source,
        }
    }
}

/// A device without the type of its state.
trait AnyDevice: Send {
    fn version(&self) -> u32;
    fn is_needed(&self) -> bool;
    fn save(&mut self, out: &mut Writer) -> Result<Option<Description>, DeviceError>;
    fn parse(&self, input: &mut Reader<'_>, version: u32) -> Result<AnyState, LoadError>;
    fn check(&self, state: &dyn Any) -> Result<(), DeviceError>;
    fn reset(&mut self) -> Result<(), DeviceError>;
    fn install(&mut self, state: AnyState) -> Result<(), DeviceError>;
}

struct Erased<D>(D);

impl<D: Device> AnyDevice for Erased<D> {
    fn version(&self) -> u32 {
        D::State::VERSION
    }

    fn is_needed(&self) -> bool {
        self.0.is_needed()
    }

    fn save(&mut self, out: &mut Writer) -> Result<Option<Description>, DeviceError> {
        Ok(out.description(&self.0.save()?))
    }

    fn parse(&self, input: &mut Reader<'_>, version: u32) -> Result<AnyState, LoadError> {
        Ok(Box::new(input.description::<D::State>(version)?))
    }

    fn check(&self, state: &dyn Any) -> Result<(), DeviceError> {
        self.0
            .check(state.downcast_ref().ok_or(TreeError::Foreign)?)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.0.reset()
    }

    fn install(&mut self, state: AnyState) -> Result<(), DeviceError> {
        self.0
            .install(*state.downcast().map_err(|_| TreeError::Foreign)?)
    }
}

/// A call of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceStep {
    /// [`Device::save`].
    Save,
    /// [`Device::check`].
    Check,
    /// [`Device::reset`].
    Reset,
    /// [`Device::install`].
    Install,
}

impl fmt::Display for DeviceStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Save => "be saved",
            Self::Check => "take this state",
            Self::Reset => "be reset",
            Self::Install => "be given its state",
        })
    }
}

/// An error of a [`DeviceTree`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The name cannot be put on the wire.
    #[error("section name '{idstr}' is not 1 to 255 bytes without nul", idstr = .idstr.escape_debug())]
    Name {
        /// The name refused.
        idstr: String,
    },
    /// There is such a device already.
    #[error("section '{idstr}' {instance_id} is registered already", idstr = .idstr.escape_debug())]
    Duplicate {
        /// The section's name.
        idstr: String,
        /// Which of the sections of this name.
        instance_id: u32,
    },
    /// A device failed or refused.
    #[error("device '{idstr}' {instance_id} cannot {step}", idstr = .idstr.escape_debug())]
    Device {
        /// The section's name.
        idstr: String,
        /// Which of the sections of this name.
        instance_id: u32,
        /// The call that failed.
        step: DeviceStep,
        /// Why it failed.
        #[source]
        source: DeviceError,
    },
    /// A device's state contradicts itself.
    #[error("the state of device '{idstr}' {instance_id} cannot be written", idstr = .idstr.escape_debug())]
    Save {
        /// The section's name.
        idstr: String,
        /// Which of the sections of this name.
        instance_id: u32,
        /// The contradiction.
        source: SaveError,
    },
    /// A device has no section.
    #[error("section '{idstr}' {instance_id} is missing", idstr = .idstr.escape_debug())]
    Missing {
        /// The section's name.
        idstr: String,
        /// Which of the sections of this name.
        instance_id: u32,
    },
    /// A device has two sections.
    #[error("section '{idstr}' {instance_id} is there twice", idstr = .idstr.escape_debug())]
    Repeated {
        /// The section's name.
        idstr: String,
        /// Which of the sections of this name.
        instance_id: u32,
    },
    /// State that was parsed or staged by another tree, or before a device was added.
    #[error("the state was staged for another set of devices")]
    Foreign,
}
