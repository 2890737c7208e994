//! A unix socket's name in the file system.
//!
//! A process that is killed leaves the name of its socket behind. The next listener replaces it, if
//! the file is a socket and nobody listens on it. Any other file is left alone, symbolic links
//! included.
//!
//! Two processes may find the same dead socket at once. Without a lock the slower one would remove
//! the socket that the faster one has bound meanwhile. A listener therefore holds an advisory lock
//! (`flock`) on the directory while it looks and binds. The lock is a courtesy between processes of
//! this code: if somebody keeps it for longer than [`LOCK_LIMIT`], or the directory cannot be
//! locked, the listener goes on without it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

/// How long the lock on the directory is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(1);
/// Between two attempts to take it.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// Removes a socket's name when it is dropped, unless the name is another socket's by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

/// Why a path cannot be listened on.
#[derive(Debug)]
pub(super) enum SocketFileError {
    /// A file that is no socket has the name.
    NotASocket,
    /// Anything else. `AddrInUse`: somebody listens there.
    Io(io::Error),
}

impl SocketFile {
    /// Listens on `path`, if need be in place of a socket whose owner has died.
    pub(super) fn bind(path: &Path) -> Result<(UnixListener, Self), SocketFileError> {
        let _lock = lock(path);
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => replace(path, error)?,
            other => other.map_err(SocketFileError::Io)?,
        };
        let id = file_id(path).map_err(SocketFileError::Io)?;
        let path = path.to_owned();
        Ok((listener, Self { path, id }))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The socket still listens: nobody has taken its name for a dead one.
        if file_id(&self.path).is_ok_and(|id| id == self.id) {
            // A name that stays behind is replaced by the next listener.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn replace(path: &Path, busy: io::Error) -> Result<UnixListener, SocketFileError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketFileError::NotASocket);
        }
        Ok(_) if !is_abandoned(path).map_err(SocketFileError::Io)? => {
            return Err(SocketFileError::Io(busy));
        }
        Ok(_) => fs::remove_file(path).map_err(SocketFileError::Io)?,
        // Its owner has removed it since.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(SocketFileError::Io(error)),
    }
    UnixListener::bind(path).map_err(SocketFileError::Io)
}

/// Whether a socket's name belongs to nobody any more.
///
/// A datagram socket asks: unlike a stream it neither waits when the owner's backlog is full nor
/// disturbs the owner with a client that comes and goes. The kernel refuses the connection if nobody
/// has the name (ECONNREFUSED), and otherwise because the types differ (EPROTOTYPE).
fn is_abandoned(path: &Path) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) => Ok(error.kind() == io::ErrorKind::ConnectionRefused),
        Ok(()) => Ok(false),
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Locks the directory of `path` until the file is dropped.
fn lock(path: &Path) -> Option<File> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR)
                if begun.elapsed() < LOCK_LIMIT =>
            {
                thread::sleep(LOCK_POLL);
            }
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn bind(path: &Path) -> Result<(UnixListener, SocketFile), SocketFileError> {
        SocketFile::bind(path)
    }

    #[test]
    fn a_socket_whose_owner_has_died_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        // A plain listener leaves its name behind, as a process that was killed does.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (listener, file) = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop((file, listener));
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_is_in_use_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (owner, _file) = bind(&path).unwrap();
        let Err(SocketFileError::Io(error)) = bind(&path) else {
            panic!("the socket is in use");
        };
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // The owner has not even seen a client.
        owner.set_nonblocking(true).unwrap();
        let accepted = owner.accept().unwrap_err();
        assert_eq!(accepted.kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketFileError::NotASocket)));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (path, dead) = (directory.path().join("link"), directory.path().join("dead"));
        drop(UnixListener::bind(&dead).unwrap());
        std::os::unix::fs::symlink(&dead, &path).unwrap();
        assert!(matches!(bind(&path), Err(SocketFileError::NotASocket)));
        assert!(dead.exists() && path.is_symlink());
    }

    #[test]
    fn a_name_that_is_another_sockets_by_now_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn of_many_that_find_a_dead_socket_at_once_one_gets_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for _ in 0..20 {
            drop(UnixListener::bind(&path).unwrap());
            let bound: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| bind(&path).ok())).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            assert_eq!(bound.iter().flatten().count(), 1);
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn a_lock_that_somebody_keeps_delays_and_does_not_prevent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let held = lock(&path).unwrap();
        assert!(lock(&path).is_none());
        drop(held);
        assert!(lock(&path).is_some());
    }
}
