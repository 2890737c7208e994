//! A small file system of its own, that can be filled.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::Result;

/// Takes up what is free.
const FILLER: &str = "filler";

/// A file system in memory, unmounted when it is dropped.
#[derive(Debug)]
pub struct Disk {
    at: TempDir,
}

impl Disk {
    /// One of this size, KiB.
    ///
    /// # Errors
    /// See [`missing`].
    pub fn new(kib: u32) -> Result<Self> {
        let disk = Self {
            at: tempfile::Builder::new().prefix("disk-").tempdir()?,
        };
        let size = format!("size={kib}k");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]);
        let output = mount.arg(disk.path()).output()?;
        if output.status.success() {
            Ok(disk)
        } else {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("mount: {}", said.trim()).into())
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.at.path()
    }

    /// Leaves no room on it.
    ///
    /// # Errors
    /// It cannot be written for another reason.
    pub fn fill(&self) -> Result<()> {
        let mut filler = File::create(self.path().join(FILLER))?;
        loop {
            match filler.write(&[0; 4096]) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Makes room again.
    ///
    /// # Errors
    /// It was not full.
    pub fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.path().join(FILLER))?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Somebody may still have a file open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Why there are no such disks here, `None` if there are.
#[must_use]
pub fn missing() -> Option<&'static str> {
    static TRIED: OnceLock<Option<String>> = OnceLock::new();
    let tried = TRIED.get_or_init(|| {
        let error = Disk::new(64).err()?;
        Some(format!("needs to mount a tmpfs (root): {error}"))
    });
    tried.as_deref()
}
