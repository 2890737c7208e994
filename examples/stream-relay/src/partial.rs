//! What is being written, under a name beside the one that it gets when it is complete.
//!
//! For `PATH` that is `.PATH.XXXXXX.partial`, a file or a directory. Whoever writes it holds a lock on it
//! (`F_OFD_SETLK`), which the kernel releases when its owner ends, however it ends, and which network file
//! systems have as well. What has no owner any more is removed by [`sweep`] when the same name is
//! used again. On a file system without locks nothing is known to have no owner, and nothing is removed.
//!
//! The lock of a directory is that of the manifest in it, which is its first file and its last.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use crate::store::MANIFEST;

const SUFFIX: &str = ".partial";
/// Characters of a name that are drawn.
const DRAWN: usize = 6;
/// How often a name is drawn whose file or directory somebody takes for a leftover before it is locked.
const ATTEMPTS: usize = 16;

/// A directory that is being written; dropping it removes it.
#[derive(Debug)]
pub(crate) struct PartialDirectory {
    path: PathBuf,
    /// Holds the lock.
    manifest: File,
    is_complete: bool,
}

impl PartialDirectory {
    /// A directory that only its owner may read, for `path`, with an empty manifest in it.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        for _ in 0..ATTEMPTS {
            let path = drawn_directory(path)?;
            let options = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let manifest = match rustix::fs::open(path.join(MANIFEST), options, Mode::from(0o600)) {
                Ok(file) => File::from(file),
                // It was taken for a leftover.
                Err(Errno::NOENT) => continue,
                Err(e) => {
                    // Nothing is in it.
                    let _ = rustix::fs::rmdir(&path);
                    return Err(e.into());
                }
            };
            let at = path.join(MANIFEST);
            let this = Self {
                path,
                manifest,
                is_complete: false,
            };
            if is_owned(&this.manifest, &at)? {
                return Ok(this);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its manifest.
    pub(crate) const fn manifest(&self) -> &File {
        &self.manifest
    }

    /// Gives it its name, where nothing or an empty directory may be.
    pub(crate) fn persist(mut self, path: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, path)?;
        self.is_complete = true;
        Ok(())
    }
}

impl Drop for PartialDirectory {
    fn drop(&mut self) {
        if !self.is_complete
            && let Ok(dir) = open_directory(&self.path)
        {
            // What stays is removed when the name is used again.
            let _ = remove_directory(&dir, &self.path);
        }
    }
}

/// A file for `path`, which stays locked as long as it is open.
pub(crate) fn file(path: &Path) -> io::Result<NamedTempFile> {
    for _ in 0..ATTEMPTS {
        let file = drawn(path, |builder, parent| builder.tempfile_in(parent))?;
        if is_owned(file.as_file(), file.path())? {
            return Ok(file);
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// Removes the directory `path`, of which nothing is left under that name if this is interrupted.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let path = path.canonicalize()?;
    let beside = drawn_directory(&path)?;
    if let Err(e) = std::fs::rename(&path, &beside) {
        let _ = rustix::fs::rmdir(&beside);
        return Err(e);
    }
    let dir = open_directory(&beside)?;
    remove_directory(&dir, &beside)
}

/// Removes what was being written for `path` by somebody who has ended. What cannot be removed stays.
pub(crate) fn sweep(path: &Path) {
    let Ok(entries) = std::fs::read_dir(parent(path)) else {
        return;
    };
    let prefix = prefix(path);
    for entry in entries.flatten() {
        if !is_partial(&entry.file_name(), &prefix) {
            continue;
        }
        let kind = entry.file_type();
        let _ = match kind {
            Ok(kind) if kind.is_dir() => sweep_directory(&entry.path()),
            Ok(kind) if kind.is_file() => sweep_file(&entry.path()),
            _ => Ok(()),
        };
    }
}

fn sweep_directory(path: &Path) -> io::Result<()> {
    // What follows is relative to the open directory: a link put in its place leads nowhere.
    let dir = open_directory(path)?;
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(&dir, MANIFEST, flags, Mode::empty()) {
        Ok(file) => {
            let file = File::from(file);
            let there = rustix::fs::statat(&dir, MANIFEST, AtFlags::SYMLINK_NOFOLLOW)?;
            let here = rustix::fs::fstat(&file)?;
            if file.metadata()?.is_file()
                && lock(&file)?
                && (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
            {
                remove_directory(&dir, path)?;
            }
            Ok(())
        }
        // Only an empty one goes: its owner has not come to the manifest, or to the end of removing it.
        Err(Errno::NOENT) => Ok(rustix::fs::rmdir(path)?),
        Err(e) => Err(e.into()),
    }
}

fn sweep_file(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() && lock(&file)? && is_at(&file, path)? {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Removes a directory of files, the manifest last: without it nobody could tell any more whose it is.
fn remove_directory(dir: &impl AsFd, path: &Path) -> io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && name != MANIFEST.as_bytes() {
            rustix::fs::unlinkat(dir, entry.file_name(), AtFlags::empty())?;
        }
    }
    match rustix::fs::unlinkat(dir, MANIFEST, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
    }
    Ok(rustix::fs::rmdir(path)?)
}

/// The directory that `path` is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn prefix(path: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

/// Makes something of a name that is drawn for `path`, in the directory that `path` is in.
fn drawn<T>(
    path: &Path,
    make: impl FnOnce(&mut tempfile::Builder<'_, '_>, &Path) -> io::Result<T>,
) -> io::Result<T> {
    let prefix = prefix(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(SUFFIX).rand_bytes(DRAWN);
    make(&mut builder, parent(path))
}

/// A directory that only its owner may read.
fn drawn_directory(path: &Path) -> io::Result<PathBuf> {
    let dir = drawn(path, |builder, parent| {
        let private = Permissions::from_mode(0o700);
        builder.permissions(private).tempdir_in(parent)
    })?;
    Ok(dir.keep())
}

fn is_partial(name: &OsStr, prefix: &OsStr) -> bool {
    let name = name.as_bytes().strip_prefix(prefix.as_bytes());
    let drawn = name.and_then(|name| name.strip_suffix(SUFFIX.as_bytes()));
    drawn.is_some_and(|d| d.len() == DRAWN && d.iter().all(u8::is_ascii_alphanumeric))
}

/// Takes the lock of `file`, which is at `path` unless somebody took it for a leftover.
fn is_owned(file: &File, path: &Path) -> io::Result<bool> {
    match lock(file) {
        Ok(false) => Ok(false),
        // Without locks nobody takes it for a leftover.
        Ok(true) | Err(_) => is_at(file, path),
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let here = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (here.dev(), here.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes the exclusive lock of a file; false if another open file has it.
fn lock(file: &File) -> io::Result<bool> {
    let whole = libc::flock {
        // F_WRLCK is 1.
        l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
