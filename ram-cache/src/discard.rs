//! Who may give guest pages back to the host, and when.
//!
//! Ballooning, virtio-mem and free-page hinting *discard* RAM: the host drops a page and the guest
//! later reads zero (or anything) there. A RAM cache must not see that: a page discarded on the
//! secondary is in no dirty log, so guest and cache would part unnoticed. [`DiscardControl`] is the
//! one place where the two meet, with the same rule as QEMU's `ram_block_discard_require` and
//! `ram_block_discard_disable` (11.1, `system/physmem.c`): those who cannot work without discard
//! and those who cannot work with it exclude each other, and who only discards as a favour (a
//! balloon) asks each time.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Arbitrates RAM discard in one VM. Clones are handles to the same VM.
///
/// ```
/// use ram_cache::DiscardControl;
///
/// let control = DiscardControl::new();
/// let inhibitor = control.disable()?;
/// assert!(control.discard(|| "page given back").is_err());
/// drop(inhibitor);
/// assert_eq!(control.discard(|| "page given back")?, "page given back");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct DiscardControl {
    // A discard holds the lock shared while it runs, so `disable` returns only when the discards
    // that were allowed before it are over.
    holders: Arc<RwLock<Holders>>,
}

#[derive(Debug, Default)]
struct Holders {
    require: usize,
    disable: usize,
}

impl DiscardControl {
    /// Returns the control of a VM in which discard is neither required nor forbidden.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// For a device that cannot work without discard (virtio-mem, a VFIO device with a RAM discard
    /// manager): forbids [`DiscardControl::disable`] while the guard lives.
    ///
    /// # Errors
    /// Discard is disabled.
    pub fn require(&self) -> Result<DiscardRequired, DiscardDisabled> {
        let mut holders = self.write();
        if holders.disable > 0 {
            return Err(DiscardDisabled);
        }
        holders.require += 1;
        Ok(DiscardRequired {
            control: self.clone(),
        })
    }

    /// For parts that a discard would break (the RAM cache): forbids discard while the guard
    /// lives. Several may hold such a guard. Waits for a discard under way in
    /// [`DiscardControl::discard`] to end.
    ///
    /// # Errors
    /// A device requires discard.
    pub fn disable(&self) -> Result<DiscardInhibitor, DiscardInUse> {
        let mut holders = self.write();
        if holders.require > 0 {
            return Err(DiscardInUse {
                devices: holders.require,
            });
        }
        holders.disable += 1;
        Ok(DiscardInhibitor {
            control: self.clone(),
        })
    }

    /// Whether discard is allowed now. The answer may be old by the time it is used: to discard,
    /// use [`DiscardControl::discard`].
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.read().disable == 0
    }

    /// Runs `discard` if discard is allowed, and keeps it allowed until it returns. `discard` must
    /// not call this control.
    ///
    /// # Errors
    /// Discard is disabled; `discard` was not run.
    pub fn discard<T>(&self, discard: impl FnOnce() -> T) -> Result<T, DiscardDisabled> {
        let holders = self.read();
        if holders.disable > 0 {
            return Err(DiscardDisabled);
        }
        Ok(discard())
    }

    // A counter is changed in one step, so a panic elsewhere cannot have left it half changed.
    fn read(&self) -> RwLockReadGuard<'_, Holders> {
        self.holders.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Holders> {
        self.holders.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While it lives, discard cannot be disabled.
#[derive(Debug)]
#[must_use = "discard can be disabled again as soon as this is dropped"]
pub struct DiscardRequired {
    control: DiscardControl,
}

impl Drop for DiscardRequired {
    fn drop(&mut self) {
        self.control.write().require -= 1;
    }
}

/// While it lives, no page of the guest is discarded.
#[derive(Debug)]
#[must_use = "discard is allowed again as soon as this is dropped"]
pub struct DiscardInhibitor {
    control: DiscardControl,
}

impl DiscardInhibitor {
    /// Forbids discard for as long as the VM lives: what is behind its memory must never be seen.
    pub(crate) fn for_good(self) {
        // One more that nobody gives back.
        self.control.write().disable += 1;
    }
}

impl Drop for DiscardInhibitor {
    fn drop(&mut self) {
        self.control.write().disable -= 1;
    }
}

/// RAM discard is disabled, for instance because a RAM cache mirrors the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ram discard is disabled")]
pub struct DiscardDisabled;

/// RAM discard cannot be disabled: devices depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ram discard cannot be disabled: {devices} device(s) of this vm require it")]
pub struct DiscardInUse {
    /// How many devices require discard.
    pub devices: usize,
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn who_requires_and_who_disables_exclude_each_other() {
        let control = DiscardControl::new();
        let device = control.require().unwrap();
        let second = control.require().unwrap();
        assert_eq!(
            control.disable().map(drop),
            Err(DiscardInUse { devices: 2 })
        );
        drop((device, second));
        let inhibitor = control.disable().unwrap();
        assert_eq!(control.require().map(drop), Err(DiscardDisabled));
        drop(inhibitor);
        assert!(control.require().is_ok());
    }

    #[test]
    fn discard_is_allowed_again_only_after_the_last_inhibitor() {
        let control = DiscardControl::new();
        let one = control.disable().unwrap();
        let two = control.clone().disable().unwrap();
        drop(one);
        assert!(!control.allowed());
        assert_eq!(control.discard(|| ()), Err(DiscardDisabled));
        drop(two);
        assert!(control.allowed());
        assert_eq!(control.discard(|| 7), Ok(7));
    }

    #[test]
    fn disabling_waits_for_the_discard_under_way() {
        let control = DiscardControl::new();
        let over = AtomicBool::new(false);
        let (started, has_started) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                control.discard(|| {
                    started.send(()).unwrap();
                    std::thread::yield_now();
                    over.store(true, Ordering::Relaxed);
                })
            });
            has_started.recv().unwrap();
            let _inhibitor = control.disable().unwrap();
            assert!(over.load(Ordering::Relaxed));
        });
    }

    #[test]
    fn a_discard_that_panics_leaves_the_control_usable() {
        let control = DiscardControl::new();
        let result = std::thread::scope(|scope| {
            scope
                .spawn(|| control.discard(|| panic!("balloon burst")))
                .join()
        });
        assert!(result.is_err());
        assert!(control.disable().is_ok());
    }
}
