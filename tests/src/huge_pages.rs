//! Huge pages of the machine, as long as a test needs them.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many pages of the default size the kernel keeps.
const COUNT: &str = "/proc/sys/vm/nr_hugepages";
/// The size that tests count on, KiB.
const SIZE_KIB: u64 = 2048;

/// One test of this process has huge pages at a time.
static TAKEN: Mutex<()> = Mutex::new(());

/// Huge pages of 2 MiB that the kernel keeps for this test; dropping it gives them back.
#[derive(Debug)]
pub struct HugePages {
    count: u64,
    _taken: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Has the kernel keep `count` more of them, once no other test of this process has any.
    ///
    /// # Errors
    /// This machine cannot, for people.
    pub fn reserve(count: u64) -> Result<Self, String> {
        let size = default_size()?;
        if size != SIZE_KIB {
            return Err(format!(
                "needs huge pages of {SIZE_KIB} KiB by default, not {size}"
            ));
        }
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = kept()?;
        let error = |e| format!("needs {count} huge pages: {COUNT}: {e}");
        fs::write(COUNT, (before + count).to_string()).map_err(error)?;
        let now = kept()?;
        // The kernel takes what it finds.
        if now < before + count {
            fs::write(COUNT, before.to_string()).map_err(error)?;
            let found = now.saturating_sub(before);
            return Err(format!(
                "needs {count} huge pages: the kernel found {found}"
            ));
        }
        Ok(Self {
            count,
            _taken: taken,
        })
    }

    /// Gives them back, if nobody uses them any more.
    ///
    /// # Errors
    /// The kernel keeps them.
    pub fn give_back(mut self) -> Result<(), String> {
        let rest = kept()?.saturating_sub(self.count);
        fs::write(COUNT, rest.to_string()).map_err(|e| format!("{COUNT}: {e}"))?;
        self.count = 0;
        let now = kept()?;
        // Pages that a process still uses are kept until it frees them.
        if now > rest {
            return Err(format!("{} huge pages are in use", now - rest));
        }
        Ok(())
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.count > 0
            && let Ok(now) = kept()
        {
            let rest = now.saturating_sub(self.count);
            if let Err(e) = fs::write(COUNT, rest.to_string()) {
                eprintln!("{COUNT}: {e}");
            }
        }
    }
}

/// How many huge pages the kernel keeps, for whatever.
fn kept() -> Result<u64, String> {
    let text = fs::read_to_string(COUNT).map_err(|e| format!("needs huge pages: {COUNT}: {e}"))?;
    text.trim()
        .parse()
        .map_err(|_| format!("{COUNT} says '{}'", text.trim()))
}

/// KiB.
fn default_size() -> Result<u64, String> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("Hugepagesize:"));
    let size = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse().ok());
    size.ok_or_else(|| "needs a kernel with huge pages".to_owned())
}
